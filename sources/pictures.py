"""Decoding of pictures to grey levels in uint8. Whatever the file format, these rules hold:

- A grey level v of 16 bits becomes v / 257, and a float x, which has to be in [0, 1], becomes
  255 x; both are rounded. Of colours with 16 bits per channel Pillow reads the upper 8 bits.
- Transparent pixels are blended with a background of one colour.
- The orientation in EXIF is applied.
- Inks (CMYK) become red = (1 - cyan) (1 - black), and so on. A JPEG with Adobe's marker stores
  them inverted, and one without the marker as they are.
- An animation or a file of several pages is represented by its first frame.
"""

import contextlib
import io
import struct

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageChops, ImageColor, ImageOps, UnidentifiedImageError

from runtime.errors import UserError
from sources.base import BadPicture

MAX_PIXELS = 100_000_000

# Others are refused: that of EPS starts a program, for instance.
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF')
_WIDE_MODES = ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N', 'F')
_MODES = (*_WIDE_MODES, '1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBX', 'RGBA', 'RGBa', 'CMYK', 'YCbCr')


def decode(
  content: bytes, num_channels: int, background: str = 'white'
) -> UInt8[np.ndarray, 'H W C']:
  """Decodes a picture by the rules of this module; several threads may do so at once.

  Args:
    content: of the file.
    num_channels: 1 for grey; else RGB.
    background: the colour behind transparent pixels, see `check_background`.

  Returns:
    Grey levels, uint8 (height, width, channels).

  Raises:
    BadPicture: if the content is not a picture, is damaged, has more than `MAX_PIXELS` pixels, or
      has values outside the range of its type.
  """
  if not content:
    raise BadPicture('empty file')
  try:
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        raise BadPicture(f'more than {MAX_PIXELS:,} pixels')
      if image.mode not in _MODES:
        raise BadPicture(f'colours of mode {image.mode}')
      _scale_transparent_colour(image)
      image.load()
      _turn_upright(image)
      return to_channels(_inks_upright(image), num_channels, background)
  except BadPicture:
    raise
  except Image.DecompressionBombError as error:
    raise BadPicture(f'more than {MAX_PIXELS:,} pixels') from error
  except UnidentifiedImageError as error:
    raise BadPicture('not a picture') from error
  except Exception as error:  # decoders raise many kinds of errors on damaged data
    # What follows in parentheses, such as a number of bytes, is different for each file.
    reason = str(error).partition(' (')[0].partition('\n')[0]
    raise BadPicture(f'damaged: {reason or type(error).__name__}') from error


def to_channels(
  image: Image.Image, num_channels: int, background: str = 'white'
) -> UInt8[np.ndarray, 'H W C']:
  """The pixels of an opened picture, of any mode, as grey (1 channel) or RGB."""
  image = _to_8_bits(image)
  if image.has_transparency_data:
    ground = Image.new('RGBA', image.size, ImageColor.getrgb(background))
    image = Image.alpha_composite(ground, image.convert('RGBA'))
  mode = 'L' if num_channels == 1 else 'RGB'
  pixels = image if image.mode == mode else image.convert(mode)
  return np.asarray(pixels).reshape(*pixels.size[::-1], -1)


def check_background(background: str) -> None:
  """Checks the name of a colour.

  Raises:
    UserError: if Pillow does not know it, or it is transparent itself.
  """
  try:
    opaque = len(ImageColor.getrgb(background)) == 3
  except ValueError:
    opaque = False
  if not opaque:
    raise UserError(
      f"data.background={background!r} is not a colour: give a name such as 'white' or '#rrggbb'."
    )


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


def _inks_upright(image: Image.Image) -> Image.Image:
  """Undoes the inversion of inks, which Pillow assumes of every JPEG."""
  stored_as_they_are = image.format in ('JPEG', 'MPO') and 'adobe' not in image.info
  return ImageChops.invert(image) if image.mode == 'CMYK' and stored_as_they_are else image


def _to_8_bits(image: Image.Image) -> Image.Image:
  if image.mode not in _WIDE_MODES:
    return image
  tags = getattr(image, 'tag_v2', {})  # of TIFF
  twelve_bits = tags.get(ExifTags.Base.BitsPerSample) == (12,)
  peak = 1 if image.mode == 'F' else 4095 if twelve_bits else 65535
  values = np.asarray(image)
  if not ((values >= 0) & (values <= peak)).all():  # both comparisons are false for NaN
    raise BadPicture(f'values outside 0 to {peak}')
  levels = np.rint(values * (255 / peak)).astype(np.uint8)
  if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
    levels = 255 - levels
  if 'transparency' not in image.info:
    return Image.fromarray(levels)
  alpha = np.where(values == image.info['transparency'], 0, 255).astype(np.uint8)
  return Image.fromarray(np.stack([levels, alpha], -1))
