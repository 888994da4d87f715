"""Cropping and resizing of grey levels."""

import numpy as np
from PIL import Image

from runtime.errors import UserError


def central_crop(image: np.ndarray, side: int | None = None) -> np.ndarray:
  """The central square of an image (H, W, C), as large as it can be or of the given side.

  Raises:
    UserError: if the image is smaller than that.
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


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """A uint8 image at `size` x `size`, bilinear with antialiasing; unchanged if it has that size.

  Raises:
    UserError: if the image is of another type.
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
