"""Cropping and resizing of grey levels."""

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from runtime.errors import UserError


def central_crop(
  image: Shaped[np.ndarray, 'H W C'], side: int | None = None
) -> Shaped[np.ndarray, 'side side C']:
  """Crops an image, (H, W, C), to its central square, (side, side, C).

  Args:
    image: of any type.
    side: height and width of the square; None takes the smaller side of the image.

  Raises:
    UserError: if the image is smaller than the square.
  """
  height, width = image.shape[:2]
  side = side or min(height, width)
  if side > min(height, width):
    raise UserError(
      f'An image of {height} x {width} pixels has no central square of {side} x {side}: '
      f'use a smaller side.'
    )
  top, left = (height - side) // 2, (width - side) // 2
  return image[top : top + side, left : left + side]


def resize(image: Shaped[np.ndarray, 'H W C'], size: int) -> UInt8[np.ndarray, '{size} {size} C']:
  """Resizes an image, uint8 (H, W, C), to (size, size, C), bilinearly with antialiasing.

  An image that has this size is returned as it is.

  Raises:
    UserError: if the image is not uint8.
  """
  if image.dtype != np.uint8:
    raise UserError(
      f'An image of type {image.dtype} cannot be resized: '
      f'scale it to 0..255 and convert it to uint8 first.'
    )
  if image.shape[:2] == (size, size):
    return image
  channels = image[..., 0] if image.shape[-1] == 1 else image
  resized = Image.fromarray(channels).resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(resized).reshape(size, size, image.shape[-1])
