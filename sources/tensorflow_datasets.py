"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from runtime.errors import UserError
from sources.base import Example, register_dataset
from sources.pixels import central_crop, resize


@dataclasses.dataclass(frozen=True)
class TFDSSource:
  """A split of a TensorFlow Datasets builder, read without TensorFlow.

  Attributes:
    source: a `tfds.data_source`, whose items have 'image' and perhaps 'label'.
    transform: from a stored image to the uint8 array that the network is trained on.
  """

  source: Sequence[Any]
  transform: Callable[[np.ndarray], np.ndarray]

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> Example:
    example = self.source[int(i)]
    return {
      'image': self.transform(np.asarray(example['image'])),
      'label': np.int32(example.get('label', 0)),
    }


def tfds_source(
  name: str,
  split: str,
  transform: Callable[[np.ndarray], np.ndarray],
  data_dir: str | pathlib.Path | None = None,
) -> TFDSSource:
  """Opens a data set that TensorFlow Datasets has prepared, and prepares it if it can.

  Args:
    name: of the builder.
    split: 'train', 'test', ...
    transform: see `TFDSSource`.
    data_dir: where it is; None takes TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    UserError: if it is neither there nor can be made here.
  """
  # Here, because it takes seconds to import and most runs do without.
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  try:
    builder.download_and_prepare()
    source = builder.as_data_source(split)
  except Exception as error:
    raise UserError(
      f'The data set {name!r} is not in {builder.data_dir} and could not be prepared '
      f'({type(error).__name__}: {str(error).splitlines()[0] if str(error) else "no message"}): '
      f'run `tfds build {name} --file_format=array_record` where there is a network and copy it '
      f'there, or set TFDS_DATA_DIR to where it is.'
    ) from error
  return TFDSSource(source, transform)


@register_dataset(name='CIFAR10')
def cifar10(config: ConfigDict, split: str) -> TFDSSource:
  """CIFAR-10 through TensorFlow Datasets."""
  size = config.data.image_size
  return tfds_source('cifar10', split, lambda image: resize(image, size))


@register_dataset(name='SVHN')
def svhn(config: ConfigDict, split: str) -> TFDSSource:
  """The cropped digits of Street View House Numbers through TensorFlow Datasets."""
  size = config.data.image_size
  return tfds_source('svhn_cropped', split, lambda image: resize(image, size))


@register_dataset(name='CELEBA')
def celeba(config: ConfigDict, split: str) -> TFDSSource:
  """CelebA through TensorFlow Datasets, the central 140 pixels; tested on its validation split."""
  size = config.data.image_size
  return tfds_source(
    'celeb_a', _validation(split), lambda image: resize(central_crop(image, 140), size)
  )


@register_dataset(name='LSUN')
def lsun(config: ConfigDict, split: str, *, category: str = '') -> TFDSSource:
  """One category of LSUN through TensorFlow Datasets; tested on its validation split.

  Raises:
    UserError: without a category.
  """
  if not category:
    raise UserError(
      "data.dataset='LSUN' needs a data.category, such as 'bedroom' or 'church_outdoor'."
    )
  size = config.data.image_size
  return tfds_source(
    f'lsun/{category}', _validation(split), lambda image: resize(central_crop(image), size)
  )


def _validation(split: str) -> str:
  """The split of data sets that published numbers evaluate on their validation split."""
  return 'validation' if split == 'test' else split
