"""NumPy .npz files as stores of pictures."""

import io
import pathlib

import numpy as np
from PIL import Image

from runtime import npz_file
from runtime.errors import UserError
from sources.stores import File, Store, register_store

# The arrays of images in an .npz file, of which the first one is taken, and those of their labels.
_ARRAYS = {'images': 'labels', 'samples': 'labels', 'arr_0': 'arr_1'}


@register_store(name='a NumPy .npz file')
class ArrayStore(Store):
  """The images in an .npz file; the name of each is its number.

  They are `images`, uint8 (N, H, W, C) or (N, H, W), with perhaps `labels`, (N,); or `samples`; or
  `arr_0` with perhaps `arr_1` as its labels, as `np.savez` names them.

  Args:
    path: the file.
  """

  def __init__(self, path: pathlib.Path):
    self._version = path.stat().st_mtime_ns
    try:
      arrays = npz_file.load_arrays(path, _chosen)
    except npz_file.UNREADABLE as error:
      raise UserError(f'it cannot be used ({error}): write it with np.savez.') from error
    self._images, *labels = arrays.values()
    shape, dtype = self._images.shape, self._images.dtype
    channels = shape[3] if len(shape) == 4 else 1
    floats = ', for floats in [0, 1] 255 times their values, rounded' if dtype.kind == 'f' else ''
    if dtype != np.uint8 or len(shape) not in (3, 4) or channels not in (1, 2, 3, 4):
      raise UserError(
        f'its images have type {dtype} and shape {shape}: give uint8 (N, H, W, C) with 1 or 3 '
        f'channels, and alpha as one more{floats}.'
      )
    self._labels = labels[0] if labels else None
    if labels and (labels[0].shape != shape[:1] or labels[0].dtype.kind not in 'iu'):
      raise UserError(
        f'its labels have type {labels[0].dtype} and shape {labels[0].shape}: give whole numbers, '
        f'{shape[:1]}.'
      )

  @classmethod
  def recognises(cls, path: pathlib.Path) -> bool:
    """Whether the name ends in .npz."""
    return path.suffix.lower() == '.npz'

  def files(self) -> list[File]:
    """See `Store`."""
    labels = [None] * len(self._images) if self._labels is None else self._labels.tolist()
    return [File(f'{i:08d}', version=self._version, label=label) for i, label in enumerate(labels)]

  def read(self, file: File) -> bytes:
    """An image as an uncompressed PNG."""
    image = self._images[int(file.name)]
    png = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(
      png, 'png', compress_level=0
    )
    return png.getvalue()


def _chosen(names: list[str]) -> list[str]:
  images = next((name for name in _ARRAYS if name in names), None)
  if images is None:
    raise ValueError(f'of its arrays, {", ".join(names)}, none is named {" or ".join(_ARRAYS)}')
  return [name for name in (images, _ARRAYS[images]) if name in names]
