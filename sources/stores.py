"""Where encoded pictures are kept: folders, ZIP files and others, each a `Store`.

Register your own to read pictures from elsewhere: `data.path` then finds it.
"""

import abc
import collections
import dataclasses
import hashlib
import json
import mimetypes
import os
import pathlib
import stat
import struct
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import UInt8

from runtime.errors import UserError
from runtime.files import ZIP_METHODS
from runtime.registry import Registry
from sources import pictures
from sources.base import BadPicture

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.gif')
# Names of the folder of test pictures beside `train`, in the order of preference.
TEST_FOLDERS = ('test', 'val', 'valid', 'validation', 'dev')
MAX_BYTES = 2**28  # of an encoded picture; a small archive can claim to hold any amount
LABELS = 'dataset.json'  # the labels in archives that the tools of StyleGAN and EDM make

STORES = Registry('store of pictures')
register_store = STORES.register
STORES.locate('sources.parquet', 'a Parquet or Arrow file or a folder of them')
STORES.locate('sources.npz', 'a NumPy .npz file')

_OF_MACOS = '__MACOSX'  # a folder of metadata that macOS adds to archives


class File(NamedTuple):
  """An encoded picture.

  Attributes:
    name: its path relative to the store, with forward slashes.
    size: in bytes.
    version: differs when the content does, as far as that is known without reading it: the time of
      the last change, or a checksum.
    fault: why the file is not used; empty if it is used.
    label: the number of its class; None if the store does not say.
  """

  name: str
  size: int = 0
  version: int = 0
  fault: str = ''
  label: int | None = None


class Store(abc.ABC):
  """Encoded pictures by name. Several threads read at once.

  Attributes:
    class_names: the names of the labels 0, 1, ...; empty if the store does not say.
    portable: whether another process can open a pickled copy.
  """

  class_names: Sequence[str] = ()
  portable: ClassVar[bool] = False

  @classmethod
  @abc.abstractmethod
  def recognises(cls, path: pathlib.Path) -> bool:
    """Whether this store reads what is at `path`."""

  @abc.abstractmethod
  def files(self) -> list[File]:
    """All pictures, and what looks like one but has a fault, by name in code-point order.

    Raises:
      UserError: if the store cannot be read; the message completes a sentence about it.
    """

  @abc.abstractmethod
  def read(self, file: File) -> bytes:
    """The bytes of a file.

    Raises:
      BadPicture: if they cannot be read.
    """


def open_store(path: str | os.PathLike[str]) -> Store:
  """The store at `path`, by the first registered class that recognises it.

  Raises:
    UserError: if there is nothing at `path`, or no store recognises it.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise UserError('it does not exist: give a folder or file of pictures.')
  for name in STORES.names():
    if (store := STORES.get(name)).recognises(path):
      return store(path)
  raise UserError(f'no reader knows it: give one of {", ".join(STORES.names())}.')


def read_labels(store: Store) -> dict[str, Any] | None:
  """The labels by name in a `dataset.json`; empty if it has none; None if it is of another kind.

  Raises:
    UserError: if it cannot be read or is not JSON.
  """
  try:
    about = json.loads(store.read(File(LABELS)))
    if not isinstance(about, dict) or 'labels' not in about:
      return None
    labels = dict(about['labels'] or ())
  except (ValueError, TypeError, RecursionError) as error:  # a BadPicture is a ValueError
    raise UserError(f'its {LABELS} is damaged ({error}): copy it again or remove it.') from error
  if others := [name for name, label in labels.items() if _class_number(label) is None]:
    logging.warning(
      '%s gives %r the label %.60r, which is not a whole number from 0: %d of its %d pictures '
      'have no class.',
      LABELS,
      others[0],
      labels[others[0]],
      len(others),
      len(labels),
    )
  return labels


def label_of(name: str, labels: dict[str, Any] | None) -> int | None:
  """The label of a file by what `read_labels` returns.

  A `dataset.json` without labels says that there are no classes: all pictures are of class 0.
  """
  if labels is None:
    return None
  return _class_number(labels.get(name)) if labels else 0


def _class_number(label: Any) -> int | None:
  """A label as a class; None if it is not a whole number from 0, of whichever type."""
  whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
  return int(label) if whole and label >= 0 else None


def fault_of(name: str) -> str | None:
  """Why a file of this name is not used; empty if it is used; None if it is not a picture."""
  base = name.rpartition('/')[2]
  suffix = os.path.splitext(base)[1].lower()
  if suffix not in SUFFIXES and not (mimetypes.guess_type(base)[0] or '').startswith('image/'):
    return None
  if base.startswith('.') or name.startswith(f'{_OF_MACOS}/'):
    return 'hidden file'
  return '' if suffix in SUFFIXES else f'unsupported format {suffix}'


@register_store(name='a folder')
@dataclasses.dataclass(frozen=True)
class FolderStore(Store):
  """The picture files below a folder.

  Links are followed. Each folder is read once, under its own name rather than that of a link.
  Broken links, hidden files, empty files and folders that cannot be read have a `fault`.

  Attributes:
    root: the folder.
  """

  root: pathlib.Path
  portable: ClassVar[bool] = True

  @classmethod
  def recognises(cls, path: pathlib.Path) -> bool:
    """Whether this is a folder."""
    return path.is_dir()

  def read(self, file: File) -> bytes:
    """The bytes of a file."""
    try:
      return (self.root / file.name).read_bytes()
    except OSError as error:
      raise BadPicture(error.strerror or type(error).__name__) from error

  def files(self) -> list[File]:
    """See `Store`."""
    labels = read_labels(self) if (self.root / LABELS).is_file() else None
    files, seen = [], set()
    pending = collections.deque([(os.fspath(self.root), '')])
    while pending:
      folder, prefix = pending.popleft()
      if (real := os.path.realpath(folder)) in seen:
        continue
      seen.add(real)
      try:
        with os.scandir(folder) as entries:
          entries = sorted(entries, key=lambda entry: entry.name)
      except OSError as error:
        if not prefix:
          raise UserError(f'{error.strerror}: give a folder of pictures.') from error
        files.append(File(prefix, fault=error.strerror or 'unreadable'))
        continue
      for entry in entries:
        name, fault = prefix + entry.name, _fault(entry)
        if fault:
          files.append(File(name, fault=fault))
        elif fault is not None and entry.is_dir():
          # Links wait until all real folders have been read.
          add = pending.append if entry.is_symlink() else pending.appendleft
          add((entry.path, name + '/'))
        elif fault is not None:
          status = entry.stat()
          label = label_of(name, labels)
          files.append(File(name, status.st_size, status.st_mtime_ns, label=label))
    return sorted(files, key=lambda file: file.name)


def _fault(entry: os.DirEntry) -> str | None:
  """Why a folder or picture is not used; empty if it is used; None if it is neither of them."""
  named = fault_of(entry.name)
  try:
    status = entry.stat()
  except OSError as error:
    if named is None and entry.name.startswith('.'):
      return None
    return 'broken link' if entry.is_symlink() else error.strerror
  if stat.S_ISDIR(status.st_mode):
    if entry.name.startswith('.') or entry.name == _OF_MACOS:
      return 'hidden folder'
    suffix = os.path.splitext(entry.name)[1].lower()
    return f'folder named {suffix}' if suffix in SUFFIXES else ''
  if named is None or named:
    return named
  if not stat.S_ISREG(status.st_mode):
    return 'not a regular file'
  return _fault_of_size(status.st_size)


def _fault_of_size(size: int) -> str:
  if size > MAX_BYTES:
    return f'more than {MAX_BYTES >> 20} MiB'
  return '' if size else 'empty file'


@register_store(name='a ZIP file')
class ZipStore(Store):
  """The pictures in a ZIP file; a single folder around all of them is left out of their names.

  Args:
    path: the file.
  """

  portable = True

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._local = threading.local()  # a file for each thread: they seek
    try:
      with zipfile.ZipFile(path) as archive:
        # Not `is_dir`, which fails where the name is empty.
        infos = [info for info in archive.infolist() if not info.filename.endswith('/')]
        members = {info.filename: info for info in infos}
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
      raise UserError(
        f'it is not a complete ZIP file ({error}): copy or download it again.'
      ) from error
    pictures = [name for name in members if fault_of(name) == '']
    prefix = '' if LABELS in members else _common_folder(pictures)
    self._members = {name.removeprefix(prefix): info for name, info in members.items()}

  def __reduce__(self) -> Any:
    return type(self), (self._path,)

  @classmethod
  def recognises(cls, path: pathlib.Path) -> bool:
    """Whether the name ends in .zip."""
    return path.suffix.lower() == '.zip'

  def files(self) -> list[File]:
    """See `Store`."""
    labels = None
    if LABELS in self._members:
      size, count = self._members[LABELS].file_size, len(self._members)
      if size > 2**20 + 2**10 * count:  # decoded, JSON takes many times its size
        raise UserError(
          f'its {LABELS} has {size:,} bytes, too many for {count:,} files: copy it again or remove '
          f'it.'
        )
      labels = read_labels(self)
    files = []
    for name, info in self._members.items():
      fault = fault_of(info.filename)
      if fault is not None:
        fault = fault or _fault_of_member(info)
        files.append(File(name, info.file_size, info.CRC, fault, label_of(name, labels)))
    return sorted(files, key=lambda file: file.name)

  def read(self, file: File) -> bytes:
    """The bytes of a file, which are checked against the checksum in the archive."""
    return self._content(self._members[file.name])

  def _content(self, info: zipfile.ZipInfo) -> bytes:
    """Reads a member, and never more than the size that the archive claims.

    `zipfile` would need a list of all members for each thread, or a lock.
    """
    if fault := _fault_of_member(info):
      raise BadPicture(fault)
    try:
      if not hasattr(self._local, 'file'):
        self._local.file = self._path.open('rb')
      file = self._local.file
      file.seek(info.header_offset)
      name_length, extra_length = struct.unpack('<26x2H', file.read(30))
      file.seek(name_length + extra_length, os.SEEK_CUR)
      content = file.read(info.compress_size)
      if info.compress_type == zipfile.ZIP_DEFLATED:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, info.file_size)
    except (OSError, ValueError, OverflowError, struct.error, zlib.error) as error:
      raise BadPicture(f'damaged in the archive: {error}') from error
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
      raise BadPicture('damaged in the archive: its checksum is another one')
    return content


def _fault_of_member(info: zipfile.ZipInfo) -> str:
  if info.flag_bits & 1:
    return 'encrypted'
  if info.compress_type not in ZIP_METHODS:
    return 'compressed by a method other than deflate'
  return _fault_of_size(max(info.file_size, info.compress_size) if info.file_size else 0)


def _common_folder(names: Sequence[str]) -> str:
  """The folder, with a slash, that all files are in; '' if there is none, or it is a split."""
  folders = {name.partition('/')[0] for name in names}
  if len(folders) != 1 or any('/' not in name for name in names):
    return ''
  folder = folders.pop()
  return '' if folder.lower() == 'train' else f'{folder}/'


@dataclasses.dataclass(frozen=True)
class PictureFiles:
  """Encoded pictures of one split, decoded when they are read; see `sources.base.Pictures`.

  Attributes:
    store: what holds them.
    files: the pictures.
    labels: the number of the class of each; empty for 0 throughout.
    num_channels: 1 or 3.
    background: the colour behind transparent pixels, a name or '#rrggbb'.
    class_names: names of the labels.
    skipped: name and reason of files that were left out.
  """

  store: Store
  files: Sequence[File]
  _: dataclasses.KW_ONLY
  num_channels: int
  labels: Sequence[int] = ()
  background: str = 'white'
  class_names: Sequence[str] = ()
  skipped: Sequence[tuple[str, str]] = ()

  @property
  def portable(self) -> bool:
    """Whether another process can read a pickled copy."""
    return self.store.portable

  @property
  def key(self) -> str:
    """SHA-256 of names, sizes and versions of the files, their labels and the background."""
    digest = hashlib.sha256(f'{self.background} {list(self.labels)}\n'.encode())
    for file in self.files:
      line = f'{unicodedata.normalize("NFC", file.name)}\0{file.size}\0{file.version}\n'
      digest.update(line.encode(errors='surrogateescape'))
    return digest.hexdigest()

  def __len__(self) -> int:
    """The number of pictures."""
    return len(self.files)

  def name(self, i: int) -> str:
    """The name of file number `i`."""
    return self.files[i].name

  def read(self, i: int) -> tuple[UInt8[np.ndarray, 'H W C'], int]:
    """Decodes picture number `i` by the rules of `sources.pictures`; returns it and its label."""
    content = self.store.read(self.files[i])
    pixels = pictures.decode(content, self.num_channels, self.background)
    return pixels, self.labels[i] if len(self.labels) else 0
