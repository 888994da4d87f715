"""Files that are complete or absent. It imports little, so that worker processes start quickly."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def open_atomic(path: pathlib.Path, *, sync: bool = True) -> Iterator[BinaryIO]:
  """Opens a file for writing that is complete or absent, even if the process is killed meanwhile.

  Args:
    path: the file, whose folder is created if absent.
    sync: whether to wait until the file is on the disk, where the machine may fail, too.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}-')
  try:
    with os.fdopen(descriptor, 'wb') as file:
      yield file
      file.flush()
      if sync:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def write_atomic(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that it is complete or absent, even if the process is killed meanwhile."""
  with open_atomic(path) as file:
    file.write(data)
