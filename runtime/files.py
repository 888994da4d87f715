"""Files that are complete or absent. It imports little, so that worker processes start quickly."""

import contextlib
import functools
import glob
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, BinaryIO

from absl import logging

try:
  import fcntl
except ImportError:  # Windows, where two processes in one folder go unnoticed
  fcntl = None

REPOSITORY = pathlib.Path(__file__).parent.parent


def locate(path: str | pathlib.Path) -> pathlib.Path:
  """A path as given, with `~` expanded; or in the repository, if it exists only there.

  So `assets/...` in a configuration names the same file whatever the working directory.
  """
  given = pathlib.Path(path).expanduser()
  inside = REPOSITORY / given
  return inside if inside.exists() and not given.exists() else given


def lock(file: IO, *, wait: bool = False) -> bool:
  """Locks an open file; the system unlocks it when it is closed or the process ends, however.

  Where the file system has no locks, a warning says so.

  Args:
    file: the file.
    wait: whether to wait until no other process has locked it.

  Returns:
    False if another process has locked it, else True.
  """
  try:
    return _flock(file.fileno(), wait=wait)
  except OSError as error:
    folder = os.path.dirname(file.name)
    logging.warning('%s cannot be locked (%s): let only one run use it.', folder, error.strerror)
  return True


def _flock(descriptor: int, *, wait: bool = False) -> bool:
  if fcntl is None:
    return True
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    return False
  return True


# Methods of ZIP members whose output can be read a bounded part at a time.
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@contextlib.contextmanager
def open_atomic(path: pathlib.Path, *, sync: bool = True) -> Iterator[BinaryIO]:
  """Opens a file for writing that is complete or absent, even if the process is killed meanwhile.

  Partial files of the same name, of processes that were killed, are removed first.

  Args:
    path: the file, whose folder is created if absent.
    sync: whether to wait until the file is on the disk, where the machine may fail, too.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  prefix, temporary = f'.{path.name[-60:]}-', None  # names have at most 255 bytes
  _remove_partial(path.parent, prefix)
  try:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    with _locked(descriptor):
      with os.fdopen(descriptor, 'wb') as file:
        yield file
        file.flush()
        if sync:
          os.fsync(file.fileno())
      os.chmod(temporary, 0o644)
      os.replace(temporary, path)
  except BaseException as error:
    if prefix in str(getattr(error, 'filename', None)):
      error.filename = os.fspath(path)  # the name that the user knows
    if temporary:
      with contextlib.suppress(OSError):  # a signal may come when it has its name
        os.unlink(temporary)
    raise


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
  """Locks an open file, also after it is closed, so that it is seen to be in use."""
  if fcntl is None:
    yield
    return
  other = os.dup(descriptor)
  try:
    with contextlib.suppress(OSError):  # without locks, nobody removes it
      _flock(other)
    yield
  finally:
    os.close(other)


def _remove_partial(folder: pathlib.Path, prefix: str) -> None:
  for path in folder.glob(f'{glob.escape(prefix)}????????') if fcntl else ():
    with contextlib.suppress(OSError), path.open('r+b') as file:
      temporary = os.fstat(file.fileno()).st_mode & 0o777 == 0o600  # as `mkstemp` makes them
      if temporary and _flock(file.fileno()):
        path.unlink()


def write_atomic(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that it is complete or absent, even if the process is killed meanwhile."""
  with open_atomic(path) as file:
    file.write(data)


def program_checksum() -> int:
  """The CRC-32 of the modules that make up this program."""
  rooms = [folder for folder in REPOSITORY.iterdir() if (folder / '__init__.py').exists()]
  modules = sorted(path for folder in [REPOSITORY, *rooms] for path in folder.glob('*.py'))
  return functools.reduce(lambda so_far, path: zlib.crc32(path.read_bytes(), so_far), modules, 0)
