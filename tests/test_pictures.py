"""Picture files: what their pixels become, which ones a folder holds and how they are split."""

import logging
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from runtime.errors import UserError
from sources import pictures

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save(path, pixels, mode=None, **options):
  image = Image.fromarray(pixels)
  (image.convert(mode) if mode else image).save(path, **options)
  return path


def png(depth, colour_type, row, size, transparent=None):
  """A PNG of one row as the standard has it, for what Pillow cannot write."""

  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  header = struct.pack('>IIBBBBB', *size, depth, colour_type, 0, 0, 0)
  chunks = [(b'IHDR', header), (b'IDAT', zlib.compress(b'\0' + row)), (b'IEND', b'')]
  if transparent is not None:
    chunks.insert(1, (b'tRNS', transparent))
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*item) for item in chunks)


# --- numbers ---


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bit_grey_is_divided_by_257(tmp_path, suffix):
  values = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
  path = save(tmp_path / f'x.{suffix}', values)
  grey = pictures.decode(path, 1)
  assert grey.shape == (64, 64, 1)
  assert grey.dtype == np.uint8
  np.testing.assert_array_equal(grey[..., 0], np.rint(values / 257.0))
  np.testing.assert_array_equal(pictures.decode(path, 3), np.repeat(grey, 3, -1))


def test_32_bit_grey_is_divided_by_257_and_refused_outside_16_bits(tmp_path):
  values = np.linspace(0, 65535, 256).astype(np.int32).reshape(16, 16)
  grey = pictures.decode(save(tmp_path / 'x.tif', values), 1)[..., 0]
  np.testing.assert_array_equal(grey, np.rint(values / 257.0))
  for strange in (-1, 65536):
    values[3, 4] = strange
    path = save(tmp_path / 'strange.tif', values)
    with pytest.raises(
      UserError, match=r'strange\.tif .*values from .* to .*not within 0 to 65535'
    ):
      pictures.decode(path, 1)


def test_float_is_multiplied_by_255_and_refused_outside_0_to_1(tmp_path):
  values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
  grey = pictures.decode(save(tmp_path / 'x.tif', values), 1)[..., 0]
  np.testing.assert_array_equal(grey, RAMP)
  for strange in (-0.01, 1.01, np.nan, np.inf):
    values[3, 4] = strange
    path = save(tmp_path / 'strange.tif', values)
    with pytest.raises(UserError, match=r'strange\.tif .*not within 0 to 1\)'):
      pictures.decode(path, 1)


def test_wide_tiff_of_12_bits_or_with_white_as_zero_is_scaled_by_its_tags(tmp_path):
  path = save(tmp_path / 'x.tif', np.array([[0, 13107, 65535]], np.uint16))
  data = path.read_bytes()

  def with_tag(number, value):
    old = data.index(struct.pack('<HHI', number, 3, 1)) + 8
    path.write_bytes(data[:old] + struct.pack('<H', value) + data[old + 2 :])
    return pictures.decode(path, 1).ravel().tolist()

  assert with_tag(262, 1) == [0, 51, 255]
  assert with_tag(262, 0) == [255, 204, 0]
  assert with_tag(258, 12)[:2] == [0, 3]  # 0x000 and 0x033 / 0xFFF


@pytest.mark.parametrize('num_channels', [1, 3])
@pytest.mark.parametrize(
  ('mode', 'suffix'),
  [
    ('RGBA', 'png'),
    ('LA', 'png'),
    ('RGBA', 'tif'),
    ('LA', 'tif'),
    pytest.param('RGBA', 'webp', marks=pytest.mark.slow),
  ],
)
def test_alpha_is_composed_on_white(tmp_path, mode, suffix, num_channels):
  alpha = RAMP.T
  grey = np.full_like(RAMP, 60)
  pixels = np.stack([grey] * (len(mode) - 1) + [alpha], -1)
  options = {'lossless': True, 'exact': True} if suffix == 'webp' else {}
  image = pictures.decode(save(tmp_path / f'x.{suffix}', pixels, **options), num_channels)
  a = alpha[..., None] / 255.0
  np.testing.assert_allclose(image, np.broadcast_to(60 * a + 255 * (1 - a), image.shape), atol=1)
  assert (image[alpha == 0] == 255).all()


@pytest.mark.parametrize('suffix', ['png', 'gif'])
def test_transparent_colour_of_a_palette_is_white(tmp_path, suffix):
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
  image.putpalette([10, 20, 30, 0, 200, 0, 40, 50, 60])
  image.save(tmp_path / f'x.{suffix}', transparency=1)
  decoded = pictures.decode(tmp_path / f'x.{suffix}', 3)[0].tolist()
  assert decoded == [[10, 20, 30], [255, 255, 255], [40, 50, 60]]


def test_palette_with_one_alpha_for_each_colour_is_composed_on_white(tmp_path):
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
  image.putpalette([0, 0, 0, 0, 200, 0, 40, 50, 60])
  image.save(tmp_path / 'x.png', transparency=bytes([128, 0, 255]))
  decoded = pictures.decode(tmp_path / 'x.png', 3)[0].tolist()
  assert decoded == [[127, 127, 127], [255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize(
  ('depth', 'colour_type', 'row', 'transparent', 'expected'),
  [
    (1, 0, [0b01000000], [0], [255, 255]),
    (2, 0, [0b01100000], [1], [255, 170]),
    (4, 0, [0x3A], [3], [255, 170]),
    (8, 0, [10, 20], [10], [255, 20]),
    (16, 0, [1000, 2570], [1000], [255, 10]),
    (8, 2, [1, 2, 3, 4, 4, 4], [1, 2, 3], [255, 4]),
    (16, 2, [1000, 2000, 3000, 1028, 1028, 1028], [1000, 2000, 3000], [255, 4]),
  ],
)
def test_transparent_level_or_colour_of_png_is_white_at_every_depth(
  tmp_path, depth, colour_type, row, transparent, expected
):
  samples = np.array(row, '>u2' if depth == 16 else np.uint8).tobytes()
  transparent = np.array(transparent, '>u2').tobytes()
  path = tmp_path / 'x.png'
  path.write_bytes(png(depth, colour_type, samples, (2, 1), transparent))
  assert pictures.decode(path, 1).ravel().tolist() == expected


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
def test_orientation_is_applied_once(tmp_path, suffix):
  upright = np.zeros((24, 32), np.uint8)
  upright[:8, :8] = 255  # a mark at the top left
  stored = {1: upright, 3: upright[::-1, ::-1], 6: upright.T[::-1], 8: upright.T[:, ::-1]}
  for orientation, pixels in stored.items():
    exif = Image.Exif()
    exif[0x112] = orientation
    path = save(tmp_path / f'x.{suffix}', np.ascontiguousarray(pixels), exif=exif, quality=95)
    image = pictures.decode(path, 1)[..., 0]
    np.testing.assert_allclose(image, upright, atol=25)


def test_orientation_of_16_bit_grey_is_applied(tmp_path):
  exif = Image.Exif()
  exif[0x112] = 6
  path = save(tmp_path / 'x.png', np.array([[0, 257, 514]], np.uint16), exif=exif)
  assert pictures.decode(path, 1).shape == (3, 1, 1)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
def test_exif_that_cannot_be_parsed_leaves_the_picture_as_it_is(tmp_path, suffix):
  path = save(tmp_path / f'x.{suffix}', np.full((8, 8), 80, np.uint8), exif=b'Exif\0\0rubbish')
  np.testing.assert_allclose(pictures.decode(path, 1), 80, atol=2)


COLOUR = (204, 102, 51)  # a colour of Pillow's palette
LUMA = 0.299 * 204 + 0.587 * 102 + 0.114 * 51


@pytest.mark.parametrize(
  ('mode', 'suffix'),
  [
    ('RGB', 'png'),
    ('RGB', 'jpg'),
    ('RGB', 'bmp'),
    ('RGB', 'webp'),
    ('P', 'png'),
    ('P', 'gif'),
    ('CMYK', 'jpg'),
    ('CMYK', 'tif'),
    ('YCbCr', 'jpg'),
    ('YCbCr', 'tif'),
  ],
)
def test_colours_of_every_kind_become_rgb_or_grey(tmp_path, mode, suffix):
  pixels = np.full((16, 16, 3), COLOUR, np.uint8)
  path = save(tmp_path / f'x.{suffix}', pixels, mode, quality=95)
  np.testing.assert_allclose(pictures.decode(path, 3), pixels, atol=4)
  np.testing.assert_allclose(pictures.decode(path, 1), LUMA, atol=4)


@pytest.mark.parametrize('suffix', ['png', 'tif', 'bmp'])
def test_one_bit_becomes_black_and_white(tmp_path, suffix):
  pixels = np.array([[0, 255, 255, 0]], np.uint8)
  path = save(tmp_path / f'x.{suffix}', pixels, '1')
  np.testing.assert_array_equal(pictures.decode(path, 1)[..., 0], pixels)


def test_16_bit_colour_keeps_what_8_bits_can_hold(tmp_path):
  path = tmp_path / 'x.png'
  row = np.array([0, 65535, 77 * 257], '>u2').tobytes()
  path.write_bytes(png(16, 2, row, (1, 1)))
  assert pictures.decode(path, 3).ravel().tolist() == [0, 255, 77]


@pytest.mark.parametrize('suffix', ['gif', 'webp', 'png', 'tif'])
def test_first_frame_stands_for_the_whole(tmp_path, suffix):
  frames = [Image.new('RGB', (16, 16), colour) for colour in (COLOUR, 'blue', 'white')]
  frames[0].save(tmp_path / f'x.{suffix}', save_all=True, append_images=frames[1:])
  image = pictures.decode(tmp_path / f'x.{suffix}', 3)
  np.testing.assert_allclose(image, np.broadcast_to(COLOUR, image.shape), atol=4)


def test_truncated_file_is_refused_by_name(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  for suffix in ('png', 'jpg', 'bmp', 'tif', 'gif', 'webp'):
    path = save(tmp_path / f'cut.{suffix}', noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
      UserError, match=rf'cut\.{suffix} cannot be read \(.*\): remove or replace it'
    ):
      pictures.decode(path, 3)


# --- listing ---


@pytest.fixture
def folder(tmp_path):
  """Makes one-pixel pictures by name."""

  def make(*names):
    for name in names:
      path = tmp_path / name
      path.parent.mkdir(parents=True, exist_ok=True)
      save(path, np.zeros((1, 1), np.uint8))
    return str(tmp_path)

  return make


def names(files):
  return [file.name for file in files]


def test_pictures_are_listed_in_code_point_order_of_their_names(folder):
  expected = sorted(['Z.png', 'a.b/1.png', 'a/1.JPG', 'a/10.png', 'a/2.tiff', 'a0.gif', 'é.webp'])
  assert names(pictures.list_files(folder(*reversed(expected)))) == expected


def test_linked_folders_are_followed_once_and_cycles_end(folder, tmp_path):
  root = folder('set/real/1.png', 'elsewhere/2.png', 'elsewhere/deep/3.png')
  (tmp_path / 'set' / 'a').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'set' / 'again').symlink_to(tmp_path / 'elsewhere' / 'deep')
  (tmp_path / 'elsewhere' / 'up').symlink_to(tmp_path / 'set')
  (tmp_path / 'set' / 'before').symlink_to(tmp_path / 'set' / 'real')
  (tmp_path / 'set' / 'one.png').symlink_to(tmp_path / 'elsewhere' / '2.png')
  files = pictures.list_files(os.path.join(root, 'set'))
  assert names(files) == ['a/2.png', 'a/deep/3.png', 'one.png', 'real/1.png']
  assert not any(file.fault for file in files)


def test_what_is_no_picture_is_skipped_counted_and_named_in_one_warning(folder, tmp_path, caplog):
  good = [f'{i:02d}.png' for i in range(20)]
  root = folder(*good, '.hidden.png', '._x.png', '.cache/1.png', 'c.png/1.png')
  for name in ('e0.png', 'e1.png', 'e2.png', 'e3.png'):
    (tmp_path / name).touch()
  (tmp_path / 'page.jpg').write_bytes(b'<html>')
  (tmp_path / 'new.svg').write_bytes(b'<svg>')
  for name in ('notes.txt', 'labels.csv', '.DS_Store', '00.npy'):
    (tmp_path / name).write_bytes(b'x')
  (tmp_path / 'gone.png').symlink_to(tmp_path / 'nothing.png')
  (tmp_path / 'moved').symlink_to(tmp_path / 'no_such_folder')
  os.mkfifo(tmp_path / 'pipe.png')
  with caplog.at_level(logging.WARNING):
    splits = pictures.open_folder(root)
    assert pictures.open_folder(root) == splits
  assert sorted(names(splits['train'] + splits['test'])) == good
  (record,) = caplog.records
  assert record.getMessage() == (
    'Not all files are used, 13 skipped: 2 x hidden file (._x.png, .hidden.png), '
    '1 x hidden folder (.cache), 1 x folder named .png (c.png), '
    '4 x empty file (e0.png, e1.png, e2.png, ...), 2 x broken link (gone.png, moved), '
    '1 x unsupported format .svg (new.svg), 1 x not a picture (page.jpg), '
    '1 x not a regular file (pipe.png).'
  )


def test_large_and_unreadable_headers_are_skipped(folder, tmp_path, caplog, recwarn):
  root = folder('1.png', '2.png')
  for name, width in (('bomb.png', 20_000), ('large.png', 10_001), ('just.png', 10_000)):
    (tmp_path / name).write_bytes(png(8, 0, b'', (width, 10_000)))
  Image.new('LAB', (2, 2)).save(tmp_path / 'lab.tif')
  files = {file.name: file.fault for file in pictures.check_headers(pictures.list_files(root))}
  assert files == {
    '1.png': '',
    '2.png': '',
    'bomb.png': 'more than 100,000,000 pixels',
    'large.png': 'more than 100,000,000 pixels',
    'just.png': '',
    'lab.tif': 'colours of mode LAB',
  }
  assert not recwarn.list


def test_only_headers_are_read(folder, tmp_path, monkeypatch):
  root = folder(*(f'{i}.png' for i in range(10)))

  def load(self):
    raise AssertionError('decoded')

  monkeypatch.setattr('PIL.ImageFile.ImageFile.load', load)
  assert len(pictures.open_folder(root)['train']) == 9


def test_folder_without_a_readable_picture_is_refused_with_counts_and_reasons(folder, tmp_path):
  for i in range(7):
    (tmp_path / f'{i}.jpg').write_bytes(b'<html>')
  (tmp_path / 'empty.jpg').touch()
  reasons = r'7 x not a picture \(0.jpg, 1.jpg, 2.jpg, ...\), 1 x empty file \(empty.jpg\)'
  with pytest.raises(UserError, match=f'no picture that can be read .8 skipped: {reasons}'):
    pictures.open_folder(str(tmp_path))


def test_path_that_is_no_folder_is_refused_in_a_sentence(folder, tmp_path, monkeypatch):
  root = folder('1.png')
  for path, reason in (
    (root + '/nowhere', 'No such file or directory'),
    (root + '/1.png', 'Not a directory'),
    ('', 'No such file or directory'),
  ):
    with pytest.raises(UserError, match=f'{reason}: give a folder of pictures'):
      pictures.open_folder(path)

  def denied(path):
    raise PermissionError(13, 'Permission denied', path)

  monkeypatch.setattr(os, 'scandir', denied)
  with pytest.raises(UserError, match='Permission denied: give a folder of pictures'):
    pictures.open_folder(root)


def test_sub_folder_that_cannot_be_read_is_named(folder, monkeypatch, caplog):
  root = folder('a/1.png', 'b/2.png', 'b/3.png')
  scandir = os.scandir

  def denied(path):
    if path.endswith('a'):
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', denied)
  assert names(pictures.open_folder(root)['train']) == ['b/2.png']
  assert '1 x Permission denied (a/)' in caplog.text


# --- splits ---


def many(folder, count=20):
  return [f'{folder}/{i:02d}.png' for i in range(count)]


def test_every_tenth_picture_is_for_testing_without_folders_of_splits(folder):
  everything = [*many('a'), *many('b', 5)]
  splits = pictures.open_folder(folder(*everything))
  assert names(splits['test']) == ['a/09.png', 'a/19.png']
  assert sorted(names(splits['train'] + splits['test'])) == everything


def test_skipped_files_do_not_count_for_the_split(folder, tmp_path):
  root = folder(*many('a'))
  (tmp_path / 'a' / '00.png').write_bytes(b'<html>')
  assert names(pictures.open_folder(root)['test']) == ['a/10.png']


@pytest.mark.parametrize('count', [2, 9])
def test_last_of_fewer_than_ten_pictures_is_for_testing(folder, count):
  splits = pictures.open_folder(folder(*many('a', count)))
  assert names(splits['train']) == many('a', count)[:-1]
  assert names(splits['test']) == many('a', count)[-1:]


def test_single_picture_is_in_both_splits_with_a_warning(folder, caplog):
  splits = pictures.open_folder(folder('1.png'))
  assert names(splits['train']) == names(splits['test']) == ['1.png']
  assert '1.png, is used for training and for testing' in caplog.text


@pytest.mark.parametrize('test', ['test', 'Val', 'valid', 'VALIDATION', 'dev'])
def test_folders_of_splits_are_found_in_any_case(folder, test):
  splits = pictures.open_folder(folder(*many('Train'), *many(f'{test}/deep', 3)))
  assert names(splits['train']) == many('Train')
  assert names(splits['test']) == many(f'{test}/deep', 3)


def test_train_alone_gives_every_tenth_for_testing(folder):
  splits = pictures.open_folder(folder(*many('train')))
  assert names(splits['test']) == ['train/09.png', 'train/19.png']
  assert len(splits['train']) == 18


def test_folder_that_is_linked_into_another_split_is_in_its_own_only(folder, tmp_path):
  root = folder(*many('train', 12), *many('test', 3))
  (tmp_path / 'test' / 'a').symlink_to(tmp_path / 'train')
  splits = pictures.open_folder(root)
  assert names(splits['train']) == many('train', 12)
  assert names(splits['test']) == many('test', 3)


def test_val_beside_test_is_unused_with_a_word(folder, caplog):
  root = folder(*many('train', 3), *many('test', 2), *many('val', 2), *many('dev', 2))
  with caplog.at_level(logging.INFO, logger='absl'):
    splits = pictures.open_folder(root)
  assert names(splits['test']) == many('test', 2)
  assert "Testing uses the folder 'test'; not used: val, dev." in caplog.text


@pytest.mark.parametrize(
  ('others', 'message'),
  [
    (['train/1.png', 'extra/1.png', 'more/1.png'], "outside 'train', in 'extra', 'more'"),
    (['train/1.png', 'test/1.png', 'extra/1.png'], "outside 'train', in 'extra'"),
    (['train/1.png', 'loose.png'], "outside 'train', in the folder itself"),
    (['test/1.png', 'cats/1.png'], "has a folder 'test' but none named 'train'"),
    (['Val/1.png'], "has a folder 'Val' but none named 'train'"),
  ],
)
def test_unclear_splits_are_refused_in_a_sentence_naming_the_folders(folder, others, message):
  with pytest.raises(UserError, match=message) as error:
    pictures.open_folder(folder(*others))
  assert '\n' not in str(error.value)


def test_split_without_a_readable_picture_is_refused(folder, tmp_path):
  root = folder(*many('train'))
  (tmp_path / 'test').mkdir()
  (tmp_path / 'test' / '1.png').write_bytes(b'<html>')
  with pytest.raises(
    UserError, match="'test' holds no picture that can be read .*1 x not a picture"
  ):
    pictures.open_folder(root)


def test_empty_train_folder_is_refused(folder, tmp_path):
  (tmp_path / 'train').mkdir()
  with pytest.raises(UserError, match="its folder 'train' holds no picture .*no file ends in .png"):
    pictures.open_folder(str(tmp_path))


def test_folder_is_read_again_when_it_changes(folder):
  assert len(pictures.open_folder(folder(*many('a', 11)))['train']) == 10
  assert len(pictures.open_folder(folder(*many('a', 12)))['train']) == 11


# --- fingerprint ---


def test_fingerprint_depends_on_names_and_sizes_and_not_on_the_place(folder, tmp_path):
  folder(*many('here/a', 3))
  (tmp_path / 'there').symlink_to(tmp_path / 'here')
  here, there = (pictures.list_files(str(tmp_path / name)) for name in ('here', 'there'))
  digest = pictures.fingerprint(here)
  assert len(digest) == 64
  assert pictures.fingerprint(there[::-1]) == digest
  assert pictures.fingerprint(here[1:]) != digest
  assert pictures.fingerprint([here[0]._replace(size=1), *here[1:]]) != digest
  assert pictures.fingerprint([here[0]._replace(name='a/x.png'), *here[1:]]) != digest
