"""TFRecord files: images, and what is said of damaged records."""

import struct

import numpy as np
import pytest

from runtime.errors import UserError
from sources import tfrecords
from sources.base import DATASETS
from tests import published_files as files

IMAGES = [files.smooth_picture(64, 64, seed) for seed in range(5)]
RECORDS = [files.record(files.example(x, packed=i % 2 == 0)) for i, x in enumerate(IMAGES)]


@pytest.fixture
def path(tmp_path):
  for level in (5, 7):  # other resolutions beside it
    (tmp_path / f'ffhq-r{level:02d}.tfrecords').touch()
  path = tmp_path / 'ffhq-r06.tfrecords'
  path.write_bytes(b''.join(RECORDS))
  return path


def build(tmp_path, size=64, split='train', **settings):
  settings = {'tfrecords_path': str(tmp_path)} | settings
  config = files.data_config(tmp_path, 'FFHQ', size, **settings)
  return DATASETS.build('FFHQ', config.data, config, split)


def test_checksum_is_the_published_one():
  # RFC 3720, B.4: 32 bytes of zeros have the CRC-32C 0x8a9136aa.
  crc = 0x8A9136AA
  rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
  assert tfrecords.masked_checksum(bytes(32)) == (rotated + 0xA282EAD8) % 2**32


@pytest.mark.parametrize('split', ['train', 'test'])
def test_all_records_are_read_in_any_order(split, path, tmp_path):
  source = build(tmp_path, split=split)
  assert len(source) == 5
  order = np.array([3, 0, 4, 4])
  batch = source.gather(order)
  np.testing.assert_array_equal(batch['image'], np.stack([IMAGES[i] for i in order]))
  assert batch['label'].tolist() == [0] * 4
  np.testing.assert_array_equal(source[2]['image'], IMAGES[2])
  source.verify()


def test_index_is_kept_until_the_file_changes(path, tmp_path, monkeypatch):
  before = build(tmp_path).fingerprint
  with monkeypatch.context() as patch:
    patch.setattr(tfrecords, '_make_index', lambda path: pytest.fail('read again'))
    assert build(tmp_path, tfrecords_path='', path=str(path)).fingerprint == before
  path.write_bytes(b''.join(RECORDS[::-1]))
  assert build(tmp_path).fingerprint != before


def harmed(path, position, level=1):
  content = bytearray(path.read_bytes())
  content[position] ^= level
  path.write_bytes(content)


def test_flipped_bit_in_the_data_is_named(path, tmp_path):
  harmed(path, len(RECORDS[0]) + 5000)
  source = build(tmp_path)
  np.testing.assert_array_equal(source[0]['image'], IMAGES[0])
  message = f'Record 1 of {path} is damaged, since its checksum is wrong: copy'
  with pytest.raises(UserError, match=message):
    source[1]
  with pytest.raises(UserError, match=message):
    source.verify()


@pytest.mark.parametrize('position', [0, 7, 9])
def test_flipped_bit_in_a_length_is_named(position, path, tmp_path):
  harmed(path, len(RECORDS[0]) + len(RECORDS[1]) + position)
  with pytest.raises(UserError, match=f'Record 2 of {path} is damaged, since the checksum of its'):
    build(tmp_path)


@pytest.mark.parametrize('missing', [1, 4, 5000, len(RECORDS[4]) - 15, len(RECORDS[4]) - 1])
def test_truncated_file_is_named(missing, path, tmp_path):
  path.write_bytes(path.read_bytes()[:-missing])
  with pytest.raises(UserError, match=f'{path} is truncated, since its .* bytes end in record 4'):
    build(tmp_path)


def test_length_beyond_the_file_is_refused(path, tmp_path):
  length = struct.pack('<Q', 2**63)
  path.write_bytes(length + struct.pack('<I', tfrecords.masked_checksum(length)) + bytes(99))
  with pytest.raises(UserError, match='is truncated, since its 111 bytes end in record 0'):
    build(tmp_path)


@pytest.mark.parametrize(
  'content',
  [
    b'\x0a\xff\xff\xff\xff\x0f',  # a field longer than its message
    b'\x0a' + b'\xff' * 20,  # a number that does not end
    b'\x0f',  # a field of unknown type
    b'\x08\x01',  # a number where the features must be
    b'',
    files.example(IMAGES[0]).replace(b'shape', b'sharp'),
    files.example(IMAGES[0])[:-9],
  ],
)
def test_record_that_is_no_image_is_named(content, path, tmp_path):
  path.write_bytes(RECORDS[0] + files.record(content))
  with pytest.raises(
    UserError, match=f'Record 1 of {path} is not an image of the tools of StyleGAN'
  ):
    build(tmp_path)[1]


def test_image_of_another_size_is_named(path, tmp_path):
  source = build(tmp_path, 128, tfrecords_path=str(path))
  with pytest.raises(UserError, match=r'has the shape \(3, 64, 64\), not \(3, 128, 128\): set'):
    source[0]


def test_paths_without_a_fitting_file_are_refused(path, tmp_path):
  with pytest.raises(UserError, match=r'has 0 TFRecord files for data.image_size=256 \(ffhq-r05'):
    build(tmp_path, 256)
  with pytest.raises(UserError, match="data.tfrecords_path='' and data.path='' are empty"):
    build(tmp_path, tfrecords_path='', path='')
  with pytest.raises(UserError, match='nowhere.tfrecords does not exist'):
    build(tmp_path, tfrecords_path=str(tmp_path / 'nowhere.tfrecords'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='is neither a TFRecord file nor a folder of such files'):
    build(tmp_path, tfrecords_path=str(tmp_path / 'empty'))
