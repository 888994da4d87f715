"""Checks what users pass to a trained model, and splits arrays into batches."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Shaped

from runtime.array_types import Array, GreyLevels, Images, PerExample
from runtime.errors import UserError

_Batch = Shaped[np.ndarray, 'B H W C']


def check_images(images: Images | GreyLevels, shape: tuple[int, int, int]) -> _Batch:
  """Images as a NumPy array: uint8 grey levels, or float32 in [0, 1].

  Args:
    images: the images, (B, H, W, C).
    shape: the shape (H, W, C) that they must have.

  Raises:
    UserError: if they are no images of this shape, or none at all.
  """
  images = _check_batch(images, 'images', shape)
  if images.dtype == np.uint8:
    return images
  if not np.issubdtype(images.dtype, np.floating):
    raise UserError(
      f'images are of type {images.dtype}: pass uint8 grey levels, or floats in [0, 1].'
    )
  _check_finite(images, 'images')
  least, most = images.min(), images.max()
  if least < 0 or most > 1:
    fix = (
      'divide by 255, or pass uint8'
      if least >= 0 and most > 2
      else "map them with inverse_scaler if they are in the network's range, or clip them"
    )
    raise UserError(f'images are floats in [{least:.4g}, {most:.4g}], not in [0, 1]: {fix}.')
  return images.astype(np.float32)


def check_continuous(images: _Batch) -> None:
  """Refuses floats that are grey levels divided by 255, for which a density means nothing.

  Raises:
    UserError: if all values are multiples of 1/255.
  """
  levels = images * 255.0
  if images.dtype != np.uint8 and np.abs(levels - np.rint(levels)).max() < 1e-3:
    raise UserError(
      'images are floats that are all multiples of 1/255: pass grey levels as uint8, which spreads '
      'them evenly within each level; a density of discrete values has no bound.'
    )


def check_latents(z: Images, shape: tuple[int, int, int]) -> Float[np.ndarray, 'B H W C']:
  """Latents as a NumPy array, (B, H, W, C); `shape` is the (H, W, C) that they must have.

  Raises:
    UserError: if they are no floats of this shape, or none at all.
  """
  z = _check_batch(z, 'z', shape)
  if not np.issubdtype(z.dtype, np.floating):
    raise UserError(f'z is of type {z.dtype}: pass floats, such as those of encode().')
  _check_finite(z, 'z')
  return z.astype(np.float32)


def check_times(t: PerExample, end: float) -> None:
  """Checks times, (B,), of a diffusion that ends at the time `end`.

  Raises:
    UserError: if one of them is not in (0, end].
  """
  t = np.asarray(t)
  if wrong := t[~((t > 0) & (t <= end))].tolist():  # both comparisons are false for NaN
    raise UserError(f't has the value {wrong[0]:.4g}, but times are in (0, {end:g}]: correct it.')


def _check_batch(x: Images | GreyLevels, name: str, shape: tuple[int, int, int]) -> _Batch:
  try:
    x = np.asarray(x)
  except (TypeError, ValueError) as error:
    raise UserError(f'{name} is no array ({error}): pass an array (B, H, W, C).') from error
  size = 'x'.join(map(str, shape))
  if x.shape == shape:
    raise UserError(f'{name} is a single image of {size}: pass a batch of one, {name}[None].')
  if x.ndim != 4 or x.shape[1:] != shape:
    raise UserError(
      f'{name} is of shape {x.shape}, but the network has images of {size}: pass an array of shape '
      f'(B, {", ".join(map(str, shape))}).'
    )
  if not len(x):
    raise UserError(f'{name} has no images, shape {x.shape}: pass at least one.')
  return x


def _check_finite(x: Float[Array, 'B H W C'], name: str) -> None:
  if bad := np.flatnonzero(~np.isfinite(x).all(axis=(1, 2, 3))).tolist():
    raise UserError(
      f'{name} has values that are NaN or infinite, first in number {bad[0]}: remove it.'
    )


def as_floats(images: _Batch) -> Float[np.ndarray, 'B H W C']:
  """Grey levels divided by 255; floats as they are."""
  return images / np.float32(255) if images.dtype == np.uint8 else images


def in_parts(x: _Batch, size: int) -> Iterator[_Batch]:
  """Batches of `size`, the last filled up with its last image; `x` itself if it is smaller."""
  size = min(size, len(x))
  for start in range(0, len(x), size):
    yield x[np.minimum(np.arange(start, start + size), len(x) - 1)]
