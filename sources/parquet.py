"""Parquet and Arrow files as stores of pictures, such as Hugging Face's datasets.

pyarrow is imported when a file is opened.
"""

import json
import pathlib
import threading
from typing import Any

from runtime.errors import UserError
from sources.base import BadPicture
from sources.stores import SUFFIXES, File, Store, register_store

_SUFFIXES = ('.parquet', '.arrow')
_IMAGE_NAMES = ('image', 'img', 'picture', 'photo', 'jpg', 'png', 'webp')
_LABEL_NAMES = ('label', 'labels', 'class', 'fine_label', 'cls')
_SPLITS = ('train', 'test', 'val', 'valid', 'validation', 'dev')


@register_store(name='a parquet or arrow file')
class ParquetStore(Store):
  """The pictures in a column of one file or of the files in a folder.

  The column holds encoded pictures, as bytes or as a struct with the field `bytes`. A column of
  whole numbers may hold labels, whose names are read from the metadata of Hugging Face. The name of
  a picture is that of its file with the number of the row; files whose names begin with a split,
  such as `train-00000-of-00002.parquet`, are in its folder.

  Args:
    path: of the file or folder.
  """

  def __init__(self, path: pathlib.Path):
    paths = sorted(_files_in(path)) if path.is_dir() else [path]
    self._parts = {part.prefix: part for part in (_Part(path, file) for file in paths)}
    names = [tuple(part.class_names) for part in self._parts.values()]
    self.class_names = names[0] if len(set(names)) == 1 else ()

  @classmethod
  def recognises(cls, path: pathlib.Path) -> bool:
    """Whether this is such a file, or a folder that holds such files and no pictures."""
    if not path.is_dir():
      return path.suffix.lower() in _SUFFIXES
    pictures = any(file.suffix.lower() in SUFFIXES for file in path.rglob('*'))
    return bool(_files_in(path)) and not pictures

  def files(self) -> list[File]:
    """See `Store`."""
    return [file for part in self._parts.values() for file in part.files()]

  def read(self, file: File) -> bytes:
    """The bytes in one row."""
    prefix, _, row = file.name.rpartition('#')
    return self._parts[prefix].read(int(row))


def _files_in(folder: pathlib.Path) -> list[pathlib.Path]:
  return [file for file in folder.rglob('*') if file.suffix.lower() in _SUFFIXES]


class _Part:
  """One file.

  Args:
    root: the path that was given.
    path: of the file.
  """

  def __init__(self, root: pathlib.Path, path: pathlib.Path):
    import pyarrow

    self._path = path
    stem = path.stem if path == root else path.relative_to(root).with_suffix('').as_posix()
    split = next((s for s in _SPLITS if path.stem.lower().split('-')[0] == s), '')
    self.prefix = f'{split}/{stem}' if split else stem
    try:
      self._open()
    except (OSError, pyarrow.ArrowException) as error:
      reason = str(error).splitlines()[0]
      raise UserError(
        f'{path.name} cannot be read as {path.suffix[1:].lower()} ({reason}): copy or download it '
        f'again.'
      ) from error
    self._image = self._find_column(
      lambda kind: _is_bytes(kind) or (_is_struct(kind) and _has_bytes(kind)), _IMAGE_NAMES
    )
    if self._image is None:
      raise UserError(
        f'{path.name} has the columns {", ".join(self._schema.names)}, none of which holds '
        f"pictures: store their bytes in a column 'image'."
      )
    self._label = self._find_column(pyarrow.types.is_integer, _LABEL_NAMES, only_named=True)
    self.class_names = self._names_of_labels()
    self._recent = threading.local()

  def _open(self) -> None:
    """Opens the file, without reading its pictures."""
    import pyarrow
    import pyarrow.parquet

    if self._path.suffix.lower() == '.parquet':
      self._parquet = pyarrow.parquet.ParquetFile(self._path, memory_map=True)
      self._schema = self._parquet.schema_arrow
      groups = range(self._parquet.num_row_groups)
      counts = [self._parquet.metadata.row_group(group).num_rows for group in groups]
      self._starts = [sum(counts[:group]) for group in range(len(counts) + 1)]
      return
    self._parquet = None
    mapped = pyarrow.memory_map(str(self._path))
    try:
      self._table = pyarrow.ipc.open_file(mapped).read_all()
    except pyarrow.ArrowInvalid:
      mapped.seek(0)
      self._table = pyarrow.ipc.open_stream(mapped).read_all()
    self._schema = self._table.schema

  def _find_column(self, fits: Any, names: tuple[str, ...], only_named: bool = False) -> str | None:
    """The column of fitting type: the first of these names, or else the only one."""
    fitting = {field.name for field in self._schema if fits(field.type)}
    for name in names:
      if name in fitting:
        return name
    return fitting.pop() if len(fitting) == 1 and not only_named else None

  def _names_of_labels(self) -> list[str]:
    metadata = (self._schema.metadata or {}).get(b'huggingface')
    try:
      return list(json.loads(metadata)['info']['features'][self._label]['names'])
    except (TypeError, KeyError, ValueError):
      return []

  def files(self) -> list[File]:
    """One for each row."""
    status = self._path.stat()
    if self._label is None:
      labels = [None] * (self._starts[-1] if self._parquet else self._table.num_rows)
    elif self._parquet:
      labels = self._parquet.read(columns=[self._label])[self._label].to_pylist()
    else:
      labels = self._table[self._label].to_pylist()
    return [
      File(f'{self.prefix}#{row:08d}', status.st_size, status.st_mtime_ns, label=label)
      for row, label in enumerate(labels)
    ]

  def read(self, row: int) -> bytes:
    """The bytes in a row."""
    import pyarrow

    try:
      value = self._column(row).as_py()
    except (OSError, pyarrow.ArrowException) as error:
      raise BadPicture(f'unreadable row ({str(error).splitlines()[0]})') from error
    content = value.get('bytes') if isinstance(value, dict) else value
    if content is None:
      raise BadPicture('no bytes in this row')
    return content

  def _column(self, row: int) -> Any:
    if not self._parquet:
      return self._table[self._image][row]
    group = max(g for g, start in enumerate(self._starts[:-1]) if start <= row)
    # Pictures are read in order: each thread keeps the group of rows that it read last.
    if getattr(self._recent, 'group', None) != group:
      self._recent.column = self._parquet.read_row_group(group, [self._image])[self._image]
      self._recent.group = group
    return self._recent.column[row - self._starts[group]]


def _is_bytes(kind: Any) -> bool:
  from pyarrow import types

  return types.is_binary(kind) or types.is_large_binary(kind)


def _is_struct(kind: Any) -> bool:
  from pyarrow import types

  return types.is_struct(kind)


def _has_bytes(kind: Any) -> bool:
  index = kind.get_field_index('bytes')
  return index >= 0 and _is_bytes(kind.field(index).type)
