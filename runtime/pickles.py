"""Interprets pickles that hold plain data, without running any code in them.

A pickle is a program for a small stack machine, which may call any Python function. This module
interprets the program itself. It knows only the instructions with which data are written and the
names that it is told, each of which stands for a function of ours that returns an array, a number
or a dictionary. It refuses everything else, and a program whose result would be much larger than
the file.

Python's own `pickle.Unpickler`, told which names are allowed, still fills 16 GiB for a pickle of
six bytes, hashes a key of nested tuples for ever, and ends the process where they are deep.
"""

import io
import mmap
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# The deepest published network has 963 parameters: with EMA and Adam that is 4,800 tensors of 31
# instructions each.
_MOST_INSTRUCTIONS = 500_000
DEEPEST = 32  # dictionaries in dictionaries, and axes of a tensor
# Bytes of all arrays divided by those of the file; above 1 if tensors share a storage.
_MOST_COPIES = 4

# (type, key, number of elements) -> the elements
StorageReader = Callable[[np.dtype, str, int], np.ndarray]


class Refused(ValueError):
  """The file does what plain data do not; the message completes a sentence about the file."""


class Stateful:
  """An object whose state arrives after it was made."""

  def set_state(self, state: Any) -> None:
    """Sets what the object holds."""
    raise NotImplementedError


class Machine:
  """Interprets pickles, with a stack, marks in it, and a memory of earlier values.

  Strings of Python 2, which may be bytes, are text whose characters have the numbers of the bytes.

  Args:
    names: what each name that a program may use stands for.
    file_size: the size of the file in bytes, which bounds the size of the result.
    read_storage: returns the elements that tensors are views of.
    byteorder: the byte order of the storages, '<' or '>'.
  """

  def __init__(
    self,
    names: Mapping[str, Any],
    file_size: int,
    read_storage: StorageReader | None = None,
    byteorder: str = '<',
  ):
    self._names = names
    self._file_size = file_size
    self._read_storage = read_storage or _no_storage
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
        raise Refused(f'has more than {_MOST_INSTRUCTIONS} instructions, which no data need')
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
        case 'BINUNICODE' | 'SHORT_BINUNICODE' | 'BINSTRING' | 'SHORT_BINSTRING':
          push(argument)
        case 'BINBYTES' | 'SHORT_BINBYTES':
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
          of_type(list, stack[-1]).extend(items)
        case 'EMPTY_DICT':
          push({})
        case 'SETITEM' | 'SETITEMS':
          items = pop_from(-2 if opcode.name == 'SETITEM' else marks.pop())
          keys = map(checked_key, items[::2])
          of_type(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
        case 'GLOBAL':
          push(self._named(argument.replace(' ', '.')))
        case 'STACK_GLOBAL':
          name = pop()
          push(self._named(f'{of_type(str, pop())}.{of_type(str, name)}'))
        case 'BINPERSID':
          push(self._storage(pop()))
        case 'REDUCE':
          arguments = of_type(tuple, pop())
          push(_called(pop(), arguments))
        case 'BUILD':
          state = pop()
          if isinstance(stack[-1], Stateful):  # attributes of a dictionary are ignored
            stack[-1].set_state(state)
        case 'STOP':
          return self._checked_size(pop())
        case _:
          raise Refused(f'has the instruction {opcode.name}, which plain data do not need')

  def _named(self, name: str) -> Any:
    if name not in self._names:
      shown = (name if name.isprintable() else ascii(name))[:100]
      raise Refused(
        f'names the Python object {shown}, which such a file does not need and which may be harmful'
      )
    return self._names[name]

  def _storage(self, reference: object) -> np.ndarray:
    """The storage that ('storage', type, key, device, number of elements, None) refers to."""
    kind, dtype, key, _, size, *view = of_type(tuple, reference)[:7]
    if kind != 'storage' or view not in ([], [None]):
      raise ValueError('a reference to something other than a storage')
    dtype = of_type(np.dtype, dtype).newbyteorder(self._byteorder)
    return self._read_storage(dtype, of_type(str, key), of_type(int, size))

  def _checked_size(self, result: Any) -> Any:
    """The result, after a check that it is a tree: a small cyclic graph would never end."""
    items_left, bytes_left = _MOST_INSTRUCTIONS, _MOST_COPIES * self._file_size

    def visit(item: Any, depth: int) -> None:
      nonlocal items_left, bytes_left
      items_left -= 1
      bytes_left -= item.nbytes if isinstance(item, np.ndarray) else 0
      if depth > DEEPEST or items_left < 0:
        raise Refused('has lists or dictionaries nested in each other, as no data have them')
      if bytes_left < 0:
        raise Refused(f'has arrays that together are over {_MOST_COPIES} times as large as it is')
      inner = item.values() if isinstance(item, dict) else item
      for x in inner if isinstance(item, dict | list | tuple) else ():
        visit(x, depth + 1)

    visit(result, 0)
    return result


def of_type(kind: type, value: Any) -> Any:
  """The value, if it is of this type; otherwise a `ValueError`."""
  if not isinstance(value, kind):
    raise ValueError(f'{type(value).__name__} where {kind.__name__} must be')
  return value


def _checked_number(number: int) -> int:
  if not -(2**127) <= number < 2**127:  # torch's magic number has 80 bits
    raise Refused('has a number of more than 128 bits')
  return number


def checked_key(key: Any) -> str | int:
  """A key of a dictionary: hashing nested tuples or many large numbers could take forever."""
  if not isinstance(key, str) and not (isinstance(key, int) and 0 <= key < 2**60):
    raise Refused('has a dictionary with a key that is neither a name nor a small number')
  return key


def _called(function: Any, arguments: tuple) -> Any:
  """Calls what a name stands for: a program has no way to make any other callable object."""
  if len(arguments) > 8:
    raise ValueError('a call with too many arguments')
  return function(*arguments)


def _no_storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
  raise ValueError('a reference to something outside the pickle')
