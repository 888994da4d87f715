"""Picture files: which ones a folder holds, how they are split, and what they look like in uint8.

`open_folder` lists a folder and reads the headers of its files; `decode` reads one of them. What
`decode` returns follows these rules, whatever the file format:

- grey levels of 16 bits become v / 257 and floats, which have to be in [0, 1], 255 x, both rounded;
  Pillow reads colours of 16 bits per channel by their upper 8 bits;
- what is transparent is seen on a white ground;
- the orientation in EXIF is applied;
- an animation or a file of several pages is its first frame.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import mimetypes
import os
import stat
import struct
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import ExifTags, Image, ImageOps

from runtime.errors import UserError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.gif')
MAX_PIXELS = 100_000_000

# Folders of pictures for testing beside `train`: the first that there is.
TEST_FOLDERS = ('test', 'val', 'valid', 'validation', 'dev')

_WIDE_MODES = ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N', 'F')
_MODES = (*_WIDE_MODES, '1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBX', 'RGBA', 'RGBa', 'CMYK', 'YCbCr')
_HEADER_THREADS = 16  # more than there are cores: they wait for the file system


class File(NamedTuple):
  """A file that is, or looks like, a picture.

  Attributes:
    name: relative to the folder that was opened, with forward slashes.
    path: where it is.
    size: in bytes.
    modified: time of the last change, in nanoseconds.
    fault: why it is not used; empty if it is.
  """

  name: str
  path: str
  size: int = 0
  modified: int = 0
  fault: str = ''

  @property
  def folder(self) -> str:
    """The first part of the name; empty if the file is in no sub-folder."""
    return self.name.rpartition('/')[0].partition('/')[0]


def open_folder(root: str) -> dict[str, Sequence[File]]:
  """The pictures of the splits 'train' and 'test', by their names in code-point order.

  With a sub-folder `train` the pictures in it are for training, and those in the first of
  `TEST_FOLDERS` that has any for testing; upper and lower case do not matter. If there is none of
  these, every tenth picture of `train` is for testing; without `train`, every tenth of all. Files
  that cannot be used are left out, with one warning that says why.

  Raises:
    UserError: if the folder cannot be read, holds other folders of pictures beside `train`, or
      no picture that can be read.
  """
  files = list_files(root)
  folders = (name for name in sorted(os.listdir(root)) if os.path.isdir(os.path.join(root, name)))
  train = next((name for name in folders if name.lower() == 'train'), None)
  return _split(tuple(files), train)


def list_files(root: str) -> list[File]:
  """All files below `root` that look like pictures, by their names in code-point order.

  Links are followed, and each folder is read once, by its own name rather than by that of a link.
  Broken links, hidden and empty files and folders that cannot be read have a `fault`.

  Raises:
    UserError: if `root` is not a folder that can be read.
  """
  files, seen = [], set()
  pending = collections.deque([(root, '')])
  while pending:
    folder, prefix = pending.popleft()
    if (real := os.path.realpath(folder)) in seen:
      continue
    seen.add(real)
    try:
      with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
      if not prefix:
        raise UserError(f'{error.strerror}: give a folder of pictures.') from error
      files.append(File(prefix, folder, fault=error.strerror))
      continue
    for entry in entries:
      name, fault = prefix + entry.name, _fault(entry)
      if fault:
        files.append(File(name, entry.path, fault=fault))
      elif fault is not None and entry.is_dir():
        # Links wait until all folders that are really there have been read.
        add = pending.append if entry.is_symlink() else pending.appendleft
        add((entry.path, name + '/'))
      elif fault is not None:
        status = entry.stat()
        files.append(File(name, entry.path, status.st_size, status.st_mtime_ns))
  return sorted(files)


def _fault(entry: os.DirEntry) -> str | None:
  """Why a folder or picture is not used; empty if it is; None for what is no picture."""
  suffix = os.path.splitext(entry.name)[1].lower()
  named_picture = suffix in SUFFIXES or _is_image_type(entry.name)
  hidden = entry.name.startswith('.')
  try:
    status = entry.stat()
  except OSError as error:
    if hidden and not named_picture:
      return None
    return 'broken link' if entry.is_symlink() else error.strerror
  is_folder = stat.S_ISDIR(status.st_mode)
  if not (is_folder or named_picture):
    return None
  if hidden:
    return 'hidden folder' if is_folder else 'hidden file'
  if is_folder:
    return f'folder named {suffix}' if suffix in SUFFIXES else ''
  if suffix not in SUFFIXES:
    return f'unsupported format {suffix}'
  if not stat.S_ISREG(status.st_mode):
    return 'not a regular file'
  return '' if status.st_size else 'empty file'


def _is_image_type(name: str) -> bool:
  return (mimetypes.guess_type(name)[0] or '').startswith('image/')


@functools.lru_cache(maxsize=4)  # both splits of a run come from one look at the files
def _split(files: tuple[File, ...], train: str | None) -> dict[str, Sequence[File]]:
  folders = _split_folders([file for file in files if not file.fault], train)
  used = [file for file in files if file.fault or not folders or file.folder in folders.values()]
  checked = check_headers(used)
  skipped = [file for file in checked if file.fault]
  if skipped:
    logging.warning('Not all files are used, %s.', _summary(skipped))
  pictures = [file for file in checked if not file.fault]
  if 'test' in folders:
    splits = {
      split: [file for file in pictures if file.folder == folder]
      for split, folder in folders.items()
    }
  else:
    splits = _hold_out(pictures)
  for split, chosen in splits.items():
    if not chosen:
      where = f'its folder {folders.get(split, train)!r}' if folders else 'it'
      found = _summary(skipped) if skipped else f'no file ends in {", ".join(SUFFIXES)}'
      raise UserError(f'{where} holds no picture that can be read ({found}); put pictures there.')
  return splits


def _split_folders(files: Sequence[File], train: str | None) -> dict[str, str]:
  """The sub-folders of the splits; none if the pictures are not sorted into such folders."""
  others = {file.folder for file in files} - {train}
  tests = sorted(
    (name for name in others if name.lower() in TEST_FOLDERS),
    key=lambda name: (TEST_FOLDERS.index(name.lower()), name),
  )
  if train is None:
    if tests:
      raise UserError(
        f"it has a folder {tests[0]!r} but none named 'train': move the pictures for training into "
        f"a folder 'train' beside it, or rename it."
      )
    return {}
  strange = sorted(others - set(tests))
  if strange:
    names = ', '.join(repr(name) if name else 'the folder itself' for name in strange)
    raise UserError(
      f'there are pictures outside {train!r}, in {names}: move them into {train!r} or out of the '
      f'folder; those for testing go into one of {", ".join(TEST_FOLDERS)}.'
    )
  if len(tests) > 1:
    logging.info('Testing uses the folder %r; not used: %s.', tests[0], ', '.join(tests[1:]))
  return {'train': train, 'test': tests[0]} if tests else {'train': train}


def _hold_out(files: Sequence[File]) -> dict[str, Sequence[File]]:
  """Every tenth is for testing; of fewer than ten the last, and a single one is in both splits."""
  if len(files) == 1:
    logging.warning('The only picture, %s, is used for training and for testing.', files[0].path)
    return {'train': files, 'test': files}
  test = set(files[9::10] or files[-1:])
  return {
    'train': [file for file in files if file not in test],
    'test': [file for file in files if file in test],
  }


def _summary(skipped: Sequence[File], examples: int = 3) -> str:
  """How many files are skipped for which reason, with the names of the first ones."""
  names = collections.defaultdict(list)
  for file in skipped:
    names[file.fault].append(file.name)
  reasons = (
    f'{len(found)} x {fault} ({", ".join(found[:examples])}{", ..." * (len(found) > examples)})'
    for fault, found in names.items()
  )
  return f'{len(skipped)} skipped: {", ".join(reasons)}'


def check_headers(files: Sequence[File]) -> list[File]:
  """The files, with a `fault` where the header is not that of a picture that `decode` can read."""
  Image.init()  # loading the plugins is not safe in threads
  with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(_HEADER_THREADS) as pool:
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)
    return list(pool.map(_check_header, files))


def _check_header(file: File) -> File:
  fault = file.fault or _header_fault(file.path)
  return file._replace(fault=fault) if fault else file


def _header_fault(path: str) -> str:
  too_large = f'more than {MAX_PIXELS:,} pixels'
  try:
    with Image.open(path) as image:
      if image.width * image.height > MAX_PIXELS:
        return too_large
      return '' if image.mode in _MODES else f'colours of mode {image.mode}'
  except Image.DecompressionBombError:
    return too_large
  except Exception as error:  # plugins raise many kinds for what is not their format
    return getattr(error, 'strerror', None) or 'not a picture'


def fingerprint(files: Sequence[File]) -> str:
  """SHA-256 of the names and sizes of the files."""
  digest = hashlib.sha256()
  for file in sorted(files):
    digest.update(f'{file.name}\0{file.size}\n'.encode(errors='surrogateescape'))
  return digest.hexdigest()


def decode(path: str | os.PathLike, num_channels: int) -> np.ndarray:
  """A picture file as uint8 (height, width, channels); the rules are those of this module.

  Args:
    path: of the file.
    num_channels: 1 for grey; else RGB.

  Raises:
    UserError: naming the file, if it is damaged or has values outside the range of its type.
  """
  try:
    # Not by its path: Pillow would map the file and mix up the rows of a TIFF that is turned.
    with open(path, 'rb') as file, Image.open(file) as image:
      _scale_transparent_colour(image)
      image.load()
      _turn_upright(image)
      pixels = _on_white(_to_8_bits(image)).convert('L' if num_channels == 1 else 'RGB')
      return np.asarray(pixels).reshape(*pixels.size[::-1], -1)
  except Exception as error:  # decoders raise many kinds for damaged data
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(
      f'The picture {os.fspath(path)} cannot be read ({reason}): remove or replace it and rerun '
      f'the same command, which resumes once data.json is removed from --workdir.'
    ) from error


def _scale_transparent_colour(image: Image.Image) -> None:
  """Brings a PNG's transparent grey level or colour to 8 bits, as Pillow does with its pixels."""
  if image.format != 'PNG' or 'transparency' not in image.info:
    return
  colour = image.info['transparency']
  scale = {'L;2': 85, 'L;4': 17, 'RGB;16B': 1 / 256}.get(image.tile[0].args)
  if scale:
    scaled = (np.asarray(colour) * scale).astype(int).tolist()
    image.info['transparency'] = tuple(scaled) if isinstance(colour, tuple) else scaled


def _turn_upright(image: Image.Image) -> None:
  # EXIF that cannot be parsed does not say that the picture is to be turned.
  with contextlib.suppress(SyntaxError, ValueError, LookupError, struct.error):
    ImageOps.exif_transpose(image, in_place=True)


def _to_8_bits(image: Image.Image) -> Image.Image:
  if image.mode not in _WIDE_MODES:
    return image
  tags: Any = getattr(image, 'tag_v2', {})  # of TIFF
  twelve_bits = tags.get(ExifTags.Base.BitsPerSample) == (12,)
  peak = 1 if image.mode == 'F' else 4095 if twelve_bits else 65535
  values = np.asarray(image)
  if not ((values >= 0) & (values <= peak)).all():  # NaN is neither
    raise ValueError(f'it has values from {values.min()} to {values.max()}, not within 0 to {peak}')
  levels = np.rint(values * (255 / peak)).astype(np.uint8)
  if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
    levels = 255 - levels
  levels[values == image.info.get('transparency', -1)] = 255
  return Image.fromarray(levels)


def _on_white(image: Image.Image) -> Image.Image:
  if not image.has_transparency_data:
    return image
  ground = Image.new('RGBA', image.size, 'white')
  return Image.alpha_composite(ground, image.convert('RGBA'))
