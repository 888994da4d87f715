"""Reads files of `torch.save` without PyTorch, and without running any code in them.

Such a file is a pickle: a program for a small stack machine, which may call any Python function.
This module interprets the program itself. It knows only the instructions that `torch.save` writes
and the names that occur in checkpoints, each of which stands for a function of this module that
returns a NumPy array, a number or a dictionary. It refuses everything else, and a program whose
result would be much larger than the file.
"""

import io
import math
import mmap
import pathlib
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from runtime.errors import UserError

ZIP_MAGIC = b'PK\x03\x04'
LEGACY_MAGIC = b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19'  # the pickle of torch's magic number

# The deepest published network has 963 parameters: with EMA and Adam that is 4,800 tensors of 31
# instructions each, and 4,800 entries of about 100 bytes in the directory of the ZIP file.
_MOST_INSTRUCTIONS = 500_000
_LONGEST_READ = 2**20  # bytes
_DEEPEST = 32  # dictionaries in dictionaries, and axes of a tensor
# Bytes of all tensors divided by those of the file; above 1 if tensors share a storage.
_MOST_COPIES = 4

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

# (type, key, number of elements) -> the elements
StorageReader = Callable[[np.dtype, str, int], np.ndarray]


class _Refused(ValueError):
  """The file does what no checkpoint does; the message completes a sentence about the file."""


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
  except _Refused as error:
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
      raise _Refused(f'is a ZIP file of {len(entries)} entries without the data.pkl of torch.save')
    storages = {}
    left = file_size = path.stat().st_size

    def read(name: str) -> bytes:
      nonlocal left
      entry = entries[name]
      left -= entry.file_size
      if entry.compress_type != zipfile.ZIP_STORED or left < 0:
        raise _Refused(f'has an entry {name} that is compressed or larger than the file allows')
      with archive.open(entry) as opened:
        return b''.join(iter(lambda: opened.read(_LONGEST_READ), b''))

    def read_storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
      if key not in storages:
        storages[key] = np.frombuffer(read(f'data/{key}'), dtype)
      _check_storage(storages[key], dtype, key, size=size)
      return storages[key]

    order = '>' if 'byteorder' in entries and read('byteorder') == b'big' else '<'
    return _Machine(read_storage, file_size, order).run(io.BytesIO(read('data.pkl')))


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

    machine = _Machine(make_storage, len(file))
    _, _, system, content, keys = (machine.run(file) for _ in range(5))
    if not system['little_endian']:
      raise ValueError('the old format in big-endian byte order')
    for key in keys:  # the arrays of `content` are views of these
      storage = storages.pop(_checked_key(key))
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


class _Machine:
  """Interprets pickles, with a stack, marks in it, and a memory of earlier values.

  Args:
    read_storage: returns the elements that tensors are views of.
    file_size: the size of the file in bytes, which bounds the size of the result.
    byteorder: the byte order of the storages, '<' or '>'.
  """

  def __init__(self, read_storage: StorageReader, file_size: int, byteorder: str = '<'):
    self._read_storage = read_storage
    self._file_size = file_size
    self._byteorder = byteorder
    self._instructions_left = _MOST_INSTRUCTIONS

  def run(self, file: io.BufferedIOBase | mmap.mmap) -> Any:
    """Interprets the program at the position of `file`, moves past it and returns its result."""
    stack, marks, memory = [], [], {}
    pop, push = stack.pop, stack.append

    def pop_from(start: int) -> list:
      items = stack[start:]
      del stack[start:]
      return items

    for opcode, argument, _ in pickletools.genops(file):
      self._instructions_left -= 1
      if self._instructions_left < 0:
        raise _Refused(
          f'has more than {_MOST_INSTRUCTIONS} instructions, which no checkpoint needs'
        )
      match opcode.name:
        case 'PROTO' | 'FRAME':
          pass
        case 'MARK':
          marks.append(len(stack))
        case 'BINPUT' | 'LONG_BINPUT':
          memory[argument] = stack[-1]
        case 'MEMOIZE':
          memory[len(memory)] = stack[-1]
        case 'BINGET' | 'LONG_BINGET':
          push(memory[argument])
        case 'NONE':
          push(None)
        case 'NEWTRUE' | 'NEWFALSE':
          push(opcode.name == 'NEWTRUE')
        case 'BININT' | 'BININT1' | 'BININT2' | 'BINFLOAT':
          push(argument)
        case 'LONG1':
          push(_checked_number(argument))
        case 'BINUNICODE' | 'SHORT_BINUNICODE' | 'BINBYTES' | 'SHORT_BINBYTES':
          push(argument)
        case 'EMPTY_TUPLE':
          push(())
        case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
          push(tuple(pop_from(-int(opcode.name[-1]))))
        case 'TUPLE':
          push(tuple(pop_from(marks.pop())))
        case 'EMPTY_LIST':
          push([])
        case 'APPEND' | 'APPENDS':
          items = pop_from(-1 if opcode.name == 'APPEND' else marks.pop())
          _of_type(list, stack[-1]).extend(items)
        case 'EMPTY_DICT':
          push({})
        case 'SETITEM' | 'SETITEMS':
          items = pop_from(-2 if opcode.name == 'SETITEM' else marks.pop())
          keys = map(_checked_key, items[::2])
          _of_type(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
        case 'GLOBAL':
          push(_named(argument.replace(' ', '.')))
        case 'STACK_GLOBAL':
          name = pop()
          push(_named(f'{_of_type(str, pop())}.{_of_type(str, name)}'))
        case 'BINPERSID':
          push(self._storage(pop()))
        case 'REDUCE':
          arguments = _of_type(tuple, pop())
          push(_called(pop(), arguments))
        case 'BUILD':
          _set_state(stack[-2], pop())
        case 'STOP':
          return self._checked_size(pop())
        case _:
          raise _Refused(f'has the instruction {opcode.name}, which torch.save does not write')

  def _storage(self, reference: object) -> np.ndarray:
    """The storage that ('storage', type, key, device, number of elements, None) refers to."""
    kind, dtype, key, _, size, *view = _of_type(tuple, reference)[:7]
    if kind != 'storage' or view not in ([], [None]):
      raise ValueError('a reference to something other than a storage')
    dtype = _of_type(np.dtype, dtype).newbyteorder(self._byteorder)
    return self._read_storage(dtype, _of_type(str, key), _of_type(int, size))

  def _checked_size(self, result: Any) -> Any:
    """The result, after a check that it is a tree: a small cyclic graph would never end."""
    items_left, bytes_left = _MOST_INSTRUCTIONS, _MOST_COPIES * self._file_size

    def visit(item: Any, depth: int) -> None:
      nonlocal items_left, bytes_left
      items_left -= 1
      bytes_left -= item.nbytes if isinstance(item, np.ndarray) else 0
      if depth > _DEEPEST or items_left < 0:
        raise _Refused('has lists or dictionaries nested in each other, as no checkpoint has them')
      if bytes_left < 0:
        raise _Refused(f'has tensors that together are over {_MOST_COPIES} times as large as it is')
      inner = item.values() if isinstance(item, dict) else item
      for x in inner if isinstance(item, dict | list | tuple) else ():
        visit(x, depth + 1)

    visit(result, 0)
    return result


def _of_type(kind: type, value: Any) -> Any:
  if not isinstance(value, kind):
    raise ValueError(f'{type(value).__name__} where {kind.__name__} must be')
  return value


def _checked_number(number: int) -> int:
  if not -(2**127) <= number < 2**127:  # torch's magic number has 80 bits
    raise _Refused('has a number of more than 128 bits')
  return number


def _checked_key(key: Any) -> str | int:
  """A key of a dictionary: hashing nested tuples or many large numbers could take forever."""
  if not isinstance(key, str) and not (isinstance(key, int) and 0 <= key < 2**60):
    raise _Refused('has a dictionary with a key that is neither a name nor a small number')
  return key


# The names that a pickle may use, and the function of this module that each stands for.


class _NumberType:
  """The type of a NumPy number, whose byte order arrives after its name."""

  def __init__(self, name: str):
    self.dtype = np.dtype(name)


def _number_type(name: str, *_: Any) -> _NumberType:
  if name not in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1'):
    raise ValueError('a NumPy number of an unusual type')
  return _NumberType(name)


def _number(kind: _NumberType, data: bytes) -> int | float | bool:
  return np.frombuffer(data, _of_type(_NumberType, kind).dtype)[0].item()


def _encode(text: str, _: str = 'latin1') -> bytes:
  if len(text) > 8:
    raise ValueError('bytes that are not a NumPy number')
  return text.encode('latin1')


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
  if not len(size) == len(stride) <= _DEEPEST:
    raise ValueError('a tensor whose size and strides are not of the same length, at most 32')
  if math.prod(_of_type(int, n) for n in size) > storage.size:
    raise _Refused(f'has a tensor of more elements than the {storage.size} of its storage')
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


def _named(name: str) -> Any:
  if name not in _NAMES:
    shown = (name if name.isprintable() else ascii(name))[:100]
    raise _Refused(
      f'names the Python object {shown}, which no checkpoint needs and which may be harmful'
    )
  return _NAMES[name]


def _called(function: Any, arguments: tuple) -> Any:
  """Calls a function of `_NAMES`: a program has no way to make any other callable object."""
  if len(arguments) > 8:
    raise ValueError('a call with too many arguments')
  return function(*arguments)


def _set_state(target: Any, state: Any) -> None:
  """Sets the byte order of a number type; attributes of a dictionary are ignored."""
  if isinstance(target, _NumberType):
    target.dtype = target.dtype.newbyteorder(state[1])
