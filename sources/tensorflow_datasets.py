"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
from jaxtyping import Shaped, UInt8
from ml_collections import ConfigDict

from runtime.errors import UserError
from sources.base import Example, Source, register_dataset
from sources.pixels import central_crop, resize

Transform = Callable[[Shaped[np.ndarray, 'H W C']], UInt8[np.ndarray, 'size size C']]


@dataclasses.dataclass(frozen=True)
class TFDSSource:
  """A split of a TensorFlow Datasets builder, read without TensorFlow.

  Attributes:
    source: a `tfds.data_source`, whose items have 'image' and perhaps 'label'.
    transform: from a stored image, (H, W, C), to the one that the network is trained on, uint8
      (size, size, C).
  """

  source: Source
  transform: Transform

  def __len__(self) -> int:
    """The number of examples."""
    return len(self.source)

  def __getitem__(self, i: SupportsIndex) -> Example:
    """Example number `i`: the transformed 'image', and 'label', an int32 that is 0 by default."""
    example = self.source[int(i)]
    return {
      'image': self.transform(np.asarray(example['image'])),
      'label': np.int32(example.get('label', 0)),
    }


def tfds_source(
  name: str,
  split: str,
  transform: Transform,
  *,
  data_dir: str | pathlib.Path | None = None,
) -> TFDSSource:
  """Opens a data set of TensorFlow Datasets, preparing it first if necessary.

  Args:
    name: of the builder.
    split: 'train', 'test', ...
    transform: see `TFDSSource`.
    data_dir: folder of the data sets; None takes TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    UserError: if the data set has not been prepared and cannot be prepared on this machine.
  """
  # Imported here, because the import takes seconds and most runs do without it.
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  try:
    builder.download_and_prepare()
    source = builder.as_data_source(split)
  except Exception as error:
    raise UserError(
      f'The data set {name!r} is not in {builder.data_dir} and could not be prepared '
      f'({type(error).__name__}: {str(error).splitlines()[0] if str(error) else "no message"}): '
      f'run `tfds build {name} --file_format=array_record` on a machine with internet access and '
      f'copy the result to this folder, or set TFDS_DATA_DIR to the folder that has it.'
    ) from error
  return TFDSSource(source, transform)


@register_dataset(name='CIFAR10')
def cifar10(config: ConfigDict, split: str) -> TFDSSource:
  """CIFAR-10 through TensorFlow Datasets, resized to `data.image_size`."""
  size = config.data.image_size
  return tfds_source('cifar10', split, lambda image: resize(image, size))


@register_dataset(name='SVHN')
def svhn(config: ConfigDict, split: str) -> TFDSSource:
  """The cropped digits of SVHN (Street View House Numbers) through TensorFlow Datasets."""
  size = config.data.image_size
  return tfds_source('svhn_cropped', split, lambda image: resize(image, size))


@register_dataset(name='CELEBA')
def celeba(config: ConfigDict, split: str) -> TFDSSource:
  """The central 140 x 140 pixels of CelebA through TensorFlow Datasets.

  The split 'test' is the validation split of CelebA, as in published numbers.
  """
  size = config.data.image_size
  return tfds_source(
    'celeb_a', _validation(split), lambda image: resize(central_crop(image, 140), size)
  )


@register_dataset(name='LSUN')
def lsun(config: ConfigDict, split: str, *, category: str = '') -> TFDSSource:
  """The central squares of one category of LSUN through TensorFlow Datasets.

  The split 'test' is the validation split of LSUN, as in published numbers.

  Raises:
    UserError: if `data.category` is empty.
  """
  if not category:
    raise UserError(
      "data.category='' is empty, but data.dataset='LSUN' needs a data.category: set it to one "
      "such as 'bedroom' or 'church_outdoor'."
    )
  size = config.data.image_size
  return tfds_source(
    f'lsun/{category}', _validation(split), lambda image: resize(central_crop(image), size)
  )


def _validation(split: str) -> str:
  """The split of a data set whose published numbers are those of its validation split."""
  return 'validation' if split == 'test' else split
