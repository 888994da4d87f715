"""Reads LMDB databases, whose own library trusts what it reads: a damaged file ends the process.

The file is a sequence of pages, http://www.lmdb.tech/doc. Each begins with

  number     uint64
  padding    uint16
  kind       uint16, see `_BRANCH` and the following
  lower      uint16, where the list of the positions of nodes ends, each uint16
  upper      uint16

The first two pages say where the tree of keys begins, and the later one of them counts. A node of
a branch has the number of a page, 48 bits, the length of a key, uint16, and the key. A node of a
leaf has the length of the value, uint32, flags, uint16, the length of the key, uint16, the key, and
the value or, where that is too long for a page, the number of the page that it begins on. Numbers
are little-endian, as on all machines that LSUN was made on.
"""

import mmap
import struct
from collections.abc import Iterator

_PAGE = struct.Struct('<10x2H2x')  # kind, lower
_META = struct.Struct('<2I16xI44x4xHH24xQQQQ')
_NODE = struct.Struct('<4H')
_NUMBER = struct.Struct('<Q')
_HEADER = _PAGE.size

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_LONG = 1  # the only flag of a node that a plain database has
_NONE = 2**64 - 1  # the number of the first page of an empty tree
_DEEPEST = 32


class DamagedDatabase(ValueError):
  """The file is not a database, or is damaged."""


class TruncatedDatabase(DamagedDatabase):
  """The file is shorter than it says; the message is how many bytes it needs."""


def entries(file: mmap.mmap) -> Iterator[tuple[bytes, int, int]]:
  """The keys in order, each with the position and the length of its value in the file.

  Every page is read once at most, so the time is bounded by the size of the file.

  Raises:
    DamagedDatabase: if anything lies outside the file or its page.
  """
  size, depth, root = _newest_meta(file)
  count = len(file) // size
  seen = bytearray(count)

  def page(number: int) -> int:
    if not 0 <= number < count:
      raise DamagedDatabase(f'a page {number}, of {count}')
    return number * size

  def walk(number: int, level: int) -> Iterator[tuple[bytes, int, int]]:
    start = page(number)
    if seen[number] or level > depth:
      raise DamagedDatabase('pages that are not a tree')
    seen[number] = True
    kind, lower = _PAGE.unpack_from(file, start)
    if kind not in (_BRANCH, _LEAF) or lower % 2 or not _HEADER <= lower <= size:
      raise DamagedDatabase(f'page {number} is of another kind')
    used = 0
    for (node,) in struct.iter_unpack('<H', file[start + _HEADER : start + lower]):
      if node + _NODE.size > size:
        raise DamagedDatabase(f'page {number} has a node outside of it')
      low, high, flags, key_length = _NODE.unpack_from(file, start + node)
      key, value = node + _NODE.size, node + _NODE.size + key_length
      if kind == _BRANCH:
        yield from walk(low | high << 16 | flags << 32, level + 1)
        continue
      length = low | high << 16
      inside = _NUMBER.size if flags & _LONG else length
      if flags not in (0, _LONG) or value + inside > size:
        raise DamagedDatabase(f'page {number} has a node that is not a value')
      used += _NODE.size + key_length + inside
      if used > size:
        raise DamagedDatabase(f'page {number} has nodes that overlap')
      position = start + value
      if flags & _LONG:
        position = page(_NUMBER.unpack_from(file, position)[0]) + _HEADER
        if _PAGE.unpack_from(file, position - _HEADER)[0] != _OVERFLOW:
          raise DamagedDatabase(f'page {number} has a node without its value')
      if position + length > len(file):
        raise DamagedDatabase(f'page {number} has a value that ends outside of the file')
      yield file[start + key : start + value], position, length

  if root != _NONE:
    yield from walk(root, 1)


def _newest_meta(file: mmap.mmap) -> tuple[int, int, int]:
  """The size of a page, the depth of the tree, and the number of its first page."""
  metas, size = [], 0
  while len(metas) < 2:
    if len(file) < len(metas) * size + _HEADER + _META.size:
      raise DamagedDatabase('it is too short')
    start = len(metas) * size + _HEADER
    magic, version, size, flags, depth, _, root, last, number = _META.unpack_from(file, start)
    if (magic, version, flags) != (_MAGIC, _VERSION, 0):
      raise DamagedDatabase('it is of another format')
    if size not in (2**i for i in range(9, 17)):
      raise DamagedDatabase(f'pages of {size} bytes')
    metas.append((number, last, size, depth, root))
  _, last, size, depth, root = max(metas)
  needed = (last + 1) * size
  if len(file) < needed:
    raise TruncatedDatabase(f'{needed:,}')
  if depth > _DEEPEST:
    raise DamagedDatabase(f'a tree of depth {depth}')
  return size, depth, root
