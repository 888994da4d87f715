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
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from runtime.errors import UserError
from runtime.registry import Registry
from sources import pictures
from sources.base import BadPicture

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.gif')

STORES = Registry('store of pictures')
register_store = STORES.register

STORES.locate('sources.npz', 'an NPZ file')
STORES.locate('sources.parquet', 'a parquet or arrow file')

MAX_BYTES = 2**30  # of one encoded picture: what claims more is refused unread


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
    class_names: the names of the labels of its files, if it knows them.
  """

  class_names: Sequence[str] = ()

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

  def decode(self, file: File, num_channels: int, background: str) -> UInt8[np.ndarray, 'H W C']:
    """The picture in a file, by the rules of `sources.pictures`.

    Raises:
      BadPicture: if it cannot be used.
    """
    return pictures.decode(self.read(file), num_channels, background)


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


def fault_of(name: str) -> str | None:
  """Why a file of this name is not used; empty if it is used; None if it is no picture."""
  base = name.rpartition('/')[2]
  suffix = os.path.splitext(base)[1].lower()
  if suffix not in SUFFIXES and not (mimetypes.guess_type(base)[0] or '').startswith('image/'):
    return None
  if base.startswith('.') or name.startswith('__MACOSX/'):
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
          files.append(File(name, status.st_size, status.st_mtime_ns))
    return sorted(files)


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
    if entry.name.startswith('.'):
      return 'hidden folder'
    suffix = os.path.splitext(entry.name)[1].lower()
    return f'folder named {suffix}' if suffix in SUFFIXES else ''
  if named is None or named:
    return named
  if not stat.S_ISREG(status.st_mode):
    return 'not a regular file'
  return '' if status.st_size else 'empty file'


_UNREADABLE = (
  OSError,
  EOFError,
  NotImplementedError,  # an unknown kind of compression
  RuntimeError,  # encrypted
  ValueError,
  zipfile.BadZipFile,
  zlib.error,
)


@register_store(name='a ZIP file')
class ZipStore(Store):
  """The pictures in a ZIP file; a single folder around all of them is left out of their names.

  Args:
    path: the file.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._open = threading.local()  # a ZipFile for each thread: they seek
    try:
      with zipfile.ZipFile(path) as archive:
        self._members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    except (OSError, zipfile.BadZipFile, ValueError, EOFError) as error:
      raise UserError(
        f'it is no complete ZIP file ({error}): copy or download it again.'
      ) from error
    self._prefix = _common_folder([name for name in self._members if fault_of(name) == ''])

  @classmethod
  def recognises(cls, path: pathlib.Path) -> bool:
    """Whether the name ends in .zip."""
    return path.suffix.lower() == '.zip'

  def files(self) -> list[File]:
    """See `Store`; `dataset.json`, as the tools of StyleGAN and EDM write it, gives the labels."""
    labels, files = self._labels(), []
    for name, info in self._members.items():
      fault = fault_of(name)
      if fault is not None:
        short = name.removeprefix(self._prefix)
        fault = fault or _fault_of_member(info)
        files.append(File(short, info.file_size, info.CRC, fault, labels.get(short)))
    return sorted(files, key=lambda file: file.name)

  def _labels(self) -> dict[str, int]:
    """Labels by the names of files in `dataset.json`; {} if there are none."""
    name = f'{self._prefix}dataset.json'
    if name not in self._members:
      return {}
    try:
      content = json.loads(self.read(File('dataset.json')))
      return {str(file): int(label) for file, label in content.get('labels') or []}
    except (BadPicture, ValueError, TypeError, AttributeError, RecursionError) as error:
      raise UserError(
        f"its dataset.json is not of the form {{'labels': [['name.png', 3], ...]}} ({error}): mend "
        f'or remove it.'
      ) from error

  def read(self, file: File) -> bytes:
    """The bytes of a file, which are checked against the checksum in the archive."""
    if not hasattr(self._open, 'archive'):
      self._open.archive = zipfile.ZipFile(self._path)
    try:
      return self._open.archive.read(self._members[self._prefix + file.name])
    except (
      OSError,
      zipfile.BadZipFile,
      zlib.error,
      EOFError,
      NotImplementedError,
      RuntimeError,
    ) as error:
      raise BadPicture(f'damaged in the archive: {error}') from error


def _fault_of_member(info: zipfile.ZipInfo) -> str:
  if info.flag_bits & 1:
    return 'encrypted'
  if info.file_size > MAX_BYTES:
    return f'more than {MAX_BYTES:,} bytes'
  return '' if info.file_size else 'empty file'


def _common_folder(names: Sequence[str]) -> str:
  """The folder, with a slash, that all files are in; '' if there is none, or it is a split."""
  folders = {name.partition('/')[0] for name in names if '/' in name}
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
    pixels = self.store.decode(self.files[i], self.num_channels, self.background)
    return pixels, self.labels[i] if len(self.labels) else 0
