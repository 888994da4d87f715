"""Data sets and their deterministic input pipeline.

The batch of step k is a pure function of (seed, k), whatever the number of threads and processes
and wherever a run was interrupted. In each epoch the examples are shuffled by a different seeded
permutation, which is computed by index (Grain), and each process reads its own rows of the global
batch. Images travel to the devices as uint8; flipping, dequantization and scaling happen on the
devices, inside the compiled step. With `data.on_device` all images are there from the start, and
only the numbers of the examples travel.

A data set is registered as a function from a configuration and a split ('train' or 'test') to a
random-access source whose items are {'image': uint8 (H, W, C), 'label': int}:

    @register_dataset(name='MINE')
    def mine(config, split, *, path): ...

Keyword-only parameters are keys of `config.data` that the data set adds to the common ones. See
`sources.base.Source` for what else a source may have: a `fingerprint`, without which a run cannot
notice that its data have changed, `class_names`, and `gather`, which reads a batch at once.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator

import grain
import grain.experimental
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer, Shaped
from ml_collections import ConfigDict

from runtime import parallelism
from runtime.array_types import GreyLevels, Images, RandomKey, Scaler
from runtime.errors import UserError
from sources.arrays import ArraySource
from sources.base import ASSETS, DATASETS, Example, Source, register_dataset
from sources.framing import central_crop, crop_resize, resize, resize_small

__all__ = [
  'ASSETS',
  'DATASETS',
  'ArraySource',
  'Dataset',
  'Example',
  'Inputs',
  'Preprocess',
  'Source',
  'Stacked',
  'Table',
  'central_crop',
  'check_batch_size',
  'crop_resize',
  'get_data_inverse_scaler',
  'get_data_scaler',
  'get_dataset',
  'get_preprocess_fn',
  'get_source',
  'register_dataset',
  'resize',
  'resize_small',
  'take',
]

Preprocess = Callable[[RandomKey, GreyLevels], Images]
# All examples of a split on the devices: arrays (N, ...) by key; None if batches travel.
Table = dict[str, jax.Array] | None
Inputs = dict[str, jax.Array | np.ndarray]


def get_data_scaler(config: ConfigDict) -> Scaler:
  """The map from [0, 1] to the range of the scaled data, for a number or an array of any shape.

  With `data.centered`, x becomes 2 x - 1, in [-1, 1]; otherwise it is unchanged.
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
    seed: the seed of the order of the examples, and of whatever is random about them.
    shuffle: use a new permutation in each epoch; otherwise the order is that of the source.
    preprocess: what the compiled step does to the images first; None for batches in host memory.
    augment: draw whatever is random about an example, such as its crop.
    num_threads: how many threads read batches ahead.
    on_device: keep all examples on the devices.
  """

  source: Source
  _: dataclasses.KW_ONLY
  batch_size: int
  seed: int
  shuffle: bool
  preprocess: Preprocess | None
  augment: bool = False
  num_threads: int = 1
  on_device: bool = False

  @functools.cached_property
  def _gather(self) -> Callable[..., Example]:
    return getattr(self.source, 'gather', Stacked(self.source).gather)

  def _positions(self, step: int) -> Integer[np.ndarray, ' rows']:
    """Where this process's rows of the batch of `step` are in the endless stream of examples."""
    rows = self.batch_size // jax.process_count()
    return step * self.batch_size + jax.process_index() * rows + np.arange(rows)

  def indices(self, step: int) -> Integer[np.ndarray, ' rows']:
    """The numbers of the examples in this process's rows of the batch of `step`."""
    epochs, places = np.divmod(self._positions(step), len(self.source))
    if not self.shuffle:
      return places
    last = len(self.source) - 1
    shuffled = [
      grain.experimental.index_shuffle(place, max_index=last, seed=seed % 2**32, rounds=4)
      for place, seed in zip(places.tolist(), (self.seed + epochs).tolist(), strict=True)
    ]
    return np.asarray(shuffled)

  def _draws(self, step: int) -> Float[np.ndarray, ' rows'] | None:
    """Numbers in [0, 1) for what is random about this process's rows of the batch of `step`."""
    if not self.augment:
      return None
    draws = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, step]))
    return draws.random(self.batch_size)[self._positions(step) - step * self.batch_size]

  def batch(self, step: int) -> Example:
    """This process's rows of the batch of `step`: images (B, H, W, C) and labels (B,)."""
    return self._gather(self.indices(step), self._draws(step))

  def iterate(self, start: int = 0, stride: int = 1) -> Iterator[Example]:
    """The batches of steps start, start + stride, ..., read ahead in background threads."""
    return self._read_ahead(self.batch, range(start, sys.maxsize, stride))

  def once(self, start: int = 0) -> Iterator[Example]:
    """Each example once, in the order of the source: batches `start`, `start` + 1, ..., to the end.

    The last batch is padded, so that all batches have one shape; `weight`, (B,), is 1 for an
    example and 0 for padding. Each process gets its rows.
    """
    return self._read_ahead(self._padded, range(start, len(self)))

  def _padded(self, step: int) -> Example:
    positions, count = self._positions(step), len(self.source)
    batch = self._gather(np.minimum(positions, count - 1), None)
    return {**batch, 'weight': (positions < count).astype(np.float32)}

  def _read_ahead(self, read: Callable[[int], Example], steps: range) -> Iterator[Example]:
    batches = grain.MapDataset.range(steps.start, steps.stop, steps.step).map(read)
    options = grain.ReadOptions(
      num_threads=self.num_threads, prefetch_buffer_size=max(4, 2 * self.num_threads)
    )
    return iter(batches.to_iter_dataset(options))

  def inputs(self, start: int, *keys: str) -> Iterator[Example]:
    """What compiled steps `start`, `start` + 1, ... get, from which `take` makes the batch.

    These are the arrays `keys` of each batch, or with `on_device` only `index`: int32 (B,).
    """
    if self.on_device:
      steps = range(start, sys.maxsize)
      return self._read_ahead(lambda step: {'index': np.int32(self.indices(step))}, steps)
    return ({key: batch[key] for key in keys} for batch in self.iterate(start))

  def table(self, *keys: str) -> Table:
    """The arrays `keys` of all examples, copied to every device; None without `on_device`.

    Raises:
      UserError: if they take more than half of the memory of a device.
    """
    if not self.on_device:
      return None
    size = len(self.source) * sum(np.asarray(self.source[0][key]).nbytes for key in keys)
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', 2 * size)
    if size > limit / 2:
      raise UserError(
        f'data.on_device=True would put {size / 2**30:.1f} GiB of images on devices of '
        f'{limit / 2**30:.1f} GiB, of which they may take half: set it to False.'
      )
    parts = [
      self._gather(np.arange(i, min(i + 1024, len(self.source))), None)
      for i in range(0, len(self.source), 1024)
    ]
    return {
      key: parallelism.replicate(np.concatenate([part[key] for part in parts])) for key in keys
    }

  def __len__(self) -> int:
    """The number of batches of `once`."""
    return -(-len(self.source) // self.batch_size)

  def count(self, batch: int) -> int:
    """The number of examples in batch number `batch` of `once`, over all processes."""
    return min(self.batch_size, len(self.source) - batch * self.batch_size)

  def __iter__(self) -> Iterator[Example]:
    """The batches of steps 0, 1, ..., without end."""
    return self.iterate()


def take(inputs: Inputs, table: Table) -> Inputs:
  """Inside the compiled step: the batch that `Dataset.inputs` stands for."""
  if table is None:
    return inputs
  batch = {key: values[inputs['index']] for key, values in table.items()}
  # So that what follows is compiled as it is for a batch that travels, and rounds alike.
  return jax.lax.optimization_barrier(batch)


@dataclasses.dataclass(frozen=True)
class Stacked:
  """Batches of a source that reads one example at a time.

  Attributes:
    source: the examples.
  """

  source: Source

  def gather(
    self,
    indices: Integer[np.ndarray, ' B'],
    draws: Float[np.ndarray, ' B'] | None = None,
  ) -> Example:
    """The examples `indices` as arrays with a leading axis (B,); `draws` are not used.

    Raises:
      UserError: if an image differs in shape or type from the first one of the source, to which
        a batch would silently cast it.
    """
    del draws
    examples = []
    for i in indices.tolist():
      example = self.source[i]
      shape, dtype = _shape_and_dtype(example)
      if (shape, dtype) != self._first:
        raise UserError(
          f'Image {i} of the data set has shape {shape} and type {dtype}, but image 0 has shape '
          f'{self._first[0]} and type {self._first[1]}: give all images one shape and type.'
        )
      examples.append(example)
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

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
  if config.data.num_workers < 0:
    raise UserError(f'data.num_workers={config.data.num_workers} must not be negative.')
  if config.data.on_device and config.data.get('crop') == 'random':
    raise UserError(
      "data.on_device=True keeps images of one shape, but data.crop='random' needs whole pictures: "
      "set data.on_device=False or data.crop='center'."
    )

  def make(split: str, evaluation: bool) -> Dataset:
    source = get_source(config, split)
    preprocess = get_preprocess_fn(config, uniform_dequantization, evaluation)
    return Dataset(
      source,
      batch_size=batch_size,
      seed=config.seed,
      shuffle=not evaluation,
      preprocess=preprocess,
      augment=not evaluation,
      num_threads=max(1, config.data.num_workers),
      on_device=config.data.on_device and not evaluation,
    )

  train, test = make('train', evaluation), make('test', True)
  if not evaluation:  # training takes a different evaluation batch each time
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
  parts = parallelism.batch_parts()
  if batch_size < 1 or batch_size % parts:
    raise UserError(
      f'{field}={batch_size} cannot be split over {parts} devices: use a multiple of {parts}.'
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
