"""The work of filling a cache, a shard of pictures at a time, in threads or processes.

Decoding holds Python's lock for half of its time, so that threads keep fewer than two cores busy.
Many pictures are therefore decoded by several processes, which import this module and no JAX.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import cloudpickle
import crc32c
import loky
import numpy as np
from PIL import Image

from runtime.errors import Exit, UserError
from runtime.files import open_atomic, write_atomic
from sources.base import BadPicture, Pictures
from sources.framing import Framing

MANY = 2000  # pictures, from which on the start of processes pays


@dataclasses.dataclass(frozen=True)
class Shard:
  """What is recorded of the pictures of one shard that are used.

  Attributes:
    shapes: height and width of each.
    labels: of each.
    skipped: name and reason of those that are not used.
    checksum: CRC-32C of the pixels.
    digest: SHA-256 of the checksums of the pictures.
  """

  shapes: Sequence[Sequence[int]]
  labels: Sequence[int]
  skipped: Sequence[Sequence[str]]
  checksum: int
  digest: str


class LostWorker(UserError):
  """A worker process was killed."""

  status = Exit.MEMORY


@dataclasses.dataclass(frozen=True)
class ShardMaker:
  """Makes the shards of one split.

  Attributes:
    folder: where they go.
    pictures: what the data set stores.
    framing: what is done to each picture.
    count: the number of pictures.
    step: the number of pictures of a shard, of which the last one may have fewer.
  """

  folder: pathlib.Path
  pictures: Pictures
  framing: Framing
  count: int
  step: int

  def __len__(self) -> int:
    """The number of shards."""
    return -(-self.count // self.step)

  def make(self, number: int) -> Shard:
    """Makes a shard, or reads what is recorded of it if it is complete."""
    path = self.folder / f'shard_{number:05d}.bin'
    record = path.with_suffix('.json')
    if record.exists():
      return Shard(**json.loads(record.read_text(encoding='utf-8')))
    shapes, labels, skipped, checksum, digest = [], [], [], 0, hashlib.sha256()
    # Checksums tell a shard that a failing machine has not written to the end.
    with open_atomic(path, sync=False) as file:
      for i in range(number * self.step, min((number + 1) * self.step, self.count)):
        try:
          pixels, label = self.pictures.read(i)
          image = np.ascontiguousarray(self.framing(pixels))
        except BadPicture as error:
          skipped.append((self.pictures.name(i), str(error)))
          continue
        content = memoryview(image).cast('B')
        file.write(content)
        checksum = crc32c.crc32c(content, checksum)
        digest.update(crc32c.crc32c(content).to_bytes(4))
        shapes.append(image.shape[:2])
        labels.append(int(label))
    shard = Shard(
      shapes=shapes, labels=labels, skipped=skipped, checksum=checksum, digest=digest.hexdigest()
    )
    write_atomic(record, json.dumps(dataclasses.asdict(shard)).encode())
    return shard


@contextlib.contextmanager
def working(maker: ShardMaker, workers: int) -> Iterator[Callable[[range], Iterator[Shard]]]:
  """Starts workers; yields a function that maps the numbers of shards to them, in order."""
  if workers > 1 and maker.count >= MANY and getattr(maker.pictures, 'portable', False):
    ours, theirs = multiprocessing.Pipe()
    with (
      ours,
      theirs,
      tempfile.NamedTemporaryFile(dir=maker.folder, prefix='.maker-') as file,
      loky.ProcessPoolExecutor(workers, initializer=_start, initargs=(file.name, theirs)) as pool,
    ):
      # In a file, because a worker whose pipe breaks while it reads a long list prints a traceback.
      cloudpickle.dump(maker, file)
      file.flush()
      try:
        # Not `map`: it would cancel the rest of the tasks on failure, which breaks the shutdown.
        yield lambda numbers: (
          future.result() for future in [pool.submit(_make, i) for i in numbers]
        )
      except BrokenProcessPool as error:
        raise LostWorker(
          f'A process that decodes pictures was killed, as the system does where memory is short: '
          f'lower data.num_workers={workers} and rerun the same command, which resumes.'
        ) from error
      except BaseException:
        pool.shutdown(kill_workers=True)
        raise
    return
  _prepare_pillow()
  with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
    warnings.simplefilter('ignore')  # Pillow's, about damaged metadata
    try:
      yield functools.partial(pool.map, maker.make)
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _prepare_pillow() -> None:
  Image.init()  # loading its plugins is not safe in threads


_maker: ShardMaker  # of a worker process


def _start(path: str, pipe: multiprocessing.connection.Connection) -> None:
  """Makes a worker process ready; it ends with the process that has the other end of the pipe."""
  global _maker
  threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
  _prepare_pillow()
  warnings.simplefilter('ignore')
  with open(path, 'rb') as file:
    _maker = pickle.load(file)


def _end_with(pipe: multiprocessing.connection.Connection) -> None:
  """Ends this process when the other end of the pipe is closed; a kill may leave locks behind."""
  multiprocessing.connection.wait([pipe])
  os._exit(1)


def _make(number: int) -> Shard:
  return _maker.make(number)
