"""Reads files of `torch.save` without PyTorch, and without running any code in them.

Such a file is a pickle, see `runtime.pickles`; the names that occur in checkpoints stand for
functions of this module that return a NumPy array, a number or a dictionary.
"""

import io
import math
import mmap
import pathlib
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from runtime.errors import UserError
from runtime.pickles import DEEPEST, Machine, Refused, Stateful, checked_key, of_type

ZIP_MAGIC = b'PK\x03\x04'
LEGACY_MAGIC = b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19'  # the pickle of torch's magic number

# 4,800 entries of about 100 bytes are in the directory of the ZIP file of the deepest published
# network.
_LONGEST_READ = 2**20  # bytes

_STORAGES = {
  'DoubleStorage': 'f8',
  'FloatStorage': 'f4',
  'HalfStorage': 'f2',
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': 'i8',
  'IntStorage': 'i4',
  'ShortStorage': 'i2',
  'CharStorage': 'i1',
  'ByteStorage': 'u1',
  'BoolStorage': '?',
  'UntypedStorage': 'u1',
}


def load(path: pathlib.Path) -> Any:
  """The content of a file of `torch.save`, with tensors as NumPy arrays (views of their storages).

  It reads the ZIP format (PyTorch 1.6 and later) and the older one. The size of the file bounds
  time and memory: nesting is limited, and all tensors together are at most four times as large.

  Raises:
    UserError: if the file does what no checkpoint does.
    Exception: of any other kind, if the file is damaged or was not written by `torch.save`.
  """
  with path.open('rb') as file:
    is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
  try:
    return _load_zip(path) if is_zip else _load_legacy(path)
  except Refused as error:
    raise UserError(
      f'{path} {error}; nothing in it was run: get the file from its author again.'
    ) from error


class _ShortReads(io.FileIO):
  """A file read in pieces: `ZipFile` would read a directory of any length that it claims."""

  def read(self, size: int = -1) -> bytes:
    return super().read(_LONGEST_READ if size < 0 else min(size, _LONGEST_READ))


def _load_zip(path: pathlib.Path) -> Any:
  """Reads the ZIP format: the pickle `data.pkl`, the storages `data/<key>`, and `byteorder`."""
  with _ShortReads(path) as file, zipfile.ZipFile(file) as archive:
    entries = {info.filename.partition('/')[2]: info for info in archive.infolist()}
    if 'data.pkl' not in entries:
      raise Refused(f'is a ZIP file of {len(entries)} entries without the data.pkl of torch.save')
    storages = {}
    left = file_size = path.stat().st_size

    def read(name: str) -> bytes:
      nonlocal left
      entry = entries[name]
      left -= entry.file_size
      if entry.compress_type != zipfile.ZIP_STORED or left < 0:
        raise Refused(f'has an entry {name} that is compressed or larger than the file allows')
      with archive.open(entry) as opened:
        return b''.join(iter(lambda: opened.read(_LONGEST_READ), b''))

    def read_storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
      if key not in storages:
        storages[key] = np.frombuffer(read(f'data/{key}'), dtype)
      _check_storage(storages[key], dtype, key, size=size)
      return storages[key]

    order = '>' if 'byteorder' in entries and read('byteorder') == b'big' else '<'
    return Machine(_NAMES, file_size, read_storage, order).run(io.BytesIO(read('data.pkl')))


def _load_legacy(path: pathlib.Path) -> Any:
  """Reads the old format: five pickles (magic number, version, system, content, keys), storages."""
  # Mapped, because reading a file allocates as many bytes as a pickle asks for.
  with path.open('rb') as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
    storages = {}
    left = len(file)

    def make_storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
      nonlocal left
      if key not in storages:
        left -= size * dtype.itemsize
        if size < 0 or left < 0:
          raise ValueError(f'storage {key} is larger than the file')
        storages[key] = np.empty(size, dtype)
      _check_storage(storages[key], dtype, key, size=size)
      return storages[key]

    machine = Machine(_NAMES, len(file), make_storage)
    _, _, system, content, keys = (machine.run(file) for _ in range(5))
    if not system['little_endian']:
      raise ValueError('the old format in big-endian byte order')
    for key in keys:  # the arrays of `content` are views of these
      storage = storages.pop(checked_key(key))
      if int.from_bytes(file.read(8), 'little') != storage.size:
        raise ValueError(f'storage {key} has another size')
      storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype, storage.size)
    if storages:
      raise ValueError(f'storages {sorted(storages)} are not in the file')
    return content


def _check_storage(storage: np.ndarray, dtype: np.dtype, key: str, *, size: int) -> None:
  if (storage.dtype, storage.size) != (dtype, size):
    raise ValueError(
      f'storage {key} has {storage.size} elements of {storage.dtype}, not {size} of {dtype}'
    )


# The names that a pickle may use, and the function of this module that each stands for.


class _NumberType(Stateful):
  """The type of a NumPy number, whose byte order arrives after its name."""

  def __init__(self, name: str):
    self.dtype = np.dtype(name)

  def set_state(self, state: Any) -> None:
    """Sets the byte order."""
    self.dtype = self.dtype.newbyteorder(state[1])


def _number_type(name: str, *_: Any) -> _NumberType:
  if name not in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1'):
    raise ValueError('a NumPy number of an unusual type')
  return _NumberType(name)


def _number(kind: _NumberType, data: bytes) -> int | float | bool:
  return np.frombuffer(data, of_type(_NumberType, kind).dtype)[0].item()


def _encode(text: str, _: str = 'latin1') -> bytes:
  if len(text) > 8:
    raise ValueError('bytes that are not a NumPy number')
  return text.encode('latin1')


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
  if not len(size) == len(stride) <= DEEPEST:
    raise ValueError('a tensor whose size and strides are not of the same length, at most 32')
  if math.prod(of_type(int, n) for n in size) > storage.size:
    raise Refused(f'has a tensor of more elements than the {storage.size} of its storage')
  item = storage.dtype.itemsize
  # NumPy checks that the array stays inside the storage.
  return np.ndarray(size, storage.dtype, storage, item * offset, [item * step for step in stride])


_NAMES = {
  **{f'torch.{name}': np.dtype(kind) for name, kind in _STORAGES.items()},
  **{f'torch.storage.{name}': np.dtype(kind) for name, kind in _STORAGES.items()},
  'collections.OrderedDict': lambda: {},
  'torch.Size': lambda size: size,
  'torch._utils._rebuild_tensor': _tensor,
  'torch._utils._rebuild_tensor_v2': _tensor,
  'torch._utils._rebuild_parameter': lambda data, *_: data,
  # A learning rate may be a NumPy number.
  'numpy.dtype': _number_type,
  'numpy.core.multiarray.scalar': _number,
  'numpy._core.multiarray.scalar': _number,
  '_codecs.encode': _encode,
}
