"""TFRecord files of images, as the tools of StyleGAN and Progressive GAN write them.

A file is a sequence of records (https://www.tensorflow.org/tutorials/load_data/tfrecord), each

  length       uint64, little-endian
  checksum     uint32, the masked CRC-32C of the eight bytes of the length
  content      as many bytes as the length says
  checksum     uint32, the masked CRC-32C of the content

and the content is a message `tf.train.Example` in the wire format of Protocol Buffers
(https://protobuf.dev/programming-guides/encoding), with the features 'shape', three integers, and
'data', uint8 (C, H, W).
"""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any

import crc32c
import numpy as np
from jaxtyping import Float, Int, Integer, UInt8
from ml_collections import ConfigDict

from runtime import npz_file, progress, reporting
from runtime.errors import UserError
from sources.base import BatchReader, Example, mapped
from sources.cache import cache_folder

_HEADER = struct.Struct('<QI')  # length and its checksum
_CHECKSUM = struct.Struct('<I')


def masked_checksum(content: bytes | UInt8[np.ndarray, ' n']) -> int:
  """The CRC-32C of bytes, rotated by 15 bits and shifted, as TFRecord files store it."""
  crc = crc32c.crc32c(content)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def find(path: str, size: int) -> pathlib.Path | None:
  """The TFRecord file of images of `size` x `size` pixels; None if there are no TFRecord files.

  Args:
    path: the file, or the folder of files `<name>-r<log2 size>.tfrecords`.
    size: height and width.

  Raises:
    UserError: if there is no file of this size, or more than one.
  """
  given = pathlib.Path(path).expanduser()
  if given.suffix == '.tfrecords':
    return given
  files = sorted(given.glob('*.tfrecords')) if given.is_dir() else []
  if not files:
    return None
  level = math.log2(size)
  matches = [re.search(r'-r(\d+)\.tfrecords$', file.name) for file in files]
  fitting = [f for f, match in zip(files, matches, strict=True) if match and int(match[1]) == level]
  if len(fitting) != 1:
    raise UserError(
      f'{given} has {len(fitting)} TFRecord files for data.image_size={size} '
      f'({", ".join(file.name for file in fitting or files)}): name one file, or set another '
      f'data.image_size.'
    )
  return fitting[0]


@dataclasses.dataclass(frozen=True)
class TFRecordSource(BatchReader):
  """The images of a TFRecord file, read where they are; see `sources.base.Source`.

  Attributes:
    path: the file.
    size: height and width of the images.
    num_channels: of the images.
    offsets: where the content of each record begins, (N,).
    lengths: of the contents, (N,).
    checksums: the masked CRC-32C of each content, (N,).
  """

  path: pathlib.Path
  _: dataclasses.KW_ONLY
  size: int
  num_channels: int
  offsets: Int[np.ndarray, ' N']
  lengths: Int[np.ndarray, ' N']
  checksums: Int[np.ndarray, ' N']

  def __len__(self) -> int:
    """The number of records."""
    return len(self.offsets)

  def gather(
    self, indices: Integer[np.ndarray, ' B'], draws: Float[np.ndarray, ' B'] | None = None
  ) -> Example:
    """The examples `indices`: 'image', (B, size, size, num_channels), and 'label', zeros (B,).

    Raises:
      UserError: if a record is damaged or its image has the wrong shape.
    """
    del draws
    images = np.empty((len(indices), self.size, self.size, self.num_channels), np.uint8)
    for row, i in enumerate(indices.tolist()):
      images[row] = self._image(i)
    return {'image': images, 'label': np.zeros(len(indices), np.int32)}

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the places, lengths and checksums of all records."""
    digest = hashlib.sha256()
    # The checksums of the lengths are a function of the lengths.
    for array in (self.offsets, self.lengths, self.checksums):
      digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()

  def verify(self) -> None:
    """Reads everything.

    Raises:
      UserError: if a record is damaged.
    """
    for i in progress.bar(range(len(self)), f'verifying {self.path.name}', unit='records'):
      self._image(i)

  @functools.cached_property
  def _mapped(self) -> UInt8[np.ndarray, ' bytes']:
    return mapped(self.path)

  def _image(self, i: int) -> UInt8[np.ndarray, 'H W C']:
    start, length = int(self.offsets[i]), int(self.lengths[i])
    content = self._mapped[start : start + length]
    if masked_checksum(content) != self.checksums[i]:
      raise UserError(
        f'Record {i} of {self.path} is damaged, since its checksum is wrong: copy or download the '
        f'file again.'
      )
    try:
      features = parse_example(memoryview(content))
      shape, data = features['shape'], features['data'][0]
      pixels = np.frombuffer(data, np.uint8).reshape(shape)
    except (ValueError, LookupError, TypeError, OverflowError) as error:
      raise UserError(
        f'Record {i} of {self.path} is not an image of the tools of StyleGAN ({error}): give one '
        f'of their files.'
      ) from error
    expected = (self.num_channels, self.size, self.size)
    if pixels.shape != expected:
      raise UserError(
        f'Record {i} of {self.path} has the shape {pixels.shape}, not {expected}: set '
        f'data.num_channels and data.image_size to match.'
      )
    return pixels.transpose(1, 2, 0)


def open_records(data: ConfigDict, path: pathlib.Path) -> TFRecordSource:
  """The images of a TFRecord file; where its records begin is found once and kept in the cache.

  Raises:
    UserError: if the file does not exist, or is truncated or damaged.
  """
  if not path.is_file():
    raise UserError(f'{path} does not exist: set data.tfrecords_path to a TFRecord file.')
  status = path.stat()
  about = f'{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}'
  digest = hashlib.sha256(about.encode(errors='surrogateescape')).hexdigest()[:16]
  kept = cache_folder(data) / 'tfrecords' / f'{path.stem}-{digest}.npz'
  index = _read_index(kept)
  if index is None:
    index = _make_index(path)
    reporting.check_writable(kept.parent, 'data.cache_dir')
    reporting.write_npz(kept, **index)
  return TFRecordSource(path, size=data.image_size, num_channels=data.num_channels, **index)


def _read_index(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """The index that is kept; None if there is none that can be read."""
  names = ['offsets', 'lengths', 'checksums']
  try:
    return npz_file.load_arrays(path, lambda _: names)
  except npz_file.UNREADABLE:
    return None


def _make_index(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Where the content of each record begins, its length and its checksum."""
  offsets, lengths, checksums = [], [], []
  size, position = path.stat().st_size, 0
  with (
    path.open('rb', buffering=0) as file,
    progress.bar(what=f'indexing {path.name}', unit='records') as bar,
  ):
    while position < size:
      number = len(offsets)
      if size - position < _HEADER.size + _CHECKSUM.size:
        raise _truncated(path, number, size)
      file.seek(position)
      header = file.read(_HEADER.size)
      length, checksum = _HEADER.unpack(header)
      if masked_checksum(header[:8]) != checksum:
        raise UserError(
          f'Record {number} of {path} is damaged, since the checksum of its length is wrong: copy '
          f'or download the file again.'
        )
      position += _HEADER.size
      if length > size - position - _CHECKSUM.size:
        raise _truncated(path, number, size)
      file.seek(position + length)
      offsets.append(position)
      lengths.append(length)
      checksums.append(_CHECKSUM.unpack(file.read(_CHECKSUM.size))[0])
      position += length + _CHECKSUM.size
      bar.update()
  if not offsets:
    raise UserError(f'{path} is empty: copy or download the file again.')
  arrays = {'offsets': offsets, 'lengths': lengths, 'checksums': checksums}
  return {name: np.asarray(values, np.int64) for name, values in arrays.items()}


def _truncated(path: pathlib.Path, number: int, size: int) -> UserError:
  return UserError(
    f'{path} is truncated, since its {size:,} bytes end in record {number}: copy or download the '
    f'file again.'
  )


def parse_example(content: memoryview) -> dict[str, list[Any]]:
  """The features of a message `tf.train.Example` by name: bytes as memoryviews, or integers.

  Raises:
    ValueError: if it is not such a message.
  """
  features = {}
  for number, entries in _fields(content):  # Example: features = 1
    for _, entry in _fields(entries) if number == 1 else ():  # Features: a map feature = 1
      pair = dict(_fields(entry))  # key = 1, value = 2
      name = _bytes(pair[1]).decode()
      for kind, values in _fields(pair[2]):  # Feature: bytes_list = 1, int64_list = 3
        if kind == 1:
          features[name] = [value for _, value in _fields(values)]
        elif kind == 3:
          features[name] = [n for _, value in _fields(values) for n in _integers(value)]
  return features


def _bytes(value: memoryview | int) -> bytes:
  if isinstance(value, int):  # of which `bytes` would make so many zeros
    raise ValueError('a number where bytes must be')
  return bytes(value)


def _fields(message: memoryview | int) -> Iterator[tuple[int, memoryview | int]]:
  """The number of each field of a message and its value: a whole number, or bytes."""
  if isinstance(message, int):
    raise ValueError('a number where a message must be')
  position = 0
  while position < len(message):
    tag, position = _varint(message, position)
    number, wire_type = tag >> 3, tag & 7
    if wire_type == 0:
      value, position = _varint(message, position)
    else:
      if wire_type == 2:
        length, position = _varint(message, position)
      elif wire_type in (1, 5):
        length = {1: 8, 5: 4}[wire_type]
      else:
        raise ValueError(f'a field of unknown type {wire_type}')
      if length > len(message) - position:
        raise ValueError('a field that is longer than its message')
      value = message[position : position + length]
      position += length
    yield number, value


def _integers(value: memoryview | int) -> Iterator[int]:
  """The integers of one field: a single one, or packed ones."""
  if isinstance(value, int):
    yield value
    return
  position = 0
  while position < len(value):
    number, position = _varint(value, position)
    yield number


def _varint(message: memoryview, position: int) -> tuple[int, int]:
  """A number of seven bits per byte, the lowest ones first, and the position after it."""
  number = 0
  for i, byte in enumerate(message[position : position + 10]):
    number |= (byte & 0x7F) << 7 * i
    if byte < 0x80:
      return number, position + i + 1
  raise ValueError('a number that does not end')
