"""One category of LSUN, https://www.yf.io/p/lsun: an LMDB database of WebP pictures."""

import calendar
import errno
import lzma
import mmap
import os
import pathlib
import re
import shutil
import zipfile
import zlib

from ml_collections import ConfigDict

from runtime import reporting
from runtime.errors import UserError
from runtime.files import ZIP_METHODS
from sources import cache, lmdb_file, published
from sources.base import BadPicture, Pictures, register_dataset
from sources.framing import Framing
from sources.stores import MAX_BYTES, File, FolderStore, PictureFiles, Store

# Published numbers are of the validation pictures: LSUN keeps its test pictures' categories secret.
_SPLITS = {'train': 'train', 'test': 'val'}
_BLOCK = 2**24  # bytes that are copied at a time
# What zipfile raises for a damaged archive, besides the OSError of a place before its beginning.
_DAMAGE = (
  zipfile.BadZipFile,
  zlib.error,
  lzma.LZMAError,
  EOFError,
  NotImplementedError,
  RuntimeError,
  ValueError,
  OverflowError,
)


@register_dataset(name='LSUN')
def lsun(config: ConfigDict, split: str, *, category: str = '') -> cache.CachedPictures:
  """The central squares of one category of LSUN, such as 'bedroom' or 'church_outdoor'.

  The split 'test' is the validation split of LSUN, as in published numbers.

  `data.path` is the folder of `<category>_train_lmdb` and `<category>_val_lmdb`, which
  `--mode=prepare_data` downloads and extracts, or one of them, or a folder of pictures with the
  folders `train` and `val`.

  Raises:
    UserError: if `data.category` is no name of a category.
  """
  if not category:
    raise UserError(
      "data.category='' is empty, but data.dataset='LSUN' needs a data.category: set it to one "
      "such as 'bedroom' or 'church_outdoor'."
    )
  if not re.fullmatch('[A-Za-z0-9_-]+', category):  # it is part of the paths of files
    raise UserError(
      f'data.category={category!r} is no name of a category: set it to one such as '
      f"'bedroom' or 'church_outdoor'."
    )
  size = config.data.image_size
  # The paper's code shrinks before it crops at 128 pixels, and crops before it shrinks otherwise.
  shrink_first = size == 128
  framing = Framing(
    size, resize='bilinear' if shrink_first else 'bicubic', shrink_first=shrink_first
  )
  return cache.prepared(config.data, split, _pictures(config.data, split, category), framing)


def _pictures(data: ConfigDict, split: str, category: str) -> Pictures:
  folders = {key: f'{category}_{part}_lmdb' for key, part in _SPLITS.items()}
  name = folders[split]
  names = [*folders.values(), *(f'{folder}.zip' for folder in folders.values())]
  path = published.find(data, name, names)
  if path is None:
    pictures = published.folder_of(data, names) / _SPLITS[split]
    if pictures.is_dir():
      store = FolderStore(pictures)
      files = store.files()
      skipped = [(file.name, file.fault) for file in files if file.fault]
      used = [file for file in files if not file.fault]
      return PictureFiles(store, used, num_channels=data.num_channels, skipped=skipped)
  stored = path / 'data.mdb' if path else None
  key = published.key_of_files([stored]) if stored and stored.exists() else None

  def read() -> PictureFiles:
    if path is None:
      raise _missing(data, name, names)
    store = LmdbStore(path)
    return PictureFiles(store, store.files(), num_channels=data.num_channels)

  return published.LazyPictures(f'{name} {published.kept_key(data, name, key)}', read)


def _missing(data: ConfigDict, name: str, names: list[str]) -> UserError:
  """The error that says how to get the folder `name`, from its ZIP file or by a download."""
  file = published.PublishedFile(f'{name}.zip', address=f'http://dl.yf.io/lsun/scenes/{name}.zip')
  path = published.find(data, file.name, names)
  if path is None:
    return published.missing(data, file, names)
  return published.NotFetched(
    f'{path} has to be extracted before it can be read: run `python main.py --mode=prepare_data` '
    f'with the same --config, or extract it there.',
    lambda: extract(path, published.downloads(data) / name),
  )


def extract(path: pathlib.Path, folder: pathlib.Path) -> None:
  """Extracts the database in a published ZIP file, and verifies its checksum.

  Only the member `<category>_<split>_lmdb/data.mdb` is written, and the folder gets its name when
  it is complete, so no member can end up elsewhere and a process that is killed leaves no part of
  a database that looks like a whole one.

  Args:
    path: the ZIP file.
    folder: the new folder `<category>_<split>_lmdb`.

  Raises:
    UserError: if the ZIP file is damaged or is another file.
  """
  part = folder.with_name(f'.{folder.name}.part')
  reporting.check_writable(part, 'data.cache_dir')
  member = f'{folder.name}/data.mdb'
  try:
    with zipfile.ZipFile(path) as archive:
      if member not in archive.namelist():
        raise UserError(f'{path} has no file {member}: download it again.')
      info = archive.getinfo(member)
      if info.compress_type not in ZIP_METHODS:
        raise UserError(
          f'{path} is packed by a method that may need any memory: download it again, or pack it '
          f'anew by Deflate.'
        )
      title = f'extracting {path.name}'
      with (
        archive.open(info) as source,
        (part / 'data.mdb').open('wb') as target,
        published.byte_bar(title, info.file_size) as bar,
      ):
        while block := source.read(_BLOCK):
          target.write(block)
          bar.update(len(block))
      # Extracted again, the file has the same time, and its cache is found.
      changed = calendar.timegm(info.date_time)
      os.utime(part / 'data.mdb', (changed, changed))
  except UserError:
    shutil.rmtree(part, ignore_errors=True)
    raise
  except (*_DAMAGE, OSError) as error:
    shutil.rmtree(part, ignore_errors=True)
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a full disk, and the like
      raise
    raise UserError(
      f'{path} is truncated or damaged ({error}): remove it and download it again.'
    ) from error
  os.replace(part, folder)


class LmdbStore(Store):
  """The pictures in an LMDB database, whose keys are their names.

  Args:
    path: the folder of `data.mdb`.
  """

  portable = True

  def __init__(self, path: pathlib.Path):
    self._path = path / 'data.mdb'

  @classmethod
  def recognises(cls, path: pathlib.Path) -> bool:
    """Whether this is the folder of an LMDB database."""
    return (path / 'data.mdb').is_file()

  def files(self) -> list[File]:
    """See `Store`; the version of a file is where its bytes are.

    Raises:
      UserError: if the database is truncated or damaged.
    """
    path = self._path
    try:
      with (
        path.open('rb') as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
      ):
        return [
          File(key.decode('latin-1'), length, position)
          for key, position, length in lmdb_file.entries(mapped)
        ]
    except lmdb_file.TruncatedDatabase as error:
      raise UserError(
        f'{path} is truncated, since it has {path.stat().st_size:,} of {error} bytes: extract it '
        f'again.'
      ) from error
    except (OSError, ValueError) as error:  # also of an empty file, which cannot be mapped
      raise UserError(
        f'{path.parent} is not an LMDB database, or is damaged ({error}): extract it again.'
      ) from error

  def read(self, file: File) -> bytes:
    """The bytes of a picture."""
    if file.size > MAX_BYTES:
      raise BadPicture(f'more than {MAX_BYTES >> 20} MiB')
    try:
      with self._path.open('rb', buffering=0) as opened:
        opened.seek(file.version)
        content = opened.read(file.size)
    except OSError as error:
      raise BadPicture(error.strerror or type(error).__name__) from error
    if len(content) < file.size:
      raise BadPicture('no longer in the database')
    return content
