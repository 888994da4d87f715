"""Data sets and their deterministic input pipeline.

The batch of step k is a pure function of (seed, k), whatever the number of processes and wherever a
run was interrupted: in each epoch the examples are shuffled by another seeded permutation, which is
computed by index (Grain), and each process reads its own rows of the global batch. Images travel to
the devices as uint8; flipping, dequantization and scaling happen on the devices, inside the
compiled step.

A data set is registered as a function from a configuration and a split ('train' or 'test') to a
random-access source whose items are {'image': uint8 (H, W, C), 'label': int}:

  @register_dataset(name='MINE')
  def mine(config, split, *, path): ...

Keyword-only parameters are keys of `config.data` that the data set adds to the common ones.

A source may have an attribute `fingerprint`, a string that differs wherever the examples do. A run
refuses to resume on data with another fingerprint.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import SupportsIndex

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from ml_collections import ConfigDict

from runtime.array_types import GreyLevels, Images, RandomKey, Scaler
from runtime.errors import UserError
from sources.arrays import ArraySource
from sources.base import ASSETS, DATASETS, Example, Source, register_dataset
from sources.folder import ImageFolder
from sources.pixels import central_crop, resize
from sources.tensorflow_datasets import TFDSSource, tfds_source

__all__ = [
  'ASSETS',
  'DATASETS',
  'Alike',
  'ArraySource',
  'Dataset',
  'Example',
  'ImageFolder',
  'Padded',
  'Preprocess',
  'Source',
  'TFDSSource',
  'central_crop',
  'check_batch_size',
  'get_data_inverse_scaler',
  'get_data_scaler',
  'get_dataset',
  'get_preprocess_fn',
  'get_source',
  'register_dataset',
  'resize',
  'tfds_source',
]

Preprocess = Callable[[RandomKey, GreyLevels], Images]


def get_data_scaler(config: ConfigDict) -> Scaler:
  """The map from [0, 1] to the range of the scaled data, for a number or an array of any shape.

  x becomes 2 x - 1, in [-1, 1], if `data.centered` is set, and else stays unchanged.
  """
  return (lambda x: x * 2.0 - 1.0) if config.data.centered else (lambda x: x)


def get_data_inverse_scaler(config: ConfigDict) -> Scaler:
  """The inverse of `get_data_scaler`."""
  return (lambda x: (x + 1.0) / 2.0) if config.data.centered else (lambda x: x)


def get_preprocess_fn(
  config: ConfigDict, uniform_dequantization: bool = False, evaluation: bool = False
) -> Preprocess:
  """Returns what is done to a batch on the devices, a function `(rng, images) -> scaled images`.

  Here `images` are uint8 grey levels, (B, H, W, C), and the result, of the same shape, is in the
  range of the scaled data. With `data.random_flip` each image is mirrored with probability 1/2.

  Args:
    config: the configuration, of which `data` is read.
    uniform_dequantization: scale (x + u) / 256 with u uniform in [0, 1), instead of x / 255.
    evaluation: never flip.
  """
  scaler = get_data_scaler(config)
  flip = config.data.random_flip and not evaluation

  def preprocess(rng: RandomKey, images: GreyLevels) -> Images:
    flip_rng, noise_rng = jax.random.split(rng)
    x = images.astype(jnp.float32)
    if flip:
      mirrored = jax.random.bernoulli(flip_rng, 0.5, (x.shape[0], 1, 1, 1))
      x = jnp.where(mirrored, x[:, :, ::-1], x)
    if uniform_dequantization:
      x = (x + jax.random.uniform(noise_rng, x.shape)) / 256.0
    else:
      x = x / 255.0
    return scaler(x)

  return preprocess


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Batches of one split.

  Attributes:
    source: the examples.
    batch_size: size of the global batch.
    seed: the seed of the order of the examples.
    shuffle: take the examples in a new permutation each epoch; else always as the source has them.
    preprocess: what the compiled step does to the images first; None for batches in host memory.
  """

  source: Source
  _: dataclasses.KW_ONLY
  batch_size: int
  seed: int
  shuffle: bool
  preprocess: Preprocess | None

  @functools.cached_property
  def _checked(self) -> 'Alike':
    return Alike(self.source)

  def _batches(self) -> grain.MapDataset:
    """This process's rows of every global batch."""
    processes = jax.process_count()
    examples = grain.MapDataset.source(self._checked)
    if self.shuffle:
      examples = examples.shuffle(seed=self.seed)
    rows = examples.repeat().batch(self.batch_size // processes)
    return rows[jax.process_index() :: processes]

  def batch(self, step: int) -> Example:
    """This process's rows of the batch of `step`: images (B, H, W, C) and labels (B,)."""
    return self._batches()[step]

  def iterate(self, start: int = 0, stride: int = 1) -> Iterator[Example]:
    """The batches of steps start, start + stride, ..., read ahead in a background thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(self._batches()[start::stride].to_iter_dataset(options))

  def once(self, start: int = 0) -> Iterator[Example]:
    """Each example once, in the order of the source: batches `start`, `start` + 1, ..., to the end.

    The last batch is padded, so that all batches have one shape; `weight`, (B,), is 1 for an
    example and 0 for padding. Each process gets its rows.
    """
    padded = Padded(self.source, self.batch_size)
    batches = dataclasses.replace(self, source=padded, shuffle=False)
    return itertools.islice(batches.iterate(start), len(self) - start)

  def __len__(self) -> int:
    """The number of batches of `once`."""
    return -(-len(self.source) // self.batch_size)

  def count(self, batch: int) -> int:
    """The number of examples in batch number `batch` of `once`, over all processes."""
    return min(self.batch_size, len(self.source) - batch * self.batch_size)

  def __iter__(self) -> Iterator[Example]:
    """The batches of steps 0, 1, ..., without end."""
    return self.iterate()


@dataclasses.dataclass(frozen=True)
class Padded:
  """A source whose length is a multiple of the batch size, since its last example is repeated.

  Its examples also have a `weight`: 1 for those of the source and 0 for repetitions.

  Attributes:
    source: the examples.
    batch_size: size of the global batch.
  """

  source: Source
  batch_size: int

  def __len__(self) -> int:
    """The length of the source, rounded up to a multiple of the batch size."""
    return -(-len(self.source) // self.batch_size) * self.batch_size

  def __getitem__(self, i: SupportsIndex) -> Example:
    """Example number `i` of the source, or beyond its end the last one, with its `weight`."""
    count = len(self.source)
    return {**self.source[min(i, count - 1)], 'weight': np.float32(i < count)}


@dataclasses.dataclass(frozen=True)
class Alike:
  """A source that makes sure that all images have the shape and type of the first one.

  Attributes:
    source: the examples.
  """

  source: Source

  def __len__(self) -> int:
    """The length of the source."""
    return len(self.source)

  def __getitem__(self, i: SupportsIndex) -> Example:
    """Returns example number `i`.

    Raises:
      UserError: if its image has another shape or type, to which a batch would silently cast it.
    """
    example = self.source[i]
    shape, dtype = _shape_and_dtype(example)
    if (shape, dtype) != self._first:
      raise UserError(
        f'Image {i} of the data set has shape {shape} and type {dtype}, but image 0 has shape '
        f'{self._first[0]} and type {self._first[1]}: give all images one shape and type.'
      )
    return example

  @functools.cached_property
  def _first(self) -> tuple[tuple[int, ...], np.dtype]:
    return _shape_and_dtype(self.source[0])


def _shape_and_dtype(example: Example) -> tuple[tuple[int, ...], np.dtype]:
  image = np.asarray(example['image'])
  return image.shape, image.dtype


def get_dataset(
  config: ConfigDict, uniform_dequantization: bool = False, evaluation: bool = False
) -> tuple[Dataset, Dataset, Source]:
  """The training and evaluation splits of `config.data.dataset`.

  Args:
    config: the configuration, of which `data`, `seed`, and the batch size of `training` or `eval`
      are read.
    uniform_dequantization: see `get_preprocess_fn`.
    evaluation: use `eval.batch_size`, and neither shuffle nor flip the training split either.

  Returns:
    The training split, the evaluation split and the source of the training examples.

  Raises:
    UserError: as `get_source` and `check_batch_size`.
  """
  field = 'eval' if evaluation else 'training'
  batch_size = config[field].batch_size
  check_batch_size(batch_size, f'{field}.batch_size')

  def make(split: str, evaluation: bool) -> Dataset:
    source = get_source(config, split)
    preprocess = get_preprocess_fn(config, uniform_dequantization, evaluation)
    return Dataset(
      source,
      batch_size=batch_size,
      seed=config.seed,
      shuffle=not evaluation,
      preprocess=preprocess,
    )

  train, test = make('train', evaluation), make('test', True)
  if not evaluation:  # training looks at another evaluation batch each time
    test = dataclasses.replace(test, shuffle=True)
  return train, test, train.source


def get_source(config: ConfigDict, split: str) -> Source:
  """The examples of one split, 'train' or 'test', of `config.data.dataset`.

  Raises:
    UserError: if the data set or the split is unknown or the split is empty, or if the images are
      not uint8 or not of the configured shape.
  """
  if split not in ('train', 'test'):
    raise UserError(f"Unknown split {split!r}: use 'train' or 'test'.")
  source = DATASETS.build(config.data.dataset, config.data, config, split)
  if not len(source):
    raise UserError(
      f'The split {split!r} of the data set {config.data.dataset} is empty: give it an example.'
    )
  _check_image(source[0]['image'], config)
  return source


def check_batch_size(batch_size: int, field: str) -> None:
  """Refuses a batch that cannot be split into equal shares for all devices.

  Args:
    batch_size: size of the global batch.
    field: its name, for the error.

  Raises:
    UserError: unless `batch_size` is a positive multiple of the number of devices.
  """
  devices = jax.device_count()
  if batch_size < 1 or batch_size % devices:
    raise UserError(
      f'{field}={batch_size} cannot be split over {devices} devices: use a multiple of {devices}.'
    )


def _check_image(image: Shaped[np.ndarray, '...'], config: ConfigDict) -> None:
  data = config.data
  expected = (data.image_size, data.image_size, data.num_channels)
  if image.dtype != np.uint8:
    raise UserError(
      f'The data set {data.dataset} has images of type {image.dtype}, not uint8: '
      f'let its source scale them to 0..255 and return uint8.'
    )
  if image.shape != expected:
    raise UserError(
      f'The data set {data.dataset} has images of shape {image.shape}, but the configuration says '
      f'{expected}: set data.image_size and data.num_channels to match.'
    )
