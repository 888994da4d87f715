"""NPZ files of grey levels as stores of pictures."""

import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from runtime import npz_file
from runtime.errors import UserError
from sources.stores import File, Store, register_store

# Names of the images: ours, those of our samples, and those of other programs.
_IMAGES = ('images', 'samples', 'arr_0')
_LABELS = ('labels', 'label', 'arr_1')


@register_store(name='an NPZ file')
class NpzStore(Store):
  """The array `images` of a file, uint8 (N, H, W, C) or (N, H, W), and perhaps `labels`, (N,).

  Args:
    path: of the file.
  """

  def __init__(self, path: pathlib.Path):
    try:
      arrays = npz_file.load_arrays(path, _wanted)
    except npz_file.UNREADABLE as error:
      raise UserError(f'it cannot be read as NPZ ({error}): save or copy it again.') from error
    self._images = next(arrays[name] for name in _IMAGES if name in arrays)
    self._labels = next((arrays[name] for name in _LABELS if name in arrays), None)
    shape, dtype = self._images.shape, self._images.dtype
    if (
      dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3))
    ):
      raise UserError(
        f'its images have the type {dtype} and the shape {shape}: store uint8 in (N, H, W, C) with '
        f'one or three channels C, or in (N, H, W).'
      )
    labels = self._labels
    if labels is not None and (labels.dtype.kind not in 'iu' or labels.shape != shape[:1]):
      raise UserError(
        f'its labels have the type {labels.dtype} and the shape {labels.shape}: store one whole '
        f'number for each of the {shape[0]} images.'
      )
    status = path.stat()
    self._size, self._version = status.st_size, status.st_mtime_ns

  @classmethod
  def recognises(cls, path: pathlib.Path) -> bool:
    """Whether the name ends in .npz."""
    return path.suffix.lower() == '.npz'

  def files(self) -> list[File]:
    """See `Store`; the name of an image is its number."""
    labels = [None] * len(self._images) if self._labels is None else self._labels.tolist()
    return [
      File(f'{i:08d}', self._size, self._version, label=label) for i, label in enumerate(labels)
    ]

  def read(self, file: File) -> bytes:
    """The grey levels of an image as bytes."""
    return self._images[int(file.name)].tobytes()

  def decode(self, file: File, num_channels: int, background: str) -> UInt8[np.ndarray, 'H W C']:
    """The grey levels of an image, which has as many channels as wanted or is converted."""
    del background
    image = self._images[int(file.name)]
    if image.ndim == 3 and image.shape[-1] == num_channels:
      return image
    picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    pixels = np.asarray(picture.convert('L' if num_channels == 1 else 'RGB'))
    return pixels.reshape(*pixels.shape[:2], -1)


def _wanted(names: list[str]) -> list[str]:
  if not set(_IMAGES) & set(names):
    raise ValueError(f'it has the arrays {names[:10]}, but no images')
  return [name for name in names if name in (*_IMAGES, *_LABELS)]
