"""Data sets that fit into memory."""

import dataclasses
import functools
import hashlib
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float, Integer, Real, Shaped
from ml_collections import ConfigDict

from sources.base import ASSETS, Example, register_dataset


@dataclasses.dataclass(frozen=True)
class ArraySource:
  """Examples held in memory.

  Attributes:
    images: grey levels, uint8 (N, H, W, C).
    labels: a whole number for each, (N,).
  """

  images: Shaped[np.ndarray, 'N H W C']
  labels: Real[np.ndarray, ' N']

  def __len__(self) -> int:
    """The number of examples."""
    return len(self.images)

  def __getitem__(self, i: SupportsIndex) -> Example:
    """Example number `i`: 'image', (H, W, C), and 'label', an int32."""
    return {'image': self.images[i], 'label': np.int32(self.labels[i])}

  def gather(
    self, indices: Integer[np.ndarray, ' B'], draws: Float[np.ndarray, ' B'] | None = None
  ) -> Example:
    """The examples `indices`: 'image', (B, H, W, C), and 'label', int32 (B,)."""
    del draws
    return {'image': self.images[indices], 'label': self.labels[indices].astype(np.int32)}

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the shapes, types and bytes of both arrays."""
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, (self.images, self.labels)):
      digest.update(f'{array.shape} {array.dtype}\n'.encode())
      digest.update(array)
    return digest.hexdigest()


@register_dataset(name='MNIST5K')
def mnist5k(config: ConfigDict, split: str) -> ArraySource:
  """5,000 MNIST digits that come with this repository, 500 of each class; see assets/README.md.

  Images are uint8 (28, 28, 1), and labels the digits; `split` is 'train' or 'test'.
  """
  del config
  with np.load(ASSETS / 'mnist5k.npz') as file:
    return ArraySource(file[f'{split}_images'], file[f'{split}_labels'])
