"""Reading .npz files that others made: what they claim is checked before memory is given for it."""

import math
import pathlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

_DEFLATE = 1032  # how many times smaller deflate makes a file at most
_NPY_HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}

# What zipfile, zlib and NumPy raise for a damaged .npz file, or one that is something else.
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
) -> dict[str, np.ndarray]:
  """Some of the arrays of a file; what else it has is not looked at.

  Args:
    path: of the file.
    wanted: chooses among the names of its arrays; raises ValueError if they are not the right ones.

  Raises:
    ValueError, or another of `UNREADABLE`: if the file is damaged or something else.
  """
  with zipfile.ZipFile(path) as archive:
    names = wanted([name[:-4] for name in archive.namelist() if name.endswith('.npy')])
    longest = _DEFLATE * path.stat().st_size
    return {name: _load_array(archive, name, longest) for name in names}


def _load_array(archive: zipfile.ZipFile, name: str, longest: int) -> np.ndarray:
  """One array; its length is checked first, or a header could ask for any amount of memory."""
  entry = archive.getinfo(f'{name}.npy')
  with archive.open(entry) as file:
    read_header = _NPY_HEADERS.get(np.lib.format.read_magic(file))
    if read_header is None:
      raise ValueError(f'{name} is of a newer format than that of numeric arrays')
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
      raise ValueError(f'{name} holds Python objects')
    length = file.tell() + dtype.itemsize * math.prod(shape)
    if length != entry.file_size or length > longest:
      raise ValueError(f'{name} is shorter or longer than its shape {shape} says')
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
