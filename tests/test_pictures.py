"""Picture files: what their pixels become, or why they are refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from runtime.errors import UserError
from sources import pictures
from sources.base import BadPicture
from sources.framing import Framing

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save(path, pixels, mode=None, **options):
  image = Image.fromarray(pixels)
  (image.convert(mode) if mode else image).save(path, **options)
  return path


def decode(path, num_channels, background='white'):
  return pictures.decode(path.read_bytes(), num_channels, background)


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
  grey = decode(path, 1)
  assert grey.shape == (64, 64, 1)
  assert grey.dtype == np.uint8
  np.testing.assert_array_equal(grey[..., 0], np.rint(values / 257.0))
  np.testing.assert_array_equal(decode(path, 3), np.repeat(grey, 3, -1))


def test_32_bit_grey_is_divided_by_257_and_refused_outside_16_bits(tmp_path):
  values = np.linspace(0, 65535, 256).astype(np.int32).reshape(16, 16)
  grey = decode(save(tmp_path / 'x.tif', values), 1)[..., 0]
  np.testing.assert_array_equal(grey, np.rint(values / 257.0))
  for strange in (-1, 65536):
    values[3, 4] = strange
    path = save(tmp_path / 'strange.tif', values)
    with pytest.raises(BadPicture, match=r'values from .* to .*not within 0 to 65535'):
      decode(path, 1)


def test_float_is_multiplied_by_255_and_refused_outside_0_to_1(tmp_path):
  values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
  grey = decode(save(tmp_path / 'x.tif', values), 1)[..., 0]
  np.testing.assert_array_equal(grey, RAMP)
  for strange in (-0.01, 1.01, np.nan, np.inf):
    values[3, 4] = strange
    path = save(tmp_path / 'strange.tif', values)
    with pytest.raises(BadPicture, match='not within 0 to 1$'):
      decode(path, 1)


def test_wide_tiff_of_12_bits_or_with_white_as_zero_is_scaled_by_its_tags(tmp_path):
  path = save(tmp_path / 'x.tif', np.array([[0, 13107, 65535]], np.uint16))
  data = path.read_bytes()

  def with_tag(number, value):
    old = data.index(struct.pack('<HHI', number, 3, 1)) + 8
    path.write_bytes(data[:old] + struct.pack('<H', value) + data[old + 2 :])
    return decode(path, 1).ravel().tolist()

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
  image = decode(save(tmp_path / f'x.{suffix}', pixels, **options), num_channels)
  a = alpha[..., None] / 255.0
  np.testing.assert_allclose(image, np.broadcast_to(60 * a + 255 * (1 - a), image.shape), atol=1)
  assert (image[alpha == 0] == 255).all()


@pytest.mark.parametrize('suffix', ['png', 'gif'])
def test_transparent_colour_of_a_palette_is_white(tmp_path, suffix):
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
  image.putpalette([10, 20, 30, 0, 200, 0, 40, 50, 60])
  image.save(tmp_path / f'x.{suffix}', transparency=1)
  decoded = decode(tmp_path / f'x.{suffix}', 3)[0].tolist()
  assert decoded == [[10, 20, 30], [255, 255, 255], [40, 50, 60]]


def test_palette_with_one_alpha_for_each_colour_is_composed_on_white(tmp_path):
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
  image.putpalette([0, 0, 0, 0, 200, 0, 40, 50, 60])
  image.save(tmp_path / 'x.png', transparency=bytes([128, 0, 255]))
  decoded = decode(tmp_path / 'x.png', 3)[0].tolist()
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
  assert decode(path, 1).ravel().tolist() == expected


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
def test_orientation_is_applied_once(tmp_path, suffix):
  upright = np.zeros((24, 32), np.uint8)
  upright[:8, :8] = 255  # a mark at the top left
  stored = {1: upright, 3: upright[::-1, ::-1], 6: upright.T[::-1], 8: upright.T[:, ::-1]}
  for orientation, pixels in stored.items():
    exif = Image.Exif()
    exif[0x112] = orientation
    path = save(tmp_path / f'x.{suffix}', np.ascontiguousarray(pixels), exif=exif, quality=95)
    image = decode(path, 1)[..., 0]
    np.testing.assert_allclose(image, upright, atol=25)


def test_orientation_of_16_bit_grey_is_applied(tmp_path):
  exif = Image.Exif()
  exif[0x112] = 6
  path = save(tmp_path / 'x.png', np.array([[0, 257, 514]], np.uint16), exif=exif)
  assert decode(path, 1).shape == (3, 1, 1)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
def test_exif_that_cannot_be_parsed_leaves_the_picture_as_it_is(tmp_path, suffix):
  path = save(tmp_path / f'x.{suffix}', np.full((8, 8), 80, np.uint8), exif=b'Exif\0\0rubbish')
  np.testing.assert_allclose(decode(path, 1), 80, atol=2)


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
  np.testing.assert_allclose(decode(path, 3), pixels, atol=4)
  np.testing.assert_allclose(decode(path, 1), LUMA, atol=4)


@pytest.mark.parametrize('suffix', ['png', 'tif', 'bmp'])
def test_one_bit_becomes_black_and_white(tmp_path, suffix):
  pixels = np.array([[0, 255, 255, 0]], np.uint8)
  path = save(tmp_path / f'x.{suffix}', pixels, '1')
  np.testing.assert_array_equal(decode(path, 1)[..., 0], pixels)


def test_16_bit_colour_keeps_what_8_bits_can_hold(tmp_path):
  path = tmp_path / 'x.png'
  row = np.array([0, 65535, 77 * 257], '>u2').tobytes()
  path.write_bytes(png(16, 2, row, (1, 1)))
  assert decode(path, 3).ravel().tolist() == [0, 255, 77]


@pytest.mark.parametrize('suffix', ['gif', 'webp', 'png', 'tif'])
def test_first_frame_stands_for_the_whole(tmp_path, suffix):
  frames = [Image.new('RGB', (16, 16), colour) for colour in (COLOUR, 'blue', 'white')]
  frames[0].save(tmp_path / f'x.{suffix}', save_all=True, append_images=frames[1:])
  image = decode(tmp_path / f'x.{suffix}', 3)
  np.testing.assert_allclose(image, np.broadcast_to(COLOUR, image.shape), atol=4)


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'tif', 'gif', 'webp'])
def test_truncated_file_is_refused(tmp_path, suffix):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  content = save(tmp_path / f'cut.{suffix}', noise).read_bytes()
  with pytest.raises(BadPicture):
    pictures.decode(content[: len(content) // 2], 3)


def test_all_eight_orientations_are_upright(tmp_path):
  upright = np.zeros((24, 32), np.uint8)
  upright[:8, :8], upright[16:, :8] = 255, 128  # marks at the top left and the bottom left
  turn = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.T,
    6: upright.T[::-1],
    7: upright.T[::-1, ::-1],
    8: upright.T[:, ::-1],
  }
  for orientation, stored in turn.items():
    exif = Image.Exif()
    exif[0x112] = orientation
    path = save(tmp_path / 'x.png', np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(decode(path, 1)[..., 0], upright, err_msg=str(orientation))


def test_cmyk_is_read_with_the_marker_of_adobe_and_without(tmp_path):
  """Adobe stores the inverse of the inks; without its marker the values are the inks."""
  inks = np.zeros((16, 16, 4), np.uint8)
  inks[:] = (0, 128, 192, 51)
  image = Image.frombytes('CMYK', (16, 16), inks.tobytes())
  image.save(tmp_path / 'x.jpg', quality=100, subsampling=0)
  content = (tmp_path / 'x.jpg').read_bytes()
  start = content.index(b'\xff\xee')  # the marker
  assert content[start + 4 : start + 9] == b'Adobe'
  length = 2 + int.from_bytes(content[start + 2 : start + 4])
  with_marker = pictures.decode(content, 3)
  expected = np.rint((255 - inks[..., :3].astype(float)) * (255 - 51) / 255)
  np.testing.assert_allclose(with_marker, expected, atol=4)
  without = pictures.decode(content[:start] + content[start + length :], 3)
  inverted = 255.0 - inks
  np.testing.assert_allclose(
    without, np.rint((255 - inverted[..., :3]) * (255 - inverted[..., 3:]) / 255), atol=4
  )


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparent_parts_take_the_colour_of_the_background(tmp_path, mode):
  image = Image.new('RGBA', (2, 1), (10, 10, 10, 255))
  image.putpixel((1, 0), (10, 10, 10, 0))
  (image if mode == 'RGBA' else image.convert(mode)).save(tmp_path / 'x.png')
  for colour, expected in (('black', [0, 0, 0]), ('#204060', [32, 64, 96])):
    decoded = decode(tmp_path / 'x.png', 3, colour)[0].tolist()
    assert decoded == [[10, 10, 10], expected]


def test_transparent_level_of_16_bit_grey_takes_the_background(tmp_path):
  row = np.array([1000, 2570], '>u2').tobytes()
  path = tmp_path / 'x.png'
  path.write_bytes(png(16, 0, row, (2, 1), np.array([1000], '>u2').tobytes()))
  assert decode(path, 1, 'black').ravel().tolist() == [0, 10]


def test_colour_that_is_none_is_refused():
  with pytest.raises(UserError, match="data.background='sky' is no colour: set a name such as"):
    pictures.check_background('sky')


@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    (b'', 'empty file'),
    (b'a text named x.png', 'not a picture'),
    (png(8, 0, b'', (20_000, 20_000)), 'more than 100,000,000 pixels'),
    (png(8, 0, b'', (10_001, 10_000)), 'more than 100,000,000 pixels'),
  ],
)
def test_what_is_no_usable_picture_is_refused_with_its_reason(content, reason, recwarn):
  with pytest.raises(BadPicture, match=f'^{reason}$'):
    pictures.decode(content, 3)


def test_huge_picture_is_refused_before_it_is_decoded(monkeypatch):
  def load(self):
    raise AssertionError('decoded')

  monkeypatch.setattr('PIL.ImageFile.ImageFile.load', load)
  with pytest.raises(BadPicture, match='more than'):
    pictures.decode(png(8, 0, b'', (10_001, 10_000)), 3)


def test_mode_that_is_not_known_is_refused(tmp_path):
  Image.new('LAB', (2, 2)).save(tmp_path / 'lab.tif')
  with pytest.raises(BadPicture, match='colours of mode LAB'):
    decode(tmp_path / 'lab.tif', 3)


# --- framing ---


def test_picture_that_is_too_small_is_refused():
  with pytest.raises(BadPicture, match='smaller than 32 pixels'):
    Framing(32)(np.zeros((3, 4, 3), np.uint8))
  assert Framing(32, min_side=3)(np.zeros((3, 4, 3), np.uint8)).shape == (32, 32, 3)
  with pytest.raises(BadPicture, match='smaller than 140 pixels'):
    Framing(64, crop_side=140)(np.zeros((139, 178, 3), np.uint8))


def stripes(height, width):
  """Columns that show their number."""
  return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3))


def test_crops_take_the_part_that_they_name():
  image = np.ascontiguousarray(stripes(40, 80))
  assert Framing(40)(image)[0, :, 0].tolist() == list(range(20, 60))
  assert Framing(40, crop='random')(image).shape == (40, 80, 3)
  squeezed = Framing(40, crop='none')(image)[0, 2:-2, 0]
  np.testing.assert_allclose(squeezed, np.arange(2, 38) * 2 + 0.5, atol=0.6)
  assert Framing(20, crop_side=20)(image)[0, :, 0].tolist() == list(range(30, 50))


@pytest.mark.parametrize('method', ['bilinear', 'bicubic', 'lanczos', 'box'])
def test_every_filter_is_antialiased(method):
  """Stripes finer than the new pixels become their mean."""
  fine = np.zeros((64, 64, 1), np.uint8)
  fine[:, ::2] = 200
  small = Framing(8, resize=method)(fine)[2:-2, 2:-2]
  np.testing.assert_allclose(small, 100, atol=2)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('crop', 'middle', "data.crop='middle' is unknown: choose one of center, none, random"),
    ('resize', 'area', "data.resize='area' is unknown: choose one of bilinear"),
    ('min_side', -1, 'data.min_side=-1 must not be negative'),
  ],
)
def test_framing_that_cannot_be_is_refused(field, value, message):
  with pytest.raises(UserError, match=message):
    Framing(32, **{field: value})
