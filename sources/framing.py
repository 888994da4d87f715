"""Framing: cropping a picture to a square and resizing it, always with antialiasing.

Pillow resizes: each new pixel is a weighted mean over the support of the filter, scaled to the
ratio of the sizes, as in `tf.image.resize(..., antialias=True)`; results are rounded.
"""

import dataclasses

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from runtime.errors import UserError
from sources.base import BadPicture

CROPS = ('center', 'none', 'random')
FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
  'lanczos': Image.Resampling.LANCZOS,
  'box': Image.Resampling.BOX,
}

_Picture = UInt8[np.ndarray, 'H W C']


def central_crop(
  image: Shaped[np.ndarray, 'H W C'], size: int | None = None
) -> Shaped[np.ndarray, 'size size C']:
  """Crops an image, (H, W, C), to its central square, (size, size, C).

  Args:
    image: of any type.
    size: height and width of the square; None takes the smaller side of the image.

  Raises:
    UserError: if the image is smaller than the square.
  """
  height, width = image.shape[:2]
  size = size or min(height, width)
  if size > min(height, width):
    raise UserError(
      f'An image of {height} x {width} pixels has no central square of {size} x {size}: '
      f'use a smaller side.'
    )
  top, left = (height - size) // 2, (width - size) // 2
  return image[top : top + size, left : left + size]


def resize(
  image: Shaped[np.ndarray, 'H W C'], size: int | tuple[int, int], method: str = 'bilinear'
) -> UInt8[np.ndarray, 'h w C']:
  """Resizes an image, uint8 (H, W, C), with antialiasing; one that has the size stays as it is.

  Args:
    image: the image.
    size: the new height and width; one number for a square.
    method: the filter, one of `FILTERS`.

  Raises:
    UserError: if the image is not uint8, or the filter is unknown.
  """
  if image.dtype != np.uint8:
    raise UserError(
      f'An image of type {image.dtype} cannot be resized: '
      f'scale it to 0..255 and convert it to uint8 first.'
    )
  if method not in FILTERS:
    raise UserError(f'Unknown filter {method!r}: choose one of {", ".join(FILTERS)}.')
  height, width = (size, size) if isinstance(size, int) else size
  if image.shape[:2] == (height, width):
    return image
  channels = image[..., 0] if image.shape[-1] == 1 else np.ascontiguousarray(image)
  resized = Image.fromarray(channels).resize((width, height), FILTERS[method])
  return np.asarray(resized).reshape(height, width, image.shape[-1])


def resize_small(
  image: _Picture, resolution: int, method: str = 'bilinear'
) -> UInt8[np.ndarray, 'h w C']:
  """Shrinks an image, uint8 (H, W, C), until its smaller side has `resolution` pixels."""
  height, width = image.shape[:2]
  ratio = resolution / min(height, width)
  return resize(image, (round(height * ratio), round(width * ratio)), method)


def crop_resize(image: _Picture, resolution: int) -> UInt8[np.ndarray, 'resolution resolution C']:
  """Crops an image, uint8 (H, W, C), to its central square and resizes that bicubically."""
  return resize(central_crop(image), resolution, 'bicubic')


@dataclasses.dataclass(frozen=True)
class Framing:
  """What is done to a stored picture once, before it is kept: a crop and a resize.

  Attributes:
    size: height and width of the result.
    crop: 'center' takes the central square; 'none' resizes the whole picture, which distorts those
      that are not square; 'random' keeps what a square along the longer side can show: the smaller
      side becomes `size`, and training draws a different square each time.
    crop_side: side of the central square; 0 takes the smaller side of the picture.
    resize: the filter, one of `FILTERS`.
    shrink_first: shrink the smaller side to `size`, then crop, in place of the other order.
    min_side: pictures with a side smaller than this are refused; 0 takes `size`.

  Raises:
    UserError: if a name is unknown or a number is out of range.
  """

  size: int
  _: dataclasses.KW_ONLY
  crop: str = 'center'
  crop_side: int = 0
  resize: str = 'bilinear'
  shrink_first: bool = False
  min_side: int = 0

  def __post_init__(self):
    if self.crop not in CROPS:
      raise UserError(f'data.crop={self.crop!r} is unknown: choose one of {", ".join(CROPS)}.')
    if self.resize not in FILTERS:
      raise UserError(
        f'data.resize={self.resize!r} is unknown: choose one of {", ".join(FILTERS)}.'
      )
    if self.min_side < 0:
      raise UserError(f'data.min_side={self.min_side} must not be negative; 0: data.image_size.')

  def __call__(self, image: _Picture) -> UInt8[np.ndarray, 'h w C']:
    """The framed picture: (size, size, C), but for `crop='random'` one side may be longer.

    Raises:
      BadPicture: if the picture is too small.
    """
    height, width = image.shape[:2]
    smallest = max(self.min_side or self.size, self.crop_side)
    if min(height, width) < smallest:
      raise BadPicture(f'smaller than {smallest} pixels')
    if self.crop == 'none':
      return resize(image, self.size, self.resize)
    if self.crop == 'random':
      return resize_small(image, self.size, self.resize)
    if self.shrink_first:
      return central_crop(resize_small(image, self.size, self.resize), self.size)
    return resize(central_crop(image, self.crop_side or None), self.size, self.resize)
