"""Measures how fast images reach the training step, beside what the machine can do at most.

python -m benchmarks.data

It makes pictures in a temporary folder and prints, as medians of rounds in which the compared
things alternate: batches from the cache at 32 and 256 pixels beside a bare copy of the same bytes
in memory, and the building of a cache from 20,000 JPEG files beside bare decoding on all cores.
"""

import io
import json
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import loky
import numpy as np
from absl import app, flags
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

import datasets
from runtime.startup import available_cores
from sources import cache
from sources.array_pictures import ArrayPictures
from sources.framing import Framing
from sources.stores import FolderStore, PictureFiles

_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds, of which the median is reported.')
_SECONDS = flags.DEFINE_float('seconds', 1.0, 'How long a round reads batches.')


def pictures_like_photographs(count: int, size: int) -> UInt8[np.ndarray, 'N H W C']:
  """Smooth random colours with a little noise, uint8 (count, size, size, 3)."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
  smooth = [np.asarray(Image.fromarray(x).resize((size, size), 3)) for x in coarse]
  noise = rng.integers(-8, 9, (count, size, size, 3), np.int16)
  return np.clip(np.stack(smooth) + noise, 0, 255).astype(np.uint8)


def settings(folder: pathlib.Path) -> ConfigDict:
  """The section `data` that the cache reads."""
  values = {'dataset': 'benchmark', 'num_channels': 3, 'num_workers': 0, 'max_bad': 0}
  return ConfigDict({**values, 'cache_dir': str(folder)})


def rates(**actions: Callable[[], float]) -> dict[str, float]:
  """The median of what each action returns, over rounds in which they take turns."""
  found = {name: [] for name in actions}
  for _ in range(_ROUNDS.value):
    for name, action in actions.items():
      found[name].append(action())
  return {name: round(statistics.median(values)) for name, values in found.items()}


def reading(folder: pathlib.Path, count: int, size: int, batch_size: int) -> dict[str, float]:
  """Images per second from the cache, and by copying the same number of bytes in memory."""
  images = pictures_like_photographs(count, size)
  pictures = ArrayPictures(images, np.zeros(count, np.int64), key=str(size))
  source = cache.prepared(settings(folder), f'train{size}', pictures, Framing(size))
  source.verify()  # maps every file, as the first epoch does
  dataset = datasets.Dataset(
    source, batch_size=batch_size, seed=0, shuffle=True, preprocess=None, augment=True
  )
  batches = dataset.iterate()
  target = np.empty((batch_size, *images.shape[1:]), np.uint8)

  def cached() -> float:
    start, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < _SECONDS.value:
      next(batches)
      done += batch_size
    return done / seconds

  def copied() -> float:
    start, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < _SECONDS.value:
      first = done % (count - batch_size)
      np.copyto(target, images[first : first + batch_size])
      done += batch_size
    return done / seconds

  return rates(cache=cached, copy=copied)


def decode(paths: list[pathlib.Path]) -> int:
  """Decodes files as simply as Pillow allows; returns the number of bytes."""
  total = 0
  for path in paths:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
      total += np.asarray(image.convert('RGB')).nbytes
  return total


def building(folder: pathlib.Path, count: int, size: int) -> dict[str, float]:
  """JPEG files per second into a cache, and by bare decoding in a process for each core.

  The processes of the bare decoding are running when the clock starts, those of the cache are not.
  """
  root = folder / 'pictures'
  root.mkdir()
  images = pictures_like_photographs(count // 10, size)
  for i, image in enumerate(images):
    Image.fromarray(image).save(root / f'{i:05d}_0.jpg', quality=90)
    for copy in range(1, 10):
      (root / f'{i:05d}_{copy}.jpg').hardlink_to(root / f'{i:05d}_0.jpg')
  store = FolderStore(root)
  pictures = PictureFiles(store, store.files(), num_channels=3)
  paths = sorted(root.iterdir())
  parts = [paths[start : start + 250] for start in range(0, count, 250)]

  def cached() -> float:
    start = time.perf_counter()
    source = cache.prepared(settings(folder), 'build', pictures, Framing(size))
    seconds = time.perf_counter() - start
    shutil.rmtree(source.folder)
    return count / seconds

  with loky.ProcessPoolExecutor(available_cores()) as pool:
    sum(pool.map(decode, parts[: available_cores()]))  # starts them

    def bare() -> float:
      start = time.perf_counter()
      sum(pool.map(decode, parts))
      return count / (time.perf_counter() - start)

    return rates(cache=cached, pillow=bare)


def main(argv: list[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    report = {
      'read_32px': reading(folder, 50_000, 32, 128),
      'read_256px': reading(folder, 2_000, 256, 64),
      'build_256px_jpeg': building(folder, 20_000, 256),
    }
  for name, found in report.items():
    (ours, rate), (other, bound) = found.items()
    print(f'{name}: {ours} {rate:,} images/s, {other} {bound:,} images/s, ratio {rate / bound:.2f}')
  print(json.dumps(report))


if __name__ == '__main__':
  app.run(main)
