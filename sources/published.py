"""The files in which authors publish their data sets: where they are, and whether they are intact.

A file is looked for where `data.path` says (the file itself or the folder that has it), and then in
the folder `downloads` of the cache. A data set opens its files only while its cache is incomplete,
so that a prepared cache is enough to train. If a file is then missing but a program can get it, the
data set raises `NotFetched`. Nothing is downloaded without being asked for: `--mode=prepare_data`
calls the method `fetch` of the error and tries again, and other modes end with its sentence.
"""

import dataclasses
import functools
import hashlib
import http.client
import json
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import logging
from jaxtyping import UInt8
from ml_collections import ConfigDict

from runtime import progress, reporting
from runtime.errors import UserError
from sources.base import Pictures
from sources.cache import cache_folder

_BLOCK = 2**20  # bytes that are read at a time
_TIMEOUT = 60  # seconds without an answer


@dataclasses.dataclass(frozen=True)
class PublishedFile:
  """A file as its authors publish it.

  Attributes:
    name: of the file.
    address: what a program downloads it from; empty if only people can.
    page: where people find it.
    size: in bytes; None if it is not known.
    checksum: 'md5:...' or 'sha256:...'; empty if none is known.
  """

  name: str
  _: dataclasses.KW_ONLY
  address: str = ''
  page: str = ''
  size: int | None = None
  checksum: str = ''


_CIFAR = 'https://www.cs.toronto.edu/~kriz'
_SVHN = 'http://ufldl.stanford.edu/housenumbers'
_CELEBA = 'https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html'

FILES = {
  file.name: file
  for file in (
    PublishedFile(
      'cifar-10-binary.tar.gz',
      address=f'{_CIFAR}/cifar-10-binary.tar.gz',
      size=170_052_171,
      checksum='sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
    ),
    PublishedFile(
      'cifar-10-python.tar.gz',
      address=f'{_CIFAR}/cifar-10-python.tar.gz',
      size=170_498_071,
      checksum='md5:c58f30108f718f92721af3b95e74349a',
    ),
    PublishedFile(
      'train_32x32.mat',
      address=f'{_SVHN}/train_32x32.mat',
      size=182_040_794,
      checksum='md5:e26dedcc434d2e4c54c9b2d4a06d8373',
    ),
    PublishedFile(
      'test_32x32.mat',
      address=f'{_SVHN}/test_32x32.mat',
      size=64_275_384,
      checksum='md5:eb5a983be6a315427106f1b164d9cef3',
    ),
    PublishedFile(
      'img_align_celeba.zip',
      page=_CELEBA,
      checksum='md5:00d2c5bc6d35e252742224ab0c1e8fcb',
    ),
    PublishedFile(
      'list_eval_partition.txt',
      page=_CELEBA,
      checksum='md5:d32c9cbf5e040fd4025c592c306e6668',
    ),
  )
}


class NotFetched(UserError):
  """A file of the data set is missing, but a program can get it.

  Args:
    message: the sentence for users.
    fetch: gets the file.
  """

  def __init__(self, message: str, fetch: Callable[[], object]):
    super().__init__(message)
    self.fetch = fetch


def folder_of(data: ConfigDict, names: Iterable[str]) -> pathlib.Path:
  """The folder where the files or folders `names` of a data set should be.

  Raises:
    UserError: if `data.path` is a file, but none of these.
  """
  if not data.path:
    return downloads(data)
  path = pathlib.Path(data.path).expanduser()
  if path.name in names:
    return path.parent
  if path.is_file():
    raise UserError(
      f'data.path={data.path!r} is not a file of {data.dataset}: give {", ".join(names)} under '
      f'its own name, or the folder that has it.'
    )
  return path


def find(data: ConfigDict, name: str, names: Iterable[str]) -> pathlib.Path | None:
  """Where the file or folder `name` is, one of the `names` of a data set; None if it is missing.

  Raises:
    UserError: if `data.path` is a file, but none of these.
  """
  folders = folder_of(data, names), downloads(data)
  return next((folder / name for folder in folders if (folder / name).exists()), None)


def downloads(data: ConfigDict) -> pathlib.Path:
  """The folder that files are downloaded to if `data.path` is empty."""
  return cache_folder(data) / 'downloads'


def kept_key(data: ConfigDict, what: str, key: str | None) -> str:
  """The key of files without a published checksum, which is kept until they are gone.

  Args:
    data: the configuration.
    what: the name of the files.
    key: their key; None if there are no such files now.

  Returns:
    `key`, or the one that was kept, or '' if there is none.
  """
  path = cache_folder(data) / 'keys' / f'{data.dataset}-{what}.txt'
  kept = path.read_text(encoding='utf-8') if path.exists() else ''
  if key and key != kept:
    reporting.check_writable(path.parent, 'data.cache_dir')
    reporting.write_atomic(path, key.encode())
  return key or kept


def key_of_files(paths: Sequence[pathlib.Path]) -> str:
  """SHA-256 of the names, sizes and times of files."""
  status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
  return hashlib.sha256(json.dumps(status).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class LazyPictures:
  """Pictures whose files are opened only when they are needed, which a complete cache is not.

  Attributes:
    key: see `sources.base.Pictures`; it has to be known without the files.
    open: opens the files.
    class_names: names of the labels.
    skipped: empty, as data sets are published without files that cannot be used.
  """

  key: str
  open: Callable[[], Pictures]
  class_names: Sequence[str] = ()
  skipped: Sequence[tuple[str, str]] = ()

  @functools.cached_property
  def _pictures(self) -> Pictures:
    return self.open()

  @property
  def portable(self) -> bool:
    """Whether another process can read a pickled copy."""
    return getattr(self._pictures, 'portable', False)

  def __reduce__(self) -> Any:
    """Other processes get the opened pictures: functions cannot be sent."""
    return _same, (self._pictures,)

  def __len__(self) -> int:
    """The number of pictures."""
    return len(self._pictures)

  def name(self, i: int) -> str:
    """The name of picture number `i`."""
    return self._pictures.name(i)

  def read(self, i: int) -> tuple[UInt8[np.ndarray, 'H W C'], int]:
    """Picture number `i` and its label."""
    return self._pictures.read(i)


def _same(pictures: Pictures) -> Pictures:
  return pictures


def verified(data: ConfigDict, name: str, names: Iterable[str]) -> pathlib.Path:
  """The path of a file of `FILES`, one of the `names` of a data set, once it has been verified.

  Raises:
    UserError: if it is damaged or missing; a `NotFetched` if it can be downloaded.
  """
  file, path = FILES[name], find(data, name, names)
  if path is None:
    raise missing(data, file, names)
  verify(file, path)
  return path


def missing(data: ConfigDict, file: PublishedFile, names: Iterable[str]) -> UserError:
  """The error that says that a published file is missing, and what to do about it."""
  folder = folder_of(data, names)
  problem = f'The file {file.name} of {data.dataset} is not in {folder}'
  if not file.address:
    return UserError(f'{problem}: download it in a browser from {file.page} and put it there.')
  return NotFetched(
    f'{problem}: run `python main.py --mode=prepare_data` with the same --config, which downloads '
    f'it, or put it there (it is at {file.address}).',
    lambda: download(file, folder),
  )


def verify(file: PublishedFile, path: pathlib.Path) -> None:
  """Compares a file with what its authors published: first the size, then the checksum.

  Raises:
    UserError: if it is not the same file.
  """
  problem = _difference(file, path)
  if problem:
    again = f'from {file.address or file.page} again'
    raise UserError(f'{path} {problem}: remove it and get it {again}.')


def _difference(file: PublishedFile, path: pathlib.Path) -> str:
  """How a file differs from the published one; empty if it is the same as far as is known."""
  size = path.stat().st_size
  if file.size is not None and size < file.size:
    return f'is truncated, since it has {size:,} of {file.size:,} bytes'
  if file.size is not None and size > file.size:
    return f'is another file than the published one, since it has {size:,} bytes, not {file.size:,}'
  if not file.checksum:
    return ''
  method, _, published = file.checksum.partition(':')
  digest = hashlib.new(method, usedforsecurity=False)
  with path.open('rb') as opened, byte_bar(f'verifying {file.name}', size) as bar:
    while block := opened.read(_BLOCK):
      digest.update(block)
      bar.update(len(block))
  if digest.hexdigest() == published:
    return ''
  return (
    f'is {"" if file.size else "incomplete, "}damaged or another file, since its {method} is '
    f'{digest.hexdigest()}, not {published}'
  )


def byte_bar(title: str, total: int | None, done: int = 0) -> tqdm.tqdm:
  """A progress bar that counts bytes."""
  return progress.bar(
    what=title, total=total, initial=done, unit='B', unit_scale=True, unit_divisor=1024
  )


def download(file: PublishedFile, folder: pathlib.Path) -> pathlib.Path:
  """Downloads a published file into a folder, and verifies it; returns its path.

  What has arrived is in `<name>.part`, from which the next call continues.

  Raises:
    UserError: if the file cannot be downloaded or is damaged.
  """
  path, part = folder / file.name, folder / f'{file.name}.part'
  reporting.check_writable(folder, 'data.path' if folder.name != 'downloads' else 'data.cache_dir')
  logging.info('Downloading %s to %s.', file.address, folder)
  by_hand = f'or download {file.name} from {file.address} elsewhere and put it into {folder}'
  try:
    _receive(file, part)
  except (OSError, http.client.HTTPException) as error:
    reason = getattr(error, 'reason', None) or error
    raise UserError(
      f'{file.address} cannot be downloaded ({reason}): rerun the same command, which continues, '
      f'{by_hand}.'
    ) from error
  if problem := _difference(file, part):
    part.unlink()
    raise UserError(
      f'What {file.address} sent {problem}: rerun the same command, which downloads it again, '
      f'{by_hand}.'
    )
  os.replace(part, path)
  return path


def _receive(file: PublishedFile, part: pathlib.Path) -> None:
  """Continues a download until the file is complete.

  Raises:
    OSError: if the server cannot be reached, or ends the connection early.
  """
  done = part.stat().st_size if part.exists() else 0
  if done and done == file.size:
    return
  request = urllib.request.Request(file.address)
  if done:
    request.add_header('Range', f'bytes={done}-')
  try:
    response = urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    if error.code != 416:  # range not satisfiable: there are no bytes after those that we have
      raise
    if error.headers['Content-Range'] != f'bytes */{done}':
      part.unlink()
      _receive(file, part)
    return
  with response:
    continues = response.status == 206 and done
    if not continues:  # a server that ignores the header sends everything
      done = 0
    length = response.headers['Content-Length']
    total = done + int(length) if length else None
    with part.open('ab' if continues else 'wb') as opened, byte_bar(file.name, total, done) as bar:
      while block := response.read(_BLOCK):
        opened.write(block)
        bar.update(len(block))
        done += len(block)
  if total is not None and done < total:
    raise OSError(f'the connection ended after {done:,} of {total:,} bytes')


def check_colours(data: ConfigDict) -> None:
  """Refuses grey images, for data sets whose pictures are stored as arrays of colours."""
  if data.num_channels != 3:
    raise UserError(
      f'data.num_channels={data.num_channels}, but {data.dataset} has colours: set '
      f'data.num_channels=3.'
    )
