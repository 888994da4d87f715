"""Decoding: what the pixels of pictures of every kind become, and why some are not used."""

import concurrent.futures
import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from runtime.errors import UserError
from sources import pictures
from sources.base import BadPicture
from sources.framing import Framing

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
FORMATS = {'jpg': 'jpeg', 'tif': 'tiff'}


def encode(pixels, suffix, mode=None, **options):
  """A picture file, its pixels given as an array or as a picture of Pillow's."""
  image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
  file = io.BytesIO()
  (image.convert(mode) if mode else image).save(file, FORMATS.get(suffix, suffix), **options)
  return file.getvalue()


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
def test_16_bit_grey_is_divided_by_257(suffix):
  values = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
  content = encode(values, suffix)
  grey = pictures.decode(content, 1)
  assert grey.shape == (64, 64, 1)
  assert grey.dtype == np.uint8
  np.testing.assert_array_equal(grey[..., 0], np.rint(values / 257.0))
  np.testing.assert_array_equal(pictures.decode(content, 3), np.repeat(grey, 3, -1))


def test_32_bit_grey_is_divided_by_257_and_refused_outside_16_bits():
  values = np.linspace(0, 65535, 256).astype(np.int32).reshape(16, 16)
  grey = pictures.decode(encode(values, 'tif'), 1)[..., 0]
  np.testing.assert_array_equal(grey, np.rint(values / 257.0))
  for strange in (-1, 65536):
    values[3, 4] = strange
    with pytest.raises(BadPicture, match='^values outside 0 to 65535$'):
      pictures.decode(encode(values, 'tif'), 1)


def test_float_is_multiplied_by_255_and_refused_outside_0_to_1():
  values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
  grey = pictures.decode(encode(values, 'tif'), 1)[..., 0]
  np.testing.assert_array_equal(grey, RAMP)
  for strange in (-0.01, 1.01, np.nan, np.inf):
    values[3, 4] = strange
    with pytest.raises(BadPicture, match='^values outside 0 to 1$'):
      pictures.decode(encode(values, 'tif'), 1)


def test_wide_tiff_of_12_bits_or_with_white_as_zero_is_scaled_by_its_tags():
  data = encode(np.array([[0, 13107, 65535]], np.uint16), 'tif')

  def with_tag(number, value):
    old = data.index(struct.pack('<HHI', number, 3, 1)) + 8
    changed = data[:old] + struct.pack('<H', value) + data[old + 2 :]
    return pictures.decode(changed, 1).ravel().tolist()

  assert with_tag(262, 1) == [0, 51, 255]
  assert with_tag(262, 0) == [255, 204, 0]
  data = encode(np.array([[0, 0x033, 0xFFF]], np.uint16), 'tif')
  assert with_tag(258, 12)[:2] == [0, 3]


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
def test_alpha_is_composed_on_white(mode, suffix, num_channels):
  alpha = RAMP.T
  grey = np.full_like(RAMP, 60)
  pixels = np.stack([grey] * (len(mode) - 1) + [alpha], -1)
  options = {'lossless': True, 'exact': True} if suffix == 'webp' else {}
  image = pictures.decode(encode(pixels, suffix, **options), num_channels)
  a = alpha[..., None] / 255.0
  np.testing.assert_allclose(image, np.broadcast_to(60 * a + 255 * (1 - a), image.shape), atol=1)
  assert (image[alpha == 0] == 255).all()


def test_alpha_is_composed_on_the_colour_that_is_named():
  pixels = np.array([[[200, 100, 0, 0], [200, 100, 0, 128], [200, 100, 0, 255]]], np.uint8)
  image = pictures.decode(encode(pixels, 'png'), 3, 'navy')  # (0, 0, 128)
  expected = [[0, 0, 128], [200 * 128 / 255, 100 * 128 / 255, 128 * 127 / 255], [200, 100, 0]]
  np.testing.assert_allclose(image[0], expected, atol=1)
  np.testing.assert_array_equal(image, pictures.decode(encode(pixels, 'png'), 3, '#000080'))
  grey = np.array([[1000, 2570]], '>u2').tobytes()
  content = png(16, 0, grey, (2, 1), transparent=b'\x03\xe8')
  assert pictures.decode(content, 3, 'navy')[0].tolist() == [[0, 0, 128], [10, 10, 10]]


def test_background_that_is_no_colour_is_refused():
  for background in ('white', '#fff', 'hsl(0, 50%, 50%)'):
    pictures.check_background(background)
  for background in ('wite', '', '#12', '#00000000'):
    with pytest.raises(
      UserError, match=f"data.background='{background}' is not a colour: give a nam"
    ):
      pictures.check_background(background)


@pytest.mark.parametrize('suffix', ['png', 'gif'])
def test_transparent_colour_of_a_palette_is_white(suffix):
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
  image.putpalette([10, 20, 30, 0, 200, 0, 40, 50, 60])
  decoded = pictures.decode(encode(image, suffix, transparency=1), 3)[0].tolist()
  assert decoded == [[10, 20, 30], [255, 255, 255], [40, 50, 60]]


def test_palette_with_one_alpha_for_each_colour_is_composed_on_white():
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
  image.putpalette([0, 0, 0, 0, 200, 0, 40, 50, 60])
  content = encode(image, 'png', transparency=bytes([128, 0, 255]))
  decoded = pictures.decode(content, 3)[0].tolist()
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
  depth, colour_type, row, transparent, expected
):
  samples = np.array(row, '>u2' if depth == 16 else np.uint8).tobytes()
  transparent = np.array(transparent, '>u2').tobytes()
  content = png(depth, colour_type, samples, (2, 1), transparent)
  assert pictures.decode(content, 1).ravel().tolist() == expected


# What a picture of each orientation stores of the one that is to be seen.
STORED = {
  1: lambda upright: upright,
  2: lambda upright: upright[:, ::-1],
  3: lambda upright: upright[::-1, ::-1],
  4: lambda upright: upright[::-1],
  5: lambda upright: upright.T,
  6: lambda upright: upright.T[::-1],
  7: lambda upright: upright.T[::-1, ::-1],
  8: lambda upright: upright.T[:, ::-1],
}


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
def test_orientation_is_applied_once(suffix):
  upright = np.zeros((24, 32), np.uint8)
  upright[:8, :8] = 255  # a mark at the top left
  upright[:8, 24:] = 100  # and another one beside it
  for orientation, stored in STORED.items():
    exif = Image.Exif()
    exif[0x112] = orientation
    content = encode(np.ascontiguousarray(stored(upright)), suffix, exif=exif, quality=95)
    np.testing.assert_allclose(pictures.decode(content, 1)[..., 0], upright, atol=25)


def test_orientation_of_16_bit_grey_is_applied():
  exif = Image.Exif()
  exif[0x112] = 6
  content = encode(np.array([[0, 257, 514]], np.uint16), 'png', exif=exif)
  assert pictures.decode(content, 1).ravel().tolist() == [0, 1, 2]
  assert pictures.decode(content, 1).shape == (3, 1, 1)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
def test_exif_that_cannot_be_parsed_leaves_the_picture_as_it_is(suffix):
  content = encode(np.full((8, 8), 80, np.uint8), suffix, exif=b'Exif\0\0rubbish')
  np.testing.assert_allclose(pictures.decode(content, 1), 80, atol=2)


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
    pytest.param(
      'YCbCr',
      'tif',
      marks=pytest.mark.skipif(
        int(PIL.__version__.split('.')[0]) < 13, reason='Pillow refused these before version 13'
      ),
    ),
  ],
)
def test_colours_of_every_kind_become_rgb_or_grey(mode, suffix):
  pixels = np.full((16, 16, 3), COLOUR, np.uint8)
  content = encode(pixels, suffix, mode, quality=95)
  np.testing.assert_allclose(pictures.decode(content, 3), pixels, atol=4)
  np.testing.assert_allclose(pictures.decode(content, 1), LUMA, atol=4)


def test_inks_of_a_jpeg_are_inverted_with_the_marker_of_adobe_only():
  inks = np.full((16, 16, 4), [30, 80, 160, 40], np.uint8)
  marked = encode(Image.fromarray(inks, 'CMYK'), 'jpg', quality=100)
  start = marked.index(b'\xff\xee')
  assert marked[start + 4 : start + 9] == b'Adobe'
  end = start + 2 + int.from_bytes(marked[start + 2 : start + 4], 'big')
  plain = marked[:start] + marked[end:]
  # Pillow has stored 255 - ink, which the marker says; without it these are the inks.
  for content, stored in ((marked, inks), (plain, 255 - inks)):
    amount = stored[..., :3] / 255.0
    black = stored[..., 3:] / 255.0
    expected = 255 * (1 - amount) * (1 - black)
    np.testing.assert_allclose(pictures.decode(content, 3), expected, atol=3)


@pytest.mark.parametrize('suffix', ['png', 'tif', 'bmp'])
def test_one_bit_becomes_black_and_white(suffix):
  pixels = np.array([[0, 255, 255, 0]], np.uint8)
  np.testing.assert_array_equal(pictures.decode(encode(pixels, suffix, '1'), 1)[..., 0], pixels)


def test_16_bit_colour_keeps_what_8_bits_can_hold():
  row = np.array([0, 65535, 77 * 257], '>u2').tobytes()
  assert pictures.decode(png(16, 2, row, (1, 1)), 3).ravel().tolist() == [0, 255, 77]


@pytest.mark.parametrize('suffix', ['gif', 'webp', 'png', 'tif'])
def test_first_frame_stands_for_the_whole(suffix):
  frames = [Image.new('RGB', (16, 16), colour) for colour in (COLOUR, 'blue', 'white')]
  content = encode(frames[0], suffix, save_all=True, append_images=frames[1:])
  image = pictures.decode(content, 3)
  np.testing.assert_allclose(image, np.broadcast_to(COLOUR, image.shape), atol=4)


# --- pictures that cannot be used ---


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'tif', 'gif', 'webp'])
def test_truncated_file_is_damaged(suffix):
  content = encode(NOISE, suffix)
  with pytest.raises(BadPicture, match='^(damaged: .*|not a picture)$') as error:
    pictures.decode(content[: len(content) // 2], 3)
  assert '\n' not in str(error.value)


def test_reasons_of_files_cut_in_several_places_are_the_same():
  content = encode(NOISE, 'jpg')
  reasons = set()
  for length in range(len(content) // 2, len(content) - 100, 500):
    with pytest.raises(BadPicture) as error:
      pictures.decode(content[:length], 3)
    reasons.add(str(error.value))
  assert reasons == {'damaged: image file is truncated'}


# The cache builder ignores it likewise; `MAX_PIXELS` is our own limit.
large = pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')


@large
@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    (b'', 'empty file'),
    (b'a text that is named .png', 'not a picture'),
    (b'<html>', 'not a picture'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not a picture'),
    (png(8, 0, b'', (20_000, 20_000)), 'more than 100,000,000 pixels'),
    (png(8, 0, b'', (10_001, 10_000)), 'more than 100,000,000 pixels'),
    (encode(Image.new('LAB', (2, 2)), 'tif'), 'colours of mode LAB'),
  ],
  ids=['nothing', 'text', 'page', 'eps', '400 million', '100 million', 'lab'],
)
def test_what_is_no_usable_picture_has_a_reason(content, reason):
  with pytest.raises(BadPicture) as error:
    pictures.decode(content, 3)
  assert str(error.value) == reason


@large
def test_size_is_refused_before_anything_is_decoded(monkeypatch):
  def load(self):
    raise AssertionError('decoded')

  monkeypatch.setattr('PIL.ImageFile.ImageFile.load', load)
  with pytest.raises(BadPicture, match='more than'):
    pictures.decode(png(8, 0, b'', (12_000, 10_000)), 1)


def test_small_picture_is_decoded_and_refused_by_the_framing():
  image = pictures.decode(encode(NOISE[:3, :4], 'png'), 3)
  np.testing.assert_array_equal(image, NOISE[:3, :4])
  with pytest.raises(BadPicture, match='^smaller than 28 pixels$'):
    Framing(28)(image)


def test_several_threads_decode_what_one_does():
  contents = [encode(NOISE[:, i:], suffix) for i in range(8) for suffix in ('jpg', 'png', 'webp')]
  expected = [pictures.decode(content, 3) for content in contents]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    images = list(pool.map(lambda content: pictures.decode(content, 3), contents * 4))
  for image, want in zip(images, expected * 4, strict=True):
    np.testing.assert_array_equal(image, want)
