"""Reads third-party .npz files, and checks the sizes that they claim before it allocates memory."""

import math
import pathlib
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped

from runtime.files import ZIP_METHODS

_DEFLATE = 1032  # the largest compression ratio of deflate
# By version: the type of the length of the header, and NumPy's reader. The header is an expression
# in Python, and parsing a strange one can take minutes: only what NumPy writes is let through.
_NPY_HEADERS = {
  (1, 0): ('<H', np.lib.format.read_array_header_1_0),
  (2, 0): ('<I', np.lib.format.read_array_header_2_0),
}
_LONGEST_HEADER = 10_000
_NUMBER = rb'(?:0|[1-9][0-9]{0,18})L?'
_NPY_HEADER = re.compile(
  rb"\{'descr': '[<>|=]?[A-Za-z?][0-9]{0,9}', 'fortran_order': (?:True|False), "
  rb"'shape': \((?:" + _NUMBER + rb', ?)*(?:' + _NUMBER + rb')?\),? ?\} *\n?'
)

# What zipfile, zlib and NumPy raise for a file that is damaged or not an .npz file.
UNREADABLE = (
  OSError,
  ValueError,
  EOFError,
  KeyError,
  RuntimeError,
  struct.error,
  tokenize.TokenError,
  zlib.error,
  zipfile.BadZipFile,
)


def load_arrays(
  path: pathlib.Path, wanted: Callable[[list[str]], list[str]]
) -> dict[str, Shaped[np.ndarray, '...']]:
  """Reads the chosen arrays of a file and ignores its other content.

  Args:
    path: the file.
    wanted: takes the names of all arrays in the file and returns those to read; it raises
      ValueError if the names are not the expected ones.

  Raises:
    ValueError, or another of `UNREADABLE`: if the file is damaged or not an .npz file.
  """
  with zipfile.ZipFile(path) as archive:
    names = wanted([name[:-4] for name in archive.namelist() if name.endswith('.npy')])
    longest = _DEFLATE * path.stat().st_size
    return {name: _load_array(archive, name, longest) for name in names}


def is_whole(path: pathlib.Path, name: str) -> bool:
  """Whether a file of ours exists, is intact and has an array of this name."""
  try:
    with zipfile.ZipFile(path) as archive:
      return f'{name}.npy' in archive.namelist() and archive.testzip() is None
  except UNREADABLE:
    return False


def _load_array(archive: zipfile.ZipFile, name: str, longest: int) -> np.ndarray:
  """Reads one array, after a check of its length: a header can ask for any amount of memory."""
  entry = archive.getinfo(f'{name}.npy')
  if entry.compress_type not in ZIP_METHODS:
    raise ValueError(f'{name} is compressed by another method than those of NumPy')
  with archive.open(entry) as file:
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
      raise ValueError(f'{name} has a newer .npy format than numeric arrays need')
    form, read_header = _NPY_HEADERS[version]
    start = file.tell()
    (header_length,) = struct.unpack(form, file.read(struct.calcsize(form)))
    header = file.read(min(header_length, _LONGEST_HEADER))
    if not _NPY_HEADER.fullmatch(header):
      raise ValueError(f'{name} is not an array of one type, as NumPy writes it')
    file.seek(start)
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
      raise ValueError(f'{name} holds Python objects')
    length = file.tell() + dtype.itemsize * math.prod(shape)
    if length != entry.file_size or length > longest:
      raise ValueError(f'{name} is shorter or longer than its shape {shape} says')
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
