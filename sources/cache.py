"""The cache of framed pictures: each is read, cropped and resized once, and then only copied.

A split is a folder `<data set>-<split>-<hash>` in `data.cache_dir`, where the hash is of the stored
files and the framing, so that a changed folder of pictures has another one. It holds

shard_00000.bin     the pixels of some pictures, one after the other, uint8
shard_00000.json    their sizes and labels, and what was skipped; written after the pixels
index.npz           sizes and labels of all; written last: the cache is complete
skipped.csv         the files that are not used, with the reasons
.lock               locked while the cache is made

A process that is killed leaves complete shards, and the next one continues after them.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import crc32c
import numpy as np
from absl import logging
from jaxtyping import Float, Int, Integer, UInt8
from ml_collections import ConfigDict

from runtime import npz_file, progress, reporting
from runtime.errors import UserError
from runtime.files import lock, write_atomic
from runtime.startup import available_cores, user_cache
from sources.base import BatchReader, Example, Pictures, mapped
from sources.framing import Framing
from sources.shards import Shard, ShardMaker, working

_VERSION = 1  # of the files; part of the hash
_SHARD_BYTES = 2**26
_SHARDS = 16  # at least, of a data set with so many pictures, so that workers can share them


def cache_folder(data: ConfigDict) -> pathlib.Path:
  """The folder of caches and downloads: `data.cache_dir`, or one of the user if that is empty."""
  return pathlib.Path(data.cache_dir).expanduser() if data.cache_dir else user_cache() / 'data'


@dataclasses.dataclass(frozen=True)
class CachedPictures(BatchReader):
  """A complete cache of one split, which is a `Source`.

  Its files are mapped into memory. The checksum of each is verified when it is first used.

  Attributes:
    folder: of the cache.
    size: height and width of the images.
    num_channels: of the images.
    shapes: height and width of each stored picture, (N, 2).
    labels: (N,).
    starts: the number of the first picture of each shard, and N.
    checksums: CRC-32C of each shard.
    class_names: the names of the labels.
    fingerprint: SHA-256 of the sizes, the labels and checksums of the pixels of all pictures.
    num_skipped: how many files were skipped.
    num_bad: how many of these were found to be damaged only when they were read.
  """

  folder: pathlib.Path
  _: dataclasses.KW_ONLY
  size: int
  num_channels: int
  shapes: Int[np.ndarray, 'N 2']
  labels: Int[np.ndarray, ' N']
  starts: Int[np.ndarray, ' shards_and_one']
  checksums: Int[np.ndarray, ' shards']
  class_names: tuple[str, ...]
  fingerprint: str
  num_skipped: int
  num_bad: int = 0

  def __len__(self) -> int:
    """The number of pictures."""
    return len(self.labels)

  def gather(
    self,
    indices: Integer[np.ndarray, ' B'],
    draws: Float[np.ndarray, ' B'] | None = None,
  ) -> Example:
    """The examples `indices`: 'image', uint8 (B, size, size, C), and 'label', int32 (B,).

    Of a picture that is not square, the part in the middle is shown, or with `draws` the part that
    begins at that fraction of the way.
    """
    size, channels = self.size, self.num_channels
    images = np.empty((len(indices), size, size, channels), np.uint8)
    shards = np.searchsorted(self.starts, indices, side='right') - 1
    rows = zip(shards.tolist(), indices.tolist(), strict=True)
    for row, (shard, i) in enumerate(rows):
      pixels, offset = self._shard(shard), self._offsets[i]
      height, width = self._heights[i], self._widths[i]
      picture = pixels[offset : offset + height * width * channels]
      if height == width:
        images[row] = picture.reshape(size, size, channels)
        continue
      free = max(height, width) - size
      shift = free // 2 if draws is None else int(draws[row] * (free + 1))
      top, left = (shift, 0) if height > width else (0, shift)
      picture = picture.reshape(height, width, channels)
      images[row] = picture[top : top + size, left : left + size]
    return {'image': images, 'label': self.labels[indices].astype(np.int32)}

  @functools.cached_property
  def _heights(self) -> list[int]:
    return self.shapes[:, 0].tolist()

  @functools.cached_property
  def _widths(self) -> list[int]:
    return self.shapes[:, 1].tolist()

  @functools.cached_property
  def _offsets(self) -> list[int]:
    """Where each picture begins in its shard."""
    ends = np.cumsum(self.shapes.prod(1) * self.num_channels)
    begins = np.concatenate([[0], ends])
    firsts = begins[self.starts[:-1]].repeat(np.diff(self.starts))
    return (begins[:-1] - firsts).tolist()

  @functools.cached_property
  def _mapped(self) -> dict[int, UInt8[np.ndarray, ' bytes']]:
    return {}

  def _shard(self, number: int) -> UInt8[np.ndarray, ' bytes']:
    if number not in self._mapped:
      path = self.folder / f'shard_{number:05d}.bin'
      pixels = _map(path)
      if crc32c.crc32c(pixels) != self.checksums[number]:
        raise _damaged(path)
      self._mapped[number] = pixels
    return self._mapped[number]

  def verify(self) -> None:
    """Reads everything.

    Raises:
      UserError: if a file is damaged.
    """
    for number in range(len(self.checksums)):
      self._shard(number)


def _map(path: pathlib.Path) -> UInt8[np.ndarray, ' bytes']:
  try:
    return mapped(path)
  except (OSError, ValueError):
    return np.zeros(0, np.uint8)  # missing or empty, which the checksum tells


def prepared(data: ConfigDict, split: str, pictures: Pictures, framing: Framing) -> CachedPictures:
  """The framed pictures of one split, from the cache, which is made first if it is not complete.

  Args:
    data: the configuration, of which `dataset`, `num_channels`, `cache_dir`, `num_workers` and
      `max_bad` are read.
    split: 'train' or 'test', for the name of the folder.
    pictures: what the data set stores.
    framing: what is done to each picture.

  Raises:
    UserError: if the folder cannot be written to, more than `data.max_bad` pictures cannot be used,
      or none can.
  """
  about = [_VERSION, pictures.key, list(pictures.class_names), data.num_channels]
  about.append(dataclasses.asdict(framing))
  digest = hashlib.sha256(json.dumps(about).encode(errors='surrogatepass')).hexdigest()[:16]
  folder = cache_folder(data) / f'{data.dataset}-{split}-{digest}'
  if not (folder / 'index.npz').exists():
    count = len(pictures)  # opens the files: what is missing is told before a folder is made
    reporting.check_writable(folder, 'data.cache_dir')
    of_bytes = _SHARD_BYTES // (framing.size**2 * data.num_channels)
    step = max(1, min(of_bytes, -(-count // _SHARDS)))
    maker = ShardMaker(folder, pictures, framing, count, step)
    with _locked(folder):
      if not (folder / 'index.npz').exists():  # another process may have made it meanwhile
        workers = data.num_workers or available_cores()
        _build(maker, workers, data.max_bad, f'{data.dataset}/{split}')
  opened = _open(folder, framing.size, data.num_channels)
  if opened.num_bad > data.max_bad:
    raise UserError(
      f'{opened.num_bad} pictures of {data.dataset}/{split} cannot be used, more than data.max_bad='
      f'{data.max_bad} ({folder / "skipped.csv"} lists them): repair or remove them, or set a '
      f'larger data.max_bad.'
    )
  return opened


@contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Waits until no other process makes this cache; the system unlocks it when a process ends."""
  with (folder / '.lock').open('a') as file:
    if not lock(file):
      logging.info('Another process is making %s: waiting for it.', folder)
      lock(file, wait=True)
    yield


def _open(folder: pathlib.Path, size: int, num_channels: int) -> CachedPictures:
  path = folder / 'index.npz'
  try:
    arrays = npz_file.load_arrays(path, lambda names: names)
    about = json.loads(str(arrays['about']))
    return CachedPictures(
      folder,
      size=size,
      num_channels=num_channels,
      shapes=arrays['shapes'],
      labels=arrays['labels'],
      starts=arrays['starts'],
      checksums=arrays['checksums'],
      class_names=tuple(about['class_names']),
      fingerprint=about['fingerprint'],
      num_skipped=about['num_skipped'],
      num_bad=int(about.get('num_bad', 0)),  # which older caches do not record
    )
  except (*npz_file.UNREADABLE, LookupError, TypeError) as error:
    raise _damaged(path) from error


def _damaged(path: pathlib.Path) -> UserError:
  return UserError(
    f'{path} is damaged: remove the folder {path.parent} and rerun the same command, which makes '
    f'it again.'
  )


def _build(maker: ShardMaker, workers: int, max_bad: int, title: str) -> None:
  """Makes all shards that are missing, and the index; `title` names the data in messages."""
  for path in maker.folder.glob('.*-????????'):  # parts of files of a process that was killed
    path.unlink()
  shards, bad = [], []
  with (
    working(maker, workers) as make,
    progress.bar(what=title, total=maker.count, unit='pictures') as bar,
  ):
    for shard in make(range(len(maker))):
      shards.append(shard)
      bad += shard.skipped
      bar.update(len(shard.labels) + len(shard.skipped))
      if len(bad) > max_bad:
        listed = '; '.join(f'{name}: {reason}' for name, reason in bad[:3])
        raise UserError(
          f'{len(bad)} pictures of {title} cannot be used, more than data.max_bad={max_bad} '
          f'(such as {listed}): repair or remove them, or set a larger data.max_bad.'
        )
  skipped = [*maker.pictures.skipped, *bad]
  labels = np.asarray([label for shard in shards for label in shard.labels], np.int64)
  if not len(labels):
    raise UserError(
      f'None of the {maker.count} pictures of {title} can be used ({summary(skipped)}): repair or '
      f'replace them; a smaller data.min_side also takes small ones, enlarged.'
    )
  if skipped:
    path = maker.folder / 'skipped.csv'
    text = io.StringIO()
    csv.writer(text).writerows([('file', 'reason'), *skipped])
    write_atomic(path, text.getvalue().encode(errors='surrogateescape'))
    logging.warning('Not all pictures are used, %s; %s lists them.', summary(skipped), path)
  _write_index(maker, shards, labels, num_skipped=len(skipped), num_bad=len(bad))


def _write_index(
  maker: ShardMaker,
  shards: list[Shard],
  labels: Int[np.ndarray, ' N'],
  *,
  num_skipped: int,
  num_bad: int,
) -> None:
  """Completes a cache."""
  shapes = [shape for shard in shards for shape in shard.shapes]
  digest = hashlib.sha256(''.join(shard.digest for shard in shards).encode())
  digest.update(json.dumps([shapes, labels.tolist()]).encode())
  about: dict[str, Any] = {
    'class_names': list(maker.pictures.class_names),
    'fingerprint': digest.hexdigest(),
    'num_skipped': num_skipped,
    'num_bad': num_bad,
  }
  reporting.write_npz(
    maker.folder / 'index.npz',
    shapes=np.asarray(shapes, np.int64),
    labels=labels,
    starts=np.cumsum([0, *(len(shard.labels) for shard in shards)]),
    checksums=np.asarray([shard.checksum for shard in shards], np.int64),
    about=np.asarray(json.dumps(about)),
  )


def summary(skipped: Sequence[Sequence[str]], examples: int = 3) -> str:
  """How many files are skipped for each reason, with the names of the first ones."""
  counts = Counter(reason for _, reason in skipped)

  def listed(reason: str) -> str:
    names = [name for name, why in skipped if why == reason]
    more = ', ...' * (len(names) > examples)
    return f'{len(names)} x {reason} ({", ".join(names[:examples])}{more})'

  return f'{len(skipped)} skipped: {", ".join(map(listed, counts))}' if skipped else '0 skipped'
