"""The parts of data sets: examples, stored pictures, and the registry of data sets.

Data reach a network in two steps. A data set lists the `Pictures` that it stores, of any size, some
of them perhaps damaged. `sources.cache` reads each of them once, crops and resizes it, and keeps
the result in a folder; what it returns is a `Source`, from which `datasets` makes batches. A data
set whose examples need no such step is a `Source` itself.
"""

import abc
import pathlib
from collections.abc import Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Float, Integer, UInt8

from runtime.registry import Registry

DATASETS = Registry('data set')
register_dataset = DATASETS.register

# The modules of the data sets, which are imported when one is used.
DATASETS.locate('sources.arrays', 'MNIST5K')
DATASETS.locate('sources.own_pictures', 'ImageFolder')
DATASETS.locate('sources.cifar10', 'CIFAR10')
DATASETS.locate('sources.svhn', 'SVHN')
DATASETS.locate('sources.celeba', 'CELEBA')
DATASETS.locate('sources.lsun', 'LSUN')
DATASETS.locate('sources.faces', 'FFHQ', 'CelebAHQ')
DATASETS.locate('sources.tensorflow_datasets', 'TFDS')

ASSETS = pathlib.Path(__file__).parent.parent / 'assets'

# 'image', 'label' and what else a source knows of an example; a batch has one more axis, in front.
Example = dict[str, np.ndarray | np.generic | int]


class BadPicture(ValueError):
  """A stored picture that cannot be used, and is skipped; the message is the reason."""


@runtime_checkable
class Source(Protocol):
  """Examples by number; anything with these two methods will do.

  It may also have

  - an attribute `fingerprint`, a string that differs wherever the examples do;
  - an attribute `class_names`, the names of the labels 0, 1, ...;
  - a method `gather(indices, draws) -> batch`, which reads several examples at once and is then
    used in place of `__getitem__`. `indices`, (B,), are integers; `draws`, (B,), are uniform in
    [0, 1) and decide whatever is random about an example, or None if nothing is to be random, as
    with `data.on_device`.
  """

  def __len__(self) -> int:
    """The number of examples."""
    ...

  def __getitem__(self, i: SupportsIndex, /) -> Example:
    """Example number `i`: 'image', uint8 (H, W, C), and 'label', an integer."""
    ...


class BatchReader(abc.ABC):
  """A source that reads batches, for which an example is a batch of one."""

  @abc.abstractmethod
  def gather(
    self, indices: Integer[np.ndarray, ' B'], draws: Float[np.ndarray, ' B'] | None = None
  ) -> Example:
    """See `Source`."""

  def __getitem__(self, i: SupportsIndex) -> Example:
    """Example number `i`."""
    return {key: value[0] for key, value in self.gather(np.asarray([int(i)])).items()}


def mapped(path: pathlib.Path) -> UInt8[np.ndarray, ' bytes']:
  """The bytes of a file, mapped into memory."""
  # A plain array over the mapped file: slices of a memmap are ten times slower.
  return np.asarray(np.memmap(path, np.uint8, 'r'))


@runtime_checkable
class Pictures(Protocol):
  """The pictures of one split as a data set stores them, before they are cropped and resized.

  Attributes:
    key: a string that differs wherever the stored files differ.
    class_names: the names of the labels 0, 1, ...; empty if the data set has no classes.
    skipped: name and reason of each file that was left out before it was read.
  """

  key: str
  class_names: Sequence[str]
  skipped: Sequence[tuple[str, str]]

  def __len__(self) -> int:
    """The number of pictures."""
    ...

  def name(self, i: int) -> str:
    """What picture number `i` is called in messages, such as the path of its file."""
    ...

  def read(self, i: int) -> tuple[UInt8[np.ndarray, 'H W C'], int]:
    """Picture number `i` and its label; several threads call this at once.

    Raises:
      BadPicture: if the picture is damaged.
    """
    ...
