"""Pictures in Parquet and Arrow files, as Hugging Face Datasets stores them.

The column of pictures is binary, or a struct with a binary field `bytes`. One named `image` or
`img` is taken, or otherwise the only column of such a type. A column of whole numbers named as in
`LABELS` gives the labels.
"""

import abc
import json
import os
import pathlib
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.errors import UserError
from sources.base import BadPicture
from sources.stores import TEST_FOLDERS, File, Store, fault_of, register_store

SUFFIXES = ('.parquet', '.arrow')
IMAGES = ('image', 'img')
LABELS = ('label', 'labels', 'class', 'fine_label', 'coarse_label', 'target')
SPLITS = ('train', *TEST_FOLDERS)

_BATCH = 32  # rows that are read at once


@register_store(name='a Parquet or Arrow file or a folder of them')
class TableStore(Store):
  """The pictures in Parquet or Arrow files; the name of each is that of the file and its row.

  Files are named by their split as Hugging Face does, `train-00000-of-00002.parquet`, or lie in a
  folder of that name; their pictures then have names that begin with `train/`.

  Args:
    path: a file, or the folder that they are in.
  """

  portable = True

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._tables: list[_Table] = []
    self._rows: dict[str, tuple[_Table, int]] = {}
    paths = sorted(_table_files(path)) if path.is_dir() else [path]
    prefixes = [_prefix(file.relative_to(path)) for file in paths]
    for file in paths:
      table = _Parquet if file.suffix.lower() == '.parquet' else _Arrow
      try:
        self._tables.append(table(file))
      except UserError:
        raise
      except _damage() as error:
        raise UserError(
          f'its file {file.name} is damaged ({_first_line(error)}): copy or download it again.'
        ) from error
    for table, prefix in zip(self._tables, prefixes, strict=True):
      self._rows |= {f'{prefix}{row:08d}': (table, row) for row in range(len(table.labels))}
    self.class_names = self._tables[0].class_names

  def __reduce__(self) -> Any:
    return type(self), (self._path,)

  @classmethod
  def recognises(cls, path: pathlib.Path) -> bool:
    """Whether this is such a file, or a folder that has some and no picture files."""
    if not path.is_dir():
      return path.suffix.lower() in SUFFIXES
    return next(_table_files(path, stop_at_pictures=True), None) is not None

  def files(self) -> list[File]:
    """See `Store`."""
    versions = {table: table.path.stat().st_mtime_ns for table in self._tables}
    return [
      File(name, version=versions[table], label=table.labels[row])
      for name, (table, row) in sorted(self._rows.items(), key=lambda item: item[0])
    ]

  def read(self, file: File) -> bytes:
    """The bytes of a picture."""
    table, row = self._rows[file.name]
    try:
      content = table.read(row)
    except _damage() as error:
      raise BadPicture(f'damaged in {table.path.name}: {_first_line(error)}') from error
    if content is None:
      raise BadPicture('no bytes in its row')
    return content


def _table_files(folder: pathlib.Path, stop_at_pictures: bool = False) -> Iterator[pathlib.Path]:
  """The tables below a folder; none if there are pictures and `stop_at_pictures`."""
  found = []
  for parent, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith('.')]
    if stop_at_pictures and any(fault_of(name) == '' for name in names):
      return
    # Hugging Face Datasets keeps what it has computed from a data set in files cache-*.arrow.
    found += [
      pathlib.Path(parent, name)
      for name in names
      if name.lower().endswith(SUFFIXES) and not name.startswith(('.', 'cache-'))
    ]
  yield from found


def _prefix(path: pathlib.Path) -> str:
  """How the names of the pictures in a file begin; `path` is relative to the folder."""
  if not path.parts:  # the file itself was given
    return ''
  parts = path.with_suffix('').parts
  words = [parts[0], re.split(r'[-_.]', parts[-1])[0]]
  split = next((f'{word.lower()}/' for word in words if word.lower() in SPLITS), '')
  return f'{split}{"-".join(parts)}-'


def _damage() -> tuple[type[Exception], ...]:
  import pyarrow

  return pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError


def _first_line(error: Exception) -> str:
  return str(error).partition('\n')[0].rstrip('.')


class _Table(abc.ABC):
  """The rows of one file.

  Attributes:
    path: the file.
    labels: of each row; None where there is none.
    class_names: of the labels; empty if the file does not say.
  """

  path: pathlib.Path
  labels: Sequence[int | None]
  class_names: Sequence[str]

  @abc.abstractmethod
  def read(self, row: int) -> bytes | None:
    """The picture in a row; None if there is none."""


class _Arrow(_Table):
  """An Arrow file or stream, mapped into memory."""

  def __init__(self, path: pathlib.Path):
    import pyarrow

    self.path = path
    mapped = pyarrow.memory_map(os.fspath(path))
    try:
      reader = pyarrow.ipc.open_file(mapped)
    except pyarrow.ArrowInvalid:
      reader = pyarrow.ipc.open_stream(mapped)
    table = reader.read_all()
    images, label, self.class_names = _columns(table.schema, path.name)
    for column in filter(None, (images, label)):
      table[column].validate(full=True)  # with a wrong offset, memory of others would be read
    self._images = table[images]
    self.labels = _labels(table[label].to_pylist() if label else [None] * len(table))

  def read(self, row: int) -> bytes | None:
    """See `_Table`."""
    return _bytes(self._images[row])


class _Parquet(_Table):
  """A Parquet file, of which each thread reads on from where it is.

  Only in order is this fast: to go back is to read the group of rows from its beginning.
  """

  def __init__(self, path: pathlib.Path):
    import numpy as np
    from pyarrow import parquet

    self.path = path
    self._local = threading.local()
    with parquet.ParquetFile(path) as file:
      self._metadata = file.metadata
      count = file.metadata.num_rows
      groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
      # Arrow makes room for as many as are claimed.
      if min([0, *groups]) < 0 or sum(groups) != count or count > path.stat().st_size:
        raise ValueError(f'it has {count} rows, in groups of {groups[:3]}')
      images, label, self.class_names = _columns(file.schema_arrow, path.name)
      labels = file.read([label])[label].to_pylist() if label else [None] * count
    self._column = images
    self.labels = _labels(labels)
    self._ends = np.cumsum(groups)

  def read(self, row: int) -> bytes | None:
    """See `_Table`."""
    group = int(self._ends.searchsorted(row, side='right'))
    # Not kept if reading fails, which ends its batches.
    last, start, rows, batches = vars(self._local).pop('reader', (None, 0, (), None))
    if last != group or row < start:
      start, rows, batches = (int(self._ends[group - 1]) if group else 0), (), self._batches(group)
    while row >= start + len(rows):
      start, rows = start + len(rows), next(batches, ())
      if not len(rows):
        raise ValueError('it has fewer rows than it says')
    self._local.reader = group, start, rows, batches
    return _bytes(rows[row - start])

  def _batches(self, group: int) -> Iterator[Any]:
    """The pictures of a group of rows, some at a time."""
    from pyarrow import parquet

    with parquet.ParquetFile(self.path, memory_map=True, metadata=self._metadata) as file:
      for batch in file.iter_batches(_BATCH, [group], [self._column], use_threads=False):
        yield batch.column(0)


def _bytes(value: Any) -> bytes | None:
  """The bytes of a value of a column of pictures, binary or a struct."""
  found = value.as_py()
  return found.get('bytes') if isinstance(found, dict) else found


def _labels(values: list[int | None]) -> list[int | None]:
  """The labels, without negative ones, with which Hugging Face fills test splits."""
  return [None if value is None or value < 0 else value for value in values]


def _columns(schema: Any, file: str) -> tuple[str, str | None, list[str]]:
  """The names of the column of pictures, of that of labels, if there is one, and of the classes."""
  from pyarrow import types

  def is_bytes(kind: Any) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind)

  def is_picture(kind: Any) -> bool:
    if not types.is_struct(kind):
      return is_bytes(kind)
    return any(field.name == 'bytes' and is_bytes(field.type) for field in kind)

  fitting = [field.name for field in schema if is_picture(field.type)]
  images = next((name for name in IMAGES if name in fitting), None)
  if images is None and len(fitting) != 1:
    raise UserError(
      f'its file {file} has {len(fitting)} columns of pictures, of the columns '
      f"{', '.join(schema.names)}: name the one with the encoded pictures 'image'."
    )
  numbers = {field.name for field in schema if types.is_integer(field.type)}
  label = next((name for name in LABELS if name in numbers), None)
  return images or fitting[0], label, _class_names(schema, label)


def _class_names(schema: Any, label: str | None) -> list[str]:
  """The names of the classes in the metadata of Hugging Face."""
  try:
    about = json.loads((schema.metadata or {})[b'huggingface'])
    return [str(name) for name in about['info']['features'][label]['names']]
  except (ValueError, TypeError, LookupError, RecursionError):
    return []
