"""Encoded pictures: what their pixels become in uint8, whatever the file format.

- A grey level v of 16 bits becomes v / 257, and a float x, which has to be in [0, 1], becomes
  255 x; both are rounded. Of colours with 16 bits per channel Pillow reads the upper 8 bits.
- Transparent pixels are blended with a background.
- The orientation in EXIF is applied.
- An animation or a file of several pages is represented by its first frame.
- CMYK and palettes become RGB.
"""

import contextlib
import io
import struct

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageChops, ImageColor, ImageOps

from runtime.errors import UserError
from sources.base import BadPicture

MAX_PIXELS = 100_000_000

_WIDE_MODES = ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N', 'F')
_MODES = (*_WIDE_MODES, '1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBX', 'RGBA', 'RGBa', 'CMYK', 'YCbCr')


def check_background(colour: str) -> None:
  """Checks the colour that transparent pixels are blended with.

  Raises:
    UserError: unless it is a colour that Pillow knows.
  """
  try:
    ImageColor.getrgb(colour)
  except ValueError as error:
    raise UserError(
      f"data.background={colour!r} is no colour: set a name such as 'white', or '#rrggbb'."
    ) from error


def decode(
  content: bytes, num_channels: int, background: str = 'white'
) -> UInt8[np.ndarray, 'H W C']:
  """Decodes a picture by the rules of this module.

  Args:
    content: the bytes of its file.
    num_channels: 1 for grey; else RGB.
    background: the colour behind transparent pixels.

  Returns:
    Grey levels, uint8 (height, width, channels).

  Raises:
    BadPicture: if the file is damaged, no picture, too large, or has values outside the range of
      its type.
  """
  if not content:
    raise BadPicture('empty file')
  try:
    with Image.open(io.BytesIO(content)) as image:
      _check_header(image)
      _scale_transparent_colour(image)
      image.load()
      _turn_upright(image)
      pixels = _on_background(_to_8_bits(_with_true_inks(image)), background)
      pixels = pixels.convert('L' if num_channels == 1 else 'RGB')
      return np.asarray(pixels).reshape(*pixels.size[::-1], -1)
  except BadPicture:
    raise
  except Image.UnidentifiedImageError as error:
    raise BadPicture('not a picture') from error
  except Image.DecompressionBombError as error:
    raise BadPicture(f'more than {MAX_PIXELS:,} pixels') from error
  except Exception as error:  # decoders raise many kinds of errors at damaged data
    raise BadPicture((str(error) or type(error).__name__).splitlines()[0]) from error


def _check_header(image: Image.Image) -> None:
  """Refuses a picture before its pixels are decoded."""
  if image.width * image.height > MAX_PIXELS:
    raise BadPicture(f'more than {MAX_PIXELS:,} pixels')
  if image.mode not in _MODES:
    raise BadPicture(f'colours of mode {image.mode}')


def _scale_transparent_colour(image: Image.Image) -> None:
  """Scales a PNG's transparent grey level or colour to 8 bits, as Pillow does with its pixels."""
  if image.format != 'PNG' or 'transparency' not in image.info:
    return
  colour = image.info['transparency']
  scale = {'L;2': 85, 'L;4': 17, 'RGB;16B': 1 / 256}.get(image.tile[0].args)
  if scale:
    scaled = (np.asarray(colour) * scale).astype(int).tolist()
    image.info['transparency'] = tuple(scaled) if isinstance(colour, tuple) else scaled


def _turn_upright(image: Image.Image) -> None:
  # EXIF that cannot be parsed says nothing about the orientation.
  with contextlib.suppress(SyntaxError, ValueError, LookupError, struct.error):
    ImageOps.exif_transpose(image, in_place=True)


def _with_true_inks(image: Image.Image) -> Image.Image:
  """Pillow takes every CMYK JPEG for inverted, which only those with Adobe's marker are."""
  inverted = image.format == 'JPEG' and image.mode == 'CMYK' and 'adobe' not in image.info
  return ImageChops.invert(image) if inverted else image


def _to_8_bits(image: Image.Image) -> Image.Image:
  if image.mode not in _WIDE_MODES:
    return image
  tags = getattr(image, 'tag_v2', {})  # of TIFF
  twelve_bits = tags.get(ExifTags.Base.BitsPerSample) == (12,)
  peak = 1 if image.mode == 'F' else 4095 if twelve_bits else 65535
  values = np.asarray(image)
  if not ((values >= 0) & (values <= peak)).all():  # both comparisons are false for NaN
    raise ValueError(f'it has values from {values.min()} to {values.max()}, not within 0 to {peak}')
  levels = np.rint(values * (255 / peak)).astype(np.uint8)
  if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
    levels = 255 - levels
  grey = Image.fromarray(levels)
  if 'transparency' not in image.info:
    return grey
  opaque = np.where(values == image.info['transparency'], 0, 255).astype(np.uint8)
  return Image.merge('LA', (grey, Image.fromarray(opaque)))


def _on_background(image: Image.Image, colour: str) -> Image.Image:
  if not image.has_transparency_data:
    return image
  ground = Image.new('RGBA', image.size, colour)
  return Image.alpha_composite(ground, image.convert('RGBA'))
