"""The parts of data sets: examples, sources of them, and the registry of data sets."""

import pathlib
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np

from runtime.registry import Registry

DATASETS = Registry('data set')
register_dataset = DATASETS.register

ASSETS = pathlib.Path(__file__).parent.parent / 'assets'

# 'image', 'label' and what else a source knows of an example; a batch has an axis more in front.
Example = dict[str, np.ndarray | np.generic | int]


@runtime_checkable
class Source(Protocol):
  """Examples by number; anything with these two methods will do.

  It may also have an attribute `fingerprint`, a string that differs wherever the examples do.
  """

  def __len__(self) -> int:
    """The number of examples."""
    ...

  def __getitem__(self, i: SupportsIndex, /) -> Example:
    """Example number `i`: 'image', uint8 (H, W, C), and 'label', an integer."""
    ...
