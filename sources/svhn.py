"""SVHN (Street View House Numbers), http://ufldl.stanford.edu/housenumbers."""

import numpy as np
import scipy.io
from jaxtyping import Integer, UInt8
from ml_collections import ConfigDict

from runtime.errors import UserError
from sources import cache, published
from sources.array_pictures import ArrayPictures
from sources.base import register_dataset
from sources.framing import Framing

_FILES = {'train': 'train_32x32.mat', 'test': 'test_32x32.mat'}
_CLASS_NAMES = tuple('0123456789')


@register_dataset(name='SVHN')
def svhn(config: ConfigDict, split: str) -> cache.CachedPictures:
  """The cropped digits of SVHN, 73,257 and 26,032 pictures of 32 x 32 pixels.

  `data.path` is the folder of `train_32x32.mat` and `test_32x32.mat`, or one of them.
  """
  data, name = config.data, _FILES[split]
  published.check_colours(data)
  key = f'SVHN {split} {published.FILES[name].checksum}'

  def read() -> ArrayPictures:
    # Verified first: damaged files can crash the Python that SciPy reads them in.
    path = published.verified(data, name, _FILES.values())
    try:
      arrays = scipy.io.loadmat(path, variable_names=['X', 'y'])
      images, labels = _decode(arrays)
    except Exception as error:  # SciPy raises many kinds of errors on damaged files
      raise UserError(
        f'{path} cannot be read as SVHN ({str(error) or type(error).__name__}): get '
        f'{published.FILES[name].address} again.'
      ) from error
    return ArrayPictures(images, labels, key=key, class_names=_CLASS_NAMES)

  pictures = published.LazyPictures(key, read, _CLASS_NAMES)
  # Pictures are enlarged if the configuration asks for more pixels than they have.
  return cache.prepared(data, split, pictures, Framing(data.image_size, min_side=32))


def _decode(
  arrays: dict[str, object],
) -> tuple[UInt8[np.ndarray, 'N 32 32 3'], Integer[np.ndarray, ' N']]:
  """The pictures and digits of a file."""
  if 'X' not in arrays or 'y' not in arrays:
    raise ValueError('it has no arrays X and y')
  images, labels = arrays['X'], np.asarray(arrays['y']).reshape(-1)
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
    raise ValueError(f'X is {images.dtype} {images.shape}, not uint8 (32, 32, 3, N)')
  if len(labels) != images.shape[3]:
    raise ValueError(f'X has {images.shape[3]} pictures, but y has {len(labels)} labels')
  if not np.isin(labels, range(1, 11)).all():
    raise ValueError('y has labels other than the whole numbers from 1 to 10')
  # The file counts the digit 0 as class 10.
  return np.ascontiguousarray(np.moveaxis(images, 3, 0)), labels.astype(np.int64) % 10
