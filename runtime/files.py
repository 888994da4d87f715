"""Files that are complete or absent. It imports little, so that worker processes start quickly."""

import os
import pathlib
import tempfile


def write_atomic(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that it is complete or absent, even if the process is killed meanwhile."""
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}-')
  try:
    with os.fdopen(descriptor, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise
