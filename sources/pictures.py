"""Picture files: which ones a folder holds, how they are split, and what they look like in uint8.

`open_folder` lists a folder and reads the headers of its files; `decode` reads one file. Whatever
the file format, `decode` follows these rules:

- A grey level v of 16 bits becomes v / 257, and a float x, which has to be in [0, 1], becomes
  255 x; both are rounded. Of colours with 16 bits per channel Pillow reads the upper 8 bits.
- Transparent pixels are blended with a white background.
- The orientation in EXIF is applied.
- An animation or a file of several pages is represented by its first frame.
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
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from runtime.errors import UserError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.gif')
MAX_PIXELS = 100_000_000

# Names of the folder of test pictures beside `train`, in the order of preference.
TEST_FOLDERS = ('test', 'val', 'valid', 'validation', 'dev')

_WIDE_MODES = ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N', 'F')
_MODES = (*_WIDE_MODES, '1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBX', 'RGBA', 'RGBa', 'CMYK', 'YCbCr')
_HEADER_THREADS = 16  # more than the machine has cores, since they wait for the file system


class File(NamedTuple):
  """A file that is a picture or looks like one.

  Attributes:
    name: its path relative to the folder that was opened, with forward slashes.
    path: its whole path.
    size: in bytes.
    modified: time of the last change, in nanoseconds.
    fault: why the file is not used; empty if it is used.
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
  """Lists the pictures of the splits 'train' and 'test', each by name in code-point order.

  If the folder has a sub-folder `train`, its pictures are the training split, and those of the
  first of `TEST_FOLDERS` that holds any are the test split; the case of these names is ignored.
  Without a test folder, every tenth picture of `train` is in the test split instead of the training
  split, and without `train`, every tenth of all pictures. Files that cannot be used are left out,
  and one warning says why.

  Raises:
    UserError: if the folder cannot be read, holds other folders of pictures beside `train`, or
      holds no readable picture.
  """
  files = list_files(root)
  folders = (name for name in sorted(os.listdir(root)) if os.path.isdir(os.path.join(root, name)))
  train = next((name for name in folders if name.lower() == 'train'), None)
  return _split(tuple(files), train)


def list_files(root: str) -> list[File]:
  """Lists all files below `root` that look like pictures, by name in code-point order.

  Links are followed. Each folder is read once, under its own name rather than that of a link.
  Broken links, hidden files, empty files and folders that cannot be read have a `fault`.

  Raises:
    UserError: if `root` is not a readable folder.
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
        # Links wait until all real folders have been read.
        add = pending.append if entry.is_symlink() else pending.appendleft
        add((entry.path, name + '/'))
      elif fault is not None:
        status = entry.stat()
        files.append(File(name, entry.path, status.st_size, status.st_mtime_ns))
  return sorted(files)


def _fault(entry: os.DirEntry) -> str | None:
  """Why a folder or picture is not used; empty if it is used; None if it is neither of them."""
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


@functools.lru_cache(maxsize=4)  # so that a run checks the files once for both of its splits
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
      raise UserError(f'{where} holds no picture that can be read ({found}); put pictures into it.')
  return splits


def _split_folders(files: Sequence[File], train: str | None) -> dict[str, str]:
  """The sub-folders of the splits, by split; empty if the pictures are not in such folders."""
  others = {file.folder for file in files} - {train}
  tests = sorted(
    (name for name in others if name.lower() in TEST_FOLDERS),
    key=lambda name: (TEST_FOLDERS.index(name.lower()), name),
  )
  if train is None:
    if tests:
      raise UserError(
        f"it has a folder {tests[0]!r} but none named 'train': move the training pictures into a "
        f"folder 'train' beside it, or rename it."
      )
    return {}
  strange = sorted(others - set(tests))
  if strange:
    names = ', '.join(repr(name) if name else 'the folder itself' for name in strange)
    raise UserError(
      f'it has pictures outside {train!r}, in {names}: move them into {train!r} or out of the '
      f'folder; those for testing go into one of {", ".join(TEST_FOLDERS)}.'
    )
  if len(tests) > 1:
    logging.info('Testing uses the folder %r; not used: %s.', tests[0], ', '.join(tests[1:]))
  return {'train': train, 'test': tests[0]} if tests else {'train': train}


def _hold_out(files: Sequence[File]) -> dict[str, Sequence[File]]:
  """Every tenth file tests, or the last of fewer than ten; a single one is in both splits."""
  if len(files) == 1:
    logging.warning('The only picture, %s, is used for training and for testing.', files[0].path)
    return {'train': files, 'test': files}
  test = set(files[9::10] or files[-1:])
  return {
    'train': [file for file in files if file not in test],
    'test': [file for file in files if file in test],
  }


def _summary(skipped: Sequence[File], examples: int = 3) -> str:
  """The number of files that are skipped for each reason, with the names of the first ones."""
  names = collections.defaultdict(list)
  for file in skipped:
    names[file.fault].append(file.name)
  reasons = (
    f'{len(found)} x {fault} ({", ".join(found[:examples])}{", ..." * (len(found) > examples)})'
    for fault, found in names.items()
  )
  return f'{len(skipped)} skipped: {", ".join(reasons)}'


def check_headers(files: Sequence[File]) -> list[File]:
  """Returns the files, with a `fault` unless the header is of a picture that `decode` can read."""
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
  except Exception as error:  # plugins raise many kinds of errors at files of other formats
    return getattr(error, 'strerror', None) or 'not a picture'


def fingerprint(files: Sequence[File]) -> str:
  """SHA-256 of the names and sizes of the files, in hexadecimal digits."""
  digest = hashlib.sha256()
  for file in sorted(files):
    digest.update(f'{file.name}\0{file.size}\n'.encode(errors='surrogateescape'))
  return digest.hexdigest()


def decode(path: str | os.PathLike[str], num_channels: int) -> UInt8[np.ndarray, 'H W C']:
  """Decodes a picture file by the rules of this module.

  Args:
    path: of the file.
    num_channels: 1 for grey; else RGB.

  Returns:
    Grey levels, uint8 (height, width, channels).

  Raises:
    UserError: if the file, which it names, is damaged or has values outside the range of its type.
  """
  try:
    # Given a path, Pillow would map the file into memory and mix up the rows of a rotated TIFF.
    with open(path, 'rb') as file, Image.open(file) as image:
      _scale_transparent_colour(image)
      image.load()
      _turn_upright(image)
      pixels = _on_white(_to_8_bits(image)).convert('L' if num_channels == 1 else 'RGB')
      return np.asarray(pixels).reshape(*pixels.size[::-1], -1)
  except Exception as error:  # decoders raise many kinds of errors at damaged data
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(
      f'The picture {os.fspath(path)} cannot be read ({reason}): remove or replace it and rerun '
      f'the same command, which resumes once data.json is removed from --workdir.'
    ) from error


def _scale_transparent_colour(image: Image.Image) -> None:
  """Scales a PNG's transparent grey level or colour to 8 bits, as Pillow does with its pixels."""
  if image.format != 'PNG' or 'transparency' not in image.info:
    return
  colour = image.info['transparency']
  scale = {'L;2': 85, 'L;4': 17, 'RGB;16B': 1 / 256}.get(image.tile[0].args)
  if scale:
    scaled = (np.asarray(colour) * scale).astype(int).tolist()
    image.info['transparency'] = tuple(scaled) if isinstance(colour, tuple) else scaled


def _turn_upright(image: Image.Image) -> None:
  # EXIF that cannot be parsed says nothing about the orientation.
  with contextlib.suppress(SyntaxError, ValueError, LookupError, struct.error):
    ImageOps.exif_transpose(image, in_place=True)


def _to_8_bits(image: Image.Image) -> Image.Image:
  if image.mode not in _WIDE_MODES:
    return image
  tags = getattr(image, 'tag_v2', {})  # of TIFF
  twelve_bits = tags.get(ExifTags.Base.BitsPerSample) == (12,)
  peak = 1 if image.mode == 'F' else 4095 if twelve_bits else 65535
  values = np.asarray(image)
  if not ((values >= 0) & (values <= peak)).all():  # both comparisons are false for NaN
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
