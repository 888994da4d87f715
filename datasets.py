"""Data sets and their deterministic input pipeline.

The batch of step k is a pure function of (seed, k), whatever the number of processes and wherever a
run was interrupted: the examples are shuffled anew in each epoch by a seeded permutation that is
computed by index (Grain), and each process reads its own rows of the global batch. Images travel to
the devices as uint8; flipping, dequantization and scaling happen there, inside the compiled step.

A data set is registered as a function from a configuration and a split ('train' or 'test') to a
random-access source whose items are {'image': uint8 (H, W, C), 'label': int}:

  @register_dataset(name='MINE')
  def mine(config, split, *, path): ...

Keyword-only parameters are keys of `config.data` that the data set adds to the common ones.

A source may know what it consists of: a source with an attribute `fingerprint`, a string that
differs wherever the examples do, guards a run, which refuses to resume on data with another one.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from runtime.errors import UserError
from runtime.registry import Registry
from sources import pictures

DATASETS = Registry('data set')
register_dataset = DATASETS.register

ASSETS = pathlib.Path(__file__).parent / 'assets'

Example = dict[str, np.ndarray]
Source = Sequence[Example]
Preprocess = Callable[[jax.Array, jax.Array], jax.Array]


def get_data_scaler(config: Any) -> Callable[[jax.Array], jax.Array]:
  """From [0, 1] to the network's range: [-1, 1] where `data.centered`, else unchanged."""
  return (lambda x: x * 2.0 - 1.0) if config.data.centered else (lambda x: x)


def get_data_inverse_scaler(config: Any) -> Callable[[jax.Array], jax.Array]:
  """The inverse of `get_data_scaler`."""
  return (lambda x: (x + 1.0) / 2.0) if config.data.centered else (lambda x: x)


def get_preprocess_fn(
  config: Any, uniform_dequantization: bool = False, evaluation: bool = False
) -> Preprocess:
  """What is done to a batch on the devices, `(rng, uint8 images) -> images in the network's range`.

  Args:
    config: reads `data`.
    uniform_dequantization: add uniform noise below one grey level, (u + x) / 256; else x / 255.
    evaluation: never flip.
  """
  scaler = get_data_scaler(config)
  flip = config.data.random_flip and not evaluation

  def preprocess(rng: jax.Array, images: jax.Array) -> jax.Array:
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
    seed: what the order of the examples depends on.
    shuffle: a new permutation each epoch; else the order of the source, again and again.
    preprocess: what the compiled step does to the images first.
  """

  source: Source
  batch_size: int
  seed: int
  shuffle: bool
  preprocess: Preprocess

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
    """This process's rows of the batch of `step`."""
    return self._batches()[step]

  def iterate(self, start: int = 0, stride: int = 1) -> Iterator[Example]:
    """The batches of steps start, start + stride, ..., read ahead in a background thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(self._batches()[start::stride].to_iter_dataset(options))

  def once(self, start: int = 0) -> Iterator[Example]:
    """Each example once, in the order of the source: batches `start`, `start` + 1, ..., to the end.

    The last batch is filled up, so that all have one shape; `weight` is 1 for an example and 0 for
    what fills up. Each process gets its rows.
    """
    padded = Padded(self.source, self.batch_size)
    batches = dataclasses.replace(self, source=padded, shuffle=False)
    return itertools.islice(batches.iterate(start), len(self) - start)

  def __len__(self) -> int:
    """The number of batches of `once`."""
    return -(-len(self.source) // self.batch_size)

  def count(self, batch: int) -> int:
    """How many examples batch number `batch` of `once` has, in all processes."""
    return min(self.batch_size, len(self.source) - batch * self.batch_size)

  def __iter__(self) -> Iterator[Example]:
    return self.iterate()


@dataclasses.dataclass(frozen=True)
class Padded:
  """A source whose length is a multiple of the batch size; its last example is repeated.

  Attributes:
    source: the examples.
    batch_size: size of the global batch.
  """

  source: Source
  batch_size: int

  def __len__(self) -> int:
    return -(-len(self.source) // self.batch_size) * self.batch_size

  def __getitem__(self, i: int) -> Example:
    count = len(self.source)
    return {**self.source[min(i, count - 1)], 'weight': np.float32(i < count)}


@dataclasses.dataclass(frozen=True)
class Alike:
  """A source whose images are all of the shape and type of the first one.

  Attributes:
    source: the examples.
  """

  source: Source

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> Example:
    """Raises `UserError` for an image of another shape or type, which would be cast in a batch."""
    example = self.source[i]
    shape, dtype = _shape_and_dtype(example)
    if (shape, dtype) != self._first:
      raise UserError(
        f'Image {i} of the data set has shape {shape} and type {dtype}, but image 0 has shape '
        f'{self._first[0]} and type {self._first[1]}: make all images alike.'
      )
    return example

  @functools.cached_property
  def _first(self) -> tuple[tuple[int, ...], np.dtype]:
    return _shape_and_dtype(self.source[0])


def _shape_and_dtype(example: Example) -> tuple[tuple[int, ...], np.dtype]:
  image = np.asarray(example['image'])
  return image.shape, image.dtype


def get_dataset(
  config: Any, uniform_dequantization: bool = False, evaluation: bool = False
) -> tuple[Dataset, Dataset, Source]:
  """The training and evaluation splits of `config.data.dataset`.

  Args:
    config: reads `data`, `seed`, and the batch sizes of `training` and `eval`.
    uniform_dequantization: see `get_preprocess_fn`.
    evaluation: use `eval.batch_size`, no shuffling and no flipping in both splits.

  Returns:
    The training split, the evaluation split and the source of the training examples.

  Raises:
    UserError: for an unknown data set, a wrong image shape or a batch that devices cannot share.
  """
  field = 'eval' if evaluation else 'training'
  batch_size = config[field].batch_size
  check_batch_size(batch_size, f'{field}.batch_size')

  def make(split: str, evaluation: bool) -> Dataset:
    source = get_source(config, split)
    preprocess = get_preprocess_fn(config, uniform_dequantization, evaluation)
    return Dataset(source, batch_size, config.seed, not evaluation, preprocess)

  train, test = make('train', evaluation), make('test', True)
  if not evaluation:  # training looks at another evaluation batch each time
    test = dataclasses.replace(test, shuffle=True)
  return train, test, train.source


def get_source(config: Any, split: str) -> Source:
  """The examples of one split, 'train' or 'test', of `config.data.dataset`.

  Raises:
    UserError: for an unknown data set or split, one without examples, or images that are not uint8
      or not of the configured shape.
  """
  if split not in ('train', 'test'):
    raise UserError(f"There is no split {split!r}: use 'train' or 'test'.")
  source = DATASETS.build(config.data.dataset, config.data, config, split)
  if not len(source):
    raise UserError(
      f'The split {split!r} of the data set {config.data.dataset} is empty: give it an example.'
    )
  _check_image(source[0]['image'], config)
  return source


def check_batch_size(batch_size: int, field: str) -> None:
  """Raises `UserError` unless all devices get equal shares of a batch."""
  devices = jax.device_count()
  if batch_size < 1 or batch_size % devices:
    raise UserError(
      f'{field}={batch_size} cannot be split over {devices} devices: use a multiple of {devices}.'
    )


def _check_image(image: np.ndarray, config: Any) -> None:
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


@dataclasses.dataclass(frozen=True)
class ArraySource:
  """Examples held in memory."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, i: int) -> Example:
    return {'image': self.images[i], 'label': np.int32(self.labels[i])}

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the shapes, types and bytes of both arrays."""
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, (self.images, self.labels)):
      digest.update(f'{array.shape} {array.dtype}\n'.encode())
      digest.update(array)
    return digest.hexdigest()


@register_dataset(name='MNIST5K')
def mnist5k(config: Any, split: str) -> ArraySource:
  """5,000 MNIST digits, 500 of each class, that come with this repository; see assets/README.md."""
  del config
  with np.load(ASSETS / 'mnist5k.npz') as file:
    return ArraySource(file[f'{split}_images'], file[f'{split}_labels'])


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
def cifar10(config: Any, split: str) -> TFDSSource:
  """CIFAR-10 through TensorFlow Datasets."""
  size = config.data.image_size
  return tfds_source('cifar10', split, lambda image: resize(image, size))


@register_dataset(name='SVHN')
def svhn(config: Any, split: str) -> TFDSSource:
  """The cropped digits of Street View House Numbers through TensorFlow Datasets."""
  size = config.data.image_size
  return tfds_source('svhn_cropped', split, lambda image: resize(image, size))


@register_dataset(name='CELEBA')
def celeba(config: Any, split: str) -> TFDSSource:
  """CelebA through TensorFlow Datasets, the central 140 pixels; tested on its validation split."""
  size = config.data.image_size
  return tfds_source(
    'celeb_a', _validation(split), lambda image: resize(central_crop(image, 140), size)
  )


@register_dataset(name='LSUN')
def lsun(config: Any, split: str, *, category: str = '') -> TFDSSource:
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


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """Picture files, decoded when they are read, cropped to their central square and resized.

  Attributes:
    files: the pictures, as `pictures.open_folder` lists them.
    size: height and width that they are brought to.
    num_channels: 1 or 3.
  """

  files: Sequence[pictures.File]
  size: int
  num_channels: int

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> Example:
    image = pictures.decode(self.files[i].path, self.num_channels)
    return {'image': resize(central_crop(image), self.size), 'label': np.int32(0)}

  @property
  def paths(self) -> list[pathlib.Path]:
    return [pathlib.Path(file.path) for file in self.files]

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the names, relative to the folder, and sizes of the files."""
    return pictures.fingerprint(self.files)


@register_dataset(name='CelebAHQ')
@register_dataset(name='FFHQ')
@register_dataset(name='ImageFolder')
def image_folder(config: Any, split: str, *, path: str = '') -> ImageFolder:
  """The pictures below `config.data.path`; `pictures.open_folder` has the order and the splits.

  Raises:
    UserError: if that is not a folder of pictures, or one whose splits are not clear.
  """
  try:
    files = pictures.open_folder(os.path.expanduser(path))[split]
  except UserError as error:
    raise UserError(
      f'No images for the split {split!r} of {config.data.dataset} in config.data.path={path!r}: '
      f'{error}'
    ) from error
  return ImageFolder(files, config.data.image_size, config.data.num_channels)


def central_crop(image: np.ndarray, side: int | None = None) -> np.ndarray:
  """The central square of an image (H, W, C), as large as it can be or of the given side.

  Raises:
    UserError: if the image is smaller than that.
  """
  height, width = image.shape[:2]
  side = side or min(height, width)
  if side > min(height, width):
    raise UserError(
      f'An image of {height} x {width} pixels has no central square of {side} x {side}: '
      f'use a smaller side.'
    )
  top, left = (height - side) // 2, (width - side) // 2
  return image[top : top + side, left : left + side]


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """A uint8 image at `size` x `size`, bilinear with antialiasing; unchanged if it has that size.

  Raises:
    UserError: if the image is of another type.
  """
  if image.dtype != np.uint8:
    raise UserError(
      f'An image of type {image.dtype} cannot be resized: '
      f'scale it to 0..255 and convert it to uint8 first.'
    )
  if image.shape[:2] == (size, size):
    return image
  channels = image[..., 0] if image.shape[-1] == 1 else image
  resized = Image.fromarray(channels).resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(resized).reshape(size, size, image.shape[-1])
