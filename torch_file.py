"""Reads files of `torch.save` without PyTorch, and without running anything that is in them.

Such a file is a pickle, which is a program: it may name any function of Python and call it. Here it
may name only what a checkpoint consists of, and each of those names stands for a function of this
module that makes a NumPy array, a number or a dictionary. Everything else is refused.
"""

import io
import mmap
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from typing import IO, Any

import ml_dtypes
import numpy as np

from errors import UserError

ZIP_MAGIC = b'PK\x03\x04'
LEGACY_MAGIC = b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19'  # the pickle of torch's magic number

_STORAGES = {
  'DoubleStorage': 'f8',
  'FloatStorage': 'f4',
  'HalfStorage': 'f2',
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16).name,
  'LongStorage': 'i8',
  'IntStorage': 'i4',
  'ShortStorage': 'i2',
  'CharStorage': 'i1',
  'ByteStorage': 'u1',
  'BoolStorage': '?',
  'UntypedStorage': 'u1',
}

# (type, key, number of elements) -> the elements
StorageReader = Callable[[np.dtype, str, int], np.ndarray]


class _Dict(dict):
  """An ordered dictionary that ignores the attributes PyTorch puts on it."""

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    del state


class _Scalar:
  """The type of a NumPy number; the byte order arrives after the name, in NumPy's pickles too."""

  def __init__(self, name: str, *_: Any):
    self.dtype = np.dtype(name)

  def __setstate__(self, state: tuple) -> None:
    self.dtype = self.dtype.newbyteorder(state[1])


class _Unpickler(pickle.Unpickler):
  """Builds arrays; what is not in `find_class` cannot be named.

  Methods stand for the functions, since a pickle may try to set attributes of what it names.
  """

  def __init__(self, file: IO[bytes], read_storage: StorageReader, byteorder: str = '<'):
    super().__init__(file)
    self._read_storage = read_storage
    self._byteorder = byteorder

  def find_class(self, module: str, name: str) -> Any:
    if module in ('torch', 'torch.storage') and name in _STORAGES:
      return _STORAGES[name]
    allowed = {
      'collections.OrderedDict': self._ordered_dict,
      'torch.Size': self._size,
      'torch._utils._rebuild_tensor': self._tensor,
      'torch._utils._rebuild_tensor_v2': self._tensor,
      'torch._utils._rebuild_parameter': self._parameter,
      # A learning rate may be a NumPy number.
      'numpy.dtype': self._scalar_type,
      'numpy.core.multiarray.scalar': self._scalar,
      'numpy._core.multiarray.scalar': self._scalar,
      '_codecs.encode': self._encode,
    }
    if f'{module}.{name}' not in allowed:
      raise UserError(
        f'The file names the Python object {module}.{name}, which no checkpoint needs and which '
        f'may be harmful; it was refused and nothing was run: get the file from its author again.'
      )
    return allowed[f'{module}.{name}']

  def persistent_load(self, pid: tuple) -> np.ndarray:
    kind, dtype, key, _, size, *view = pid
    if kind != 'storage' or any(view):
      raise ValueError(f'unknown reference {kind!r} {view}')
    return self._read_storage(np.dtype(dtype).newbyteorder(self._byteorder), key, size)

  def _tensor(self, storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    item = storage.dtype.itemsize
    strides = [item * step for step in stride]
    # NumPy checks that the array stays inside the storage.
    return np.ndarray(size, storage.dtype, storage, item * offset, strides)

  def _parameter(self, data: np.ndarray, *_: Any) -> np.ndarray:
    return data

  def _ordered_dict(self, items: tuple = ()) -> _Dict:
    return _Dict(items)

  def _size(self, size: tuple) -> tuple:
    return tuple(size)

  def _scalar_type(self, name: str, *_: Any) -> _Scalar:
    return _Scalar(name)

  def _scalar(self, kind: _Scalar, data: bytes) -> int | float | bool:
    return np.frombuffer(data, kind.dtype)[0].item()

  def _encode(self, text: str, encoding: str = 'latin1') -> bytes:
    del encoding
    return text.encode('latin1')


def load(path: pathlib.Path) -> Any:
  """The content of a file of `torch.save`, tensors as NumPy arrays (views of their storages).

  Reads the ZIP format (PyTorch 1.6 and later) and the older one.

  Raises:
    UserError: if the file names something that is not part of a checkpoint.
    Exception: of any other kind if the file is damaged or not of `torch.save`.
  """
  with path.open('rb') as file:
    is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    file.seek(0)
    if is_zip:
      return _load_zip(file)
    # Mapped, because a file would make room for as many bytes as a pickle asks for.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      return _load_legacy(content)


def _load_zip(file: IO[bytes]) -> Any:
  """`data.pkl` holds the pickle, `data/<key>` the storages, `byteorder` 'little' or 'big'."""
  with zipfile.ZipFile(file) as archive:
    entries = {info.filename.partition('/')[2]: info for info in archive.infolist()}
    storages = {}
    left = file.seek(0, io.SEEK_END)

    def read(name: str) -> bytes:
      nonlocal left
      entry = entries[name]
      left -= entry.file_size
      if entry.compress_type != zipfile.ZIP_STORED or left < 0:
        raise ValueError(f'{name} is larger than the file allows')
      return archive.read(entry)

    def read_storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
      if key not in storages:
        storages[key] = np.frombuffer(read(f'data/{key}'), dtype)
      if storages[key].size != size:
        raise ValueError(f'storage {key} has {storages[key].size} elements, not {size}')
      return storages[key]

    big = 'byteorder' in entries and read('byteorder') == b'big'
    return _unpickle(io.BytesIO(read('data.pkl')), read_storage, '>' if big else '<')


def _load_legacy(file: mmap.mmap) -> Any:
  """Five pickles (magic number, version, system, content, keys), then the storages by key."""
  storages = {}
  left = len(file)

  def make_storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
    nonlocal left
    if key not in storages:
      left -= size * dtype.itemsize
      if size < 0 or left < 0:
        raise ValueError(f'storage {key} is larger than the file')
      storages[key] = np.empty(size, dtype)
    return storages[key]

  _, _, system, content, keys = (_unpickle(file, make_storage) for _ in range(5))
  if not system['little_endian']:
    raise ValueError('the old format in big-endian byte order')
  for key in keys:  # the arrays of `content` are views of these
    storage = storages.pop(key)
    if int.from_bytes(file.read(8), 'little') != storage.size:
      raise ValueError(f'storage {key} has another size')
    storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype, storage.size)
  if storages:
    raise ValueError(f'storages {sorted(storages)} are not in the file')
  return content


def _unpickle(file: IO[bytes], read_storage: StorageReader, byteorder: str = '<') -> Any:
  """Reads one pickle, after a look at its places of memory: a huge number would take as much."""
  start = file.tell()
  for opcode, argument, position in pickletools.genops(file):
    if opcode.name.endswith('PUT') and argument > position:
      raise ValueError(f'place {argument} of memory in a pickle of {position} bytes')
  file.seek(start)
  return _Unpickler(file, read_storage, byteorder).load()
