"""Every parser of files from elsewhere, as a function of bytes, and what it may do with them.

A parser may refuse a file with a sentence, a `UserError` or `BadPicture`. Any other exception, a
sentence of several lines, more than `SECONDS` of time, and memory beyond a factor of the size of
the file are findings. `faults.fuzz` looks for them, and the tests repeat the small files of
`tests/corpus`, which were found or made by hand.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import pathlib
import shutil
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from unittest import mock

import jax
import numpy as np
from PIL import Image

import evaluation
import score_sde
from models import classifier
from models.utils import create_classifier
from modes import convert
from report import reading
from runtime.errors import UserError
from sources import (
  celeba,  # noqa: F401
  cifar10,
  lsun,
  npz,  # noqa: F401
  own_pictures,  # noqa: F401
  parquet,  # noqa: F401
  published,
  splits,
  stores,
  tfrecords,
)
from sources.base import DATASETS, BadPicture, Pictures
from sources.pictures import MAX_PIXELS
from tests import tiny_config
from tests.published_files import data_config, record

CORPUS = pathlib.Path(__file__).parent.parent / 'tests' / 'corpus'

SECONDS = 5.0
# What a parser may use whatever the file: modules that are imported late, buffers, a small network.
BYTES = 2**26

_READ = 16  # pictures of a file that are decoded


class Finding(Exception):
  """What a parser must not do."""


@dataclasses.dataclass(frozen=True)
class Target:
  """A parser.

  Attributes:
    read: reads a file, as a user would.
    name: of the file.
    forms: what bytes are made into files by; a fuzzer gets no checksum right by itself.
    factor: bytes of memory for each byte of the file.
    picture: bytes for the largest picture that is decoded; a file of 200 bytes may be one.
  """

  read: Callable[[pathlib.Path], object]
  name: str
  forms: tuple[Callable[[bytes], bytes], ...] = (bytes,)
  factor: int = 100
  picture: int = 0


def check(name: str, content: bytes, folder: pathlib.Path) -> list[str]:
  """Feeds bytes to a target, in all its forms; returns the sentences of refusal.

  Args:
    name: of the target.
    content: the bytes.
    folder: where the file is written to; it is empty before and after.

  Raises:
    Finding: if the parser breaks a rule of this module.
  """
  _warm_up(name, folder)
  target = TARGETS[name]
  refusals = []
  for form in target.forms:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / target.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(form(content))
    refusals += _check_file(target, path)
    shutil.rmtree(folder)
  return refusals


@functools.cache
def _warm_up(name: str, folder: pathlib.Path) -> None:
  """Lets a target import and trace what it needs the first time, which is not the file's fault."""
  path = folder / TARGETS[name].name
  path.parent.mkdir(parents=True)
  for seed in sorted((CORPUS / name).glob('[!b]*')):
    path.write_bytes(seed.read_bytes())
    with contextlib.suppress(Exception):
      TARGETS[name].read(path)
  shutil.rmtree(folder)


def _check_file(target: Target, path: pathlib.Path) -> list[str]:
  size = path.stat().st_size
  refusals, seconds, used = _read(target, path)
  if seconds > SECONDS:  # on a machine that paused, another time is shorter
    seconds = min(_read(target, path)[1] for _ in range(2))
  if any('\n' in sentence for sentence in refusals):
    raise Finding(f'more than one line: {refusals}')
  if seconds > SECONDS:
    raise Finding(f'{seconds:.1f} s')
  if used > BYTES + target.picture + target.factor * size:
    raise Finding(f'{used:,} bytes of memory for a file of {size:,}')
  return refusals


def _read(target: Target, path: pathlib.Path) -> tuple[list[str], float, int]:
  """Reads a file; returns the sentence of a refusal, the seconds and the bytes of memory."""
  refusals = []
  before, start = _memory(reset=True), time.process_time()
  try:
    target.read(path)
  except (UserError, BadPicture) as error:
    refusals.append(str(error))
  except Exception as error:
    raise Finding(f'{type(error).__name__}: {error}') from error
  return refusals, time.process_time() - start, _memory() - before


def _memory(reset: bool = False) -> int:
  """The most resident bytes since the last reset; 0 where Linux does not tell."""
  process = pathlib.Path('/proc/self')
  with contextlib.suppress(OSError):
    if reset:
      (process / 'clear_refs').write_text('5')
    status = (process / 'status').read_text()
    return int(status.partition('VmHWM:')[2].split()[0]) << 10
  return 0


@functools.cache
def _config() -> tiny_config.ml_collections.ConfigDict:
  return score_sde.load_config(tiny_config.get_config())


def _import(path: pathlib.Path) -> None:
  """A checkpoint of any format, for a classifier and for `--mode=import`."""
  with contextlib.suppress(UserError):
    create_classifier(jax.random.PRNGKey(0), 1, path, 'tiny')
  convert.read_state(_config(), str(path))


def _export(path: pathlib.Path) -> None:
  with contextlib.suppress(UserError):
    convert.read_weights(_config(), path)
  score_sde.load_config(path)


def _classifier(path: pathlib.Path) -> None:
  classifier.load_classifier(path)


def _tfrecord(path: pathlib.Path) -> None:
  data = data_config(path.parent, 'FFHQ', 8, num_channels=1).data
  source = tfrecords.open_records(data, path)
  for i in range(min(len(source), _READ)):
    with contextlib.suppress(UserError):
      source[i]
  source.verify()


def _statistics(path: pathlib.Path) -> None:
  config = _config().copy_and_resolve_references()
  config.eval.stats_path = str(path)
  evaluation.load_dataset_stats(config, tiny_config.tiny_extractor(config))


def _store(path: pathlib.Path) -> None:
  """A file of pictures, as `data.path`."""
  store = stores.open_store(path)
  files = store.files()
  chosen = splits.split(files)
  labels, names = splits.classes(chosen, store.class_names)
  found = stores.PictureFiles(
    store, chosen['train'], num_channels=3, labels=labels['train'], class_names=names
  )
  assert found.key
  _decode(found)


def _decode(found: Pictures) -> None:
  for i in range(min(len(found), _READ)):
    with contextlib.suppress(BadPicture):
      found.read(i)


def _lmdb(path: pathlib.Path) -> None:
  store = lsun.LmdbStore(path.parent)
  _decode(stores.PictureFiles(store, store.files(), num_channels=3))


def _lsun_archive(path: pathlib.Path) -> None:
  """Extracts the archive of a category, which has no published checksum."""
  folder = path.parent / 'church_outdoor_val_lmdb'
  lsun.extract(path, folder)
  _lmdb(folder / 'data.mdb')


def _cifar(path: pathlib.Path) -> None:
  """A file of an extracted archive; those of whole archives are verified first."""
  data = data_config(path.parent.parent, 'CIFAR10', 32).data
  _decode(cifar10._pictures(data, 'test'))


def _published(dataset: str, path: pathlib.Path) -> None:
  """A published file as if its checksum were right."""
  config = data_config(path.parent, dataset, 32, num_workers=1)
  unverified = published.PublishedFile(path.name)
  with mock.patch.dict(published.FILES, {path.name: unverified}):
    DATASETS.build(dataset, config.data, config, 'test')


def _recorded(path: pathlib.Path) -> None:
  """The recorded configuration of a run that somebody has shared."""
  reading.read_runs([path.parent])
  score_sde.load_config(path.parent)


# What makes bytes into files.


def _archive(name: str, **others: bytes) -> Callable[[bytes], bytes]:
  """Bytes as a member of a ZIP file, after others."""

  def write(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
      for other, stored in others.items():
        archive.writestr(other.replace('__', '/'), stored)
      archive.writestr(name, content)
    return file.getvalue()

  return write


def _tar(content: bytes) -> bytes:
  """Bytes as the pictures of the test set of CIFAR-10."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w:gz', compresslevel=1) as archive:
    member = tarfile.TarInfo('cifar-10-batches-bin/test_batch.bin')
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
  return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def _safetensors(header: bytes) -> bytes:
  return struct.pack('<Q', len(header)) + header + bytes(64)


def png() -> bytes:
  """A small picture."""
  file = io.BytesIO()
  pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
  Image.fromarray(pixels).save(file, 'png')
  return file.getvalue()


_FLOATS = np.arange(1000, dtype=np.float32).tobytes()
# Bytes of all copies while it is decoded; with transparency or 16 bits we have measured 18 and 19.
_PICTURE = 20 * MAX_PIXELS
_DEFLATED = 1100  # a compressed file may be a thousandth of its content
TARGETS = {
  'torch': Target(_import, 'port.pth', (bytes, _archive('a/data.pkl', **{'a__data__0': _FLOATS}))),
  'flax': Target(_import, 'checkpoint_1'),
  'export': Target(_export, 'export.safetensors', (bytes, _safetensors)),
  'classifier': Target(_classifier, 'classifier.safetensors', (bytes, _safetensors)),
  'tfrecord': Target(_tfrecord, 'faces-r03.tfrecords', (bytes, record)),
  'statistics': Target(
    _statistics,
    'stats.npz',
    (bytes, _archive('mu.npy', **{'sigma.npy': _npy(np.eye(8))})),
    factor=3 * _DEFLATED,
  ),
  'npz': Target(_store, 'pictures.npz', (bytes, _archive('images.npy')), factor=2 * _DEFLATED),
  'zip': Target(
    _store,
    'pictures.zip',
    (bytes, _archive('dataset.json', **{'a__1.png': png()}), _archive('a/1.png')),
    factor=2 * _DEFLATED,
    picture=_PICTURE,
  ),
  'lmdb': Target(_lmdb, 'church_outdoor_val_lmdb/data.mdb', factor=200, picture=_PICTURE),
  'lsun': Target(_lsun_archive, 'church_outdoor_val_lmdb.zip', factor=_DEFLATED, picture=_PICTURE),
  'cifar': Target(_cifar, 'cifar-10-batches-py/test_batch'),
  'cifar_archive': Target(
    functools.partial(_published, 'CIFAR10'),
    'cifar-10-binary.tar.gz',
    (bytes, functools.partial(gzip.compress, compresslevel=1), _tar),
    factor=2 * _DEFLATED,
  ),
  'parquet': Target(_store, 'pictures.parquet', factor=_DEFLATED, picture=_PICTURE),
  'arrow': Target(_store, 'pictures.arrow', factor=_DEFLATED, picture=_PICTURE),
  'config': Target(_recorded, 'config.json'),
}
