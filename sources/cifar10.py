"""CIFAR-10 from its authors' archives, https://www.cs.toronto.edu/~kriz/cifar.html."""

import io
import pathlib
import tarfile
import zlib
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from ml_collections import ConfigDict

from runtime.errors import UserError
from runtime.pickles import Machine, Stateful
from sources import cache, published
from sources.array_pictures import ArrayPictures
from sources.base import Pictures, register_dataset
from sources.framing import Framing

CLASS_NAMES = (
  'airplane',
  'automobile',
  'bird',
  'cat',
  'deer',
  'dog',
  'frog',
  'horse',
  'ship',
  'truck',
)
_BINARY, _PYTHON = 'cifar-10-binary.tar.gz', 'cifar-10-python.tar.gz'
_FOLDERS = {'cifar-10-batches-bin': _BINARY, 'cifar-10-batches-py': _PYTHON}
_NAMES = (_BINARY, _PYTHON, *_FOLDERS)
_RECORD = 1 + 3 * 32 * 32  # the label, then the red, green and blue levels

_Levels = UInt8[np.ndarray, 'N 3072']
_Labels = Integer[np.ndarray, ' N']


@register_dataset(name='CIFAR10')
def cifar10(config: ConfigDict, split: str) -> cache.CachedPictures:
  """CIFAR-10, 50,000 and 10,000 pictures of 32 x 32 pixels, of ten classes.

  `data.path` is one of the archives `cifar-10-binary.tar.gz` and `cifar-10-python.tar.gz`, or a
  folder that was extracted from one, or the folder that has it.
  """
  # Pictures are enlarged if the configuration asks for more pixels than they have.
  framing = Framing(config.data.image_size, min_side=32)
  return cache.prepared(config.data, split, _pictures(config.data, split), framing)


def _pictures(data: ConfigDict, split: str) -> Pictures:
  published.check_colours(data)
  given = pathlib.Path(data.path).name  # comes first if it is one of the names
  for name in sorted(_NAMES, key=lambda name: name != given):
    path = published.find(data, name, _NAMES)
    if path is not None and name in _FOLDERS:
      files = [path / member for member in _members(_FOLDERS[name], split)]
      return _from_files(data, split, files, archive=_FOLDERS[name])
    if path is not None:
      return _from_archive(data, split, name)
  return _from_archive(data, split, _BINARY)


def _from_archive(data: ConfigDict, split: str, name: str) -> Pictures:
  """The pictures in an archive.

  Both archives hold the same pictures in the same order and share a cache.
  """

  def read() -> ArrayPictures:
    path = published.verified(data, name, _NAMES)
    wanted = _members(name, split)
    try:
      contents = _read_members(path, wanted)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
      raise UserError(
        f'{path} is truncated or damaged ({error}): get {published.FILES[name].address} again.'
      ) from error
    absent = [member for member in wanted if member not in contents]
    if absent:
      raise UserError(f'{path} has no file {absent[0]}: get {published.FILES[name].address} again.')
    return _decode({f'{path}, {member}': contents[member] for member in wanted}, name, key=key)

  key = f'CIFAR-10 {split} {published.FILES[_BINARY].checksum}'
  return published.LazyPictures(key, read, CLASS_NAMES)


def _from_files(
  data: ConfigDict, split: str, files: list[pathlib.Path], *, archive: str
) -> Pictures:
  """The pictures in the files of an extracted archive."""
  del data
  absent = [path for path in files if not path.is_file()]
  if absent:
    raise UserError(f'{absent[0]} does not exist: extract the whole of {archive} again.')
  key = f'CIFAR-10 {split} {published.key_of_files(files)}'
  return published.LazyPictures(
    key,
    lambda: _decode({str(path): path.read_bytes() for path in files}, archive, key=key),
    CLASS_NAMES,
  )


def _members(archive: str, split: str) -> list[str]:
  """The names of the files of a split in an archive."""
  batches = [f'data_batch_{i}' for i in range(1, 6)] if split == 'train' else ['test_batch']
  return [f'{name}.bin' for name in batches] if archive == _BINARY else batches


def _read_members(path: pathlib.Path, names: list[str]) -> dict[str, bytes]:
  """The contents of files in an archive, by their names without folders."""
  contents = {}
  with tarfile.open(path) as archive:
    for member in archive:
      name = pathlib.PurePosixPath(member.name).name
      if name in names and member.isfile() and not member.issparse():  # which may have any size
        contents[name] = archive.extractfile(member).read()
  return contents


def _decode(contents: dict[str, bytes], archive: str, *, key: str) -> ArrayPictures:
  """The pictures in the files of a split.

  Args:
    contents: of the files, by what each is called in messages.
    archive: the name of the archive that the files belong to.
    key: see `sources.base.Pictures`.
  """
  decode = _decode_binary if archive == _BINARY else _decode_pickle
  levels, labels, names = [], [], []
  for name, content in contents.items():
    try:
      batch_levels, batch_labels = decode(content)
      _check(batch_levels, batch_labels)
    except Exception as error:  # a damaged pickle raises many kinds of errors
      raise UserError(
        f'{name} is not a batch of CIFAR-10 ({str(error) or type(error).__name__}); nothing in it '
        f'was run: get {published.FILES[archive].address} again.'
      ) from error
    levels.append(batch_levels)
    labels.append(batch_labels)
    names += [f'{name}, picture {i}' for i in range(len(batch_labels))]
  images = np.concatenate(levels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return ArrayPictures(
    images, np.concatenate(labels), key=key, names=names, class_names=CLASS_NAMES
  )


def _decode_binary(content: bytes) -> tuple[_Levels, _Labels]:
  if not content or len(content) % _RECORD:
    raise ValueError(f'{len(content):,} bytes are not a whole number of records of {_RECORD:,}')
  records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
  return records[:, 1:], records[:, 0]


def _check(levels: _Levels, labels: _Labels) -> None:
  if len(levels) != len(labels):
    raise ValueError(f'it has {len(levels)} pictures and {len(labels)} labels')
  for label in (labels.min(), labels.max()):
    if not 0 <= label < len(CLASS_NAMES):
      raise ValueError(f'it has a label {label}, not in 0 to {len(CLASS_NAMES) - 1}')


# The Python archive holds pickles of Python 2. What follows stands for the names that they use.


class _NumberType(Stateful):
  """Stands for `numpy.dtype`."""

  def __init__(self, name: str, *_: Any):
    if name != 'u1':
      raise ValueError('it has numbers of a type other than uint8')

  def set_state(self, state: Any) -> None:
    """Ignores the byte order, which bytes do not have."""


class _Array(Stateful):
  """Stands for `numpy.core.multiarray._reconstruct`; the values arrive after it is made.

  Attributes:
    levels: the values.
  """

  def __init__(self, *_: Any):
    self.levels = None

  def set_state(self, state: Any) -> None:
    """Takes the shape and the values."""
    _, shape, _, fortran_order, content = state
    order = 'F' if fortran_order else 'C'
    self.levels = np.frombuffer(content.encode('latin-1'), np.uint8).reshape(shape, order=order)


_PICKLED = {
  'numpy.dtype': _NumberType,
  'numpy.ndarray': None,
  'numpy.core.multiarray._reconstruct': _Array,
  'numpy._core.multiarray._reconstruct': _Array,
}


def _decode_pickle(content: bytes) -> tuple[_Levels, _Labels]:
  batch = Machine(_PICKLED, len(content)).run(io.BytesIO(content))
  levels, labels = batch['data'].levels, batch['labels']
  if not isinstance(labels, list) or not labels or not all(type(i) is int for i in labels):
    raise ValueError('its labels are not a list of whole numbers')
  if levels.ndim != 2 or levels.shape[1] != _RECORD - 1:
    raise ValueError(f'its pictures have the shape {levels.shape}, not (N, {_RECORD - 1:,})')
  return levels, np.asarray(labels)
