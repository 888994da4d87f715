"""Pictures that are in memory as arrays."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8


@dataclasses.dataclass(frozen=True)
class ArrayPictures:
  """Pictures of one size, held in memory; see `sources.base.Pictures`.

  Attributes:
    images: grey levels, uint8 (N, H, W, C).
    labels: (N,).
    key: a string that differs wherever the arrays differ.
    names: what each picture is called in messages; empty for its number.
    class_names: names of the labels.
    skipped: name and reason of pictures that were left out.
  """

  images: UInt8[np.ndarray, 'N H W C']
  labels: Integer[np.ndarray, ' N']
  _: dataclasses.KW_ONLY
  key: str
  names: Sequence[str] = ()
  class_names: Sequence[str] = ()
  skipped: Sequence[tuple[str, str]] = ()

  def __len__(self) -> int:
    """The number of pictures."""
    return len(self.images)

  def name(self, i: int) -> str:
    """The name of picture number `i`."""
    return self.names[i] if len(self.names) else f'image {i}'

  def read(self, i: int) -> tuple[UInt8[np.ndarray, 'H W C'], int]:
    """Picture number `i` and its label."""
    return self.images[i], int(self.labels[i])
