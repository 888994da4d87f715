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
"""

import dataclasses
import inspect
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from errors import UserError
from registry import Registry

_DATASETS = Registry('data set')
register_dataset = _DATASETS.register

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

  def _batches(self) -> grain.MapDataset:
    """This process's rows of every global batch."""
    processes = jax.process_count()
    examples = grain.MapDataset.source(self.source)
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
    UserError: for an unknown data set, or images that are not of the configured shape.
  """
  make = _DATASETS.get(config.data.dataset)
  extra = {key: config.data[key] for key in extra_keys(config.data.dataset) if key in config.data}
  source = make(config, split, **extra)
  _check_image(source[0]['image'], config)
  return source


def extra_keys(name: str) -> list[str]:
  """Keys of `config.data` that only this data set reads: its keyword-only parameters."""
  parameters = inspect.signature(_DATASETS.get(name)).parameters.values()
  return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


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
  if image.shape != expected or image.dtype != np.uint8:
    raise UserError(
      f'The data set {data.dataset} has images of shape {image.shape} and type {image.dtype}, but '
      f'the configuration says {expected} and uint8: '
      f'set data.image_size and data.num_channels to match.'
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


IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff')


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """Image files, decoded when they are read, cropped to their central square and resized.

  Attributes:
    paths: the files.
    size: height and width that they are brought to.
    num_channels: 1 or 3.
  """

  paths: Sequence[pathlib.Path]
  size: int
  num_channels: int

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, i: int) -> Example:
    with Image.open(self.paths[i]) as file:
      image = np.asarray(file.convert('L' if self.num_channels == 1 else 'RGB'))
    square = central_crop(image.reshape(*image.shape[:2], -1))
    return {'image': resize(square, self.size), 'label': np.int32(0)}


@register_dataset(name='CelebAHQ')
@register_dataset(name='FFHQ')
@register_dataset(name='ImageFolder')
def image_folder(config: Any, split: str, *, path: str = '') -> ImageFolder:
  """All image files below `config.data.path`, in the order of their names.

  The splits are the subfolders `train` and `test` where both exist; else every tenth image is for
  testing.

  Raises:
    UserError: if there are no image files.
  """
  root = pathlib.Path(path)
  if path and (root / 'train').is_dir() and (root / 'test').is_dir():
    paths = _image_files(root / split)
  else:
    paths = _image_files(root) if path else []
    paths = [p for i, p in enumerate(paths) if (i % 10 == 9) == (split == 'test')]
  if not paths:
    raise UserError(
      f'No images for the split {split!r} of {config.data.dataset} in config.data.path={path!r}: '
      f'give a folder with files that end in {", ".join(IMAGE_SUFFIXES)}, in any case.'
    )
  return ImageFolder(paths, config.data.image_size, config.data.num_channels)


def _image_files(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in root.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES)


def central_crop(image: np.ndarray, side: int | None = None) -> np.ndarray:
  """The central square of an image (H, W, C), as large as it can be or of the given side."""
  height, width = image.shape[:2]
  side = side or min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  return image[top : top + side, left : left + side]


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """A uint8 image at `size` x `size`, bilinear with antialiasing; unchanged if it has that size."""
  if image.shape[:2] == (size, size):
    return image
  channels = image[..., 0] if image.shape[-1] == 1 else image
  resized = Image.fromarray(channels).resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(resized).reshape(size, size, image.shape[-1])
