"""Sample quality: feature extractors, statistics of data sets, and the numbers made of both.

An extractor is registered as a function from a configuration to an `Extractor`:

  @register_extractor(name='mine')
  def mine(config) -> Extractor: ...

Every number is named after its extractor and the number of samples, `fid_inception_50k`, and stands
beside the name of the data that it was compared with.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

import datasets
import metrics
import parallelism
import reporting
import torch_file
from errors import UserError
from models import inception
from models import utils as mutils
from registry import Registry

PyTree = Any

_EXTRACTORS = Registry('extractor')
register_extractor = _EXTRACTORS.register

INCEPTION_VARIABLE = 'SCORE_SDE_INCEPTION'
INCEPTION_FILE = 'weights-inception-2015-12-05-6726825d.pth'
_INCEPTION_SHA256 = '6726825d'  # how it begins
_INCEPTION_URL = (
  f'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}'
)

MNIST5K_FILE = datasets.ASSETS / 'mnist5k_classifier.safetensors'

_PRECISION_RECALL_SAMPLES = 10_000  # more cost the square of their number
_SIGMA_MAX_IMAGES = 100_000


@dataclasses.dataclass(frozen=True)
class Extractor:
  """A network that describes images by features and logits.

  Attributes:
    name: as registered, and in the name of every number.
    scaling: name of what is done to grey levels before the network.
    fingerprint: of the weights: features of others cannot be compared.
    num_features: length of a feature vector.
    params: the weights.
    forward: (params, uint8 images (B, H, W, C)) -> {'pool_3': (B, num_features), 'logits': (B, K)}.
    batch_size: how many images one device takes at a time.
  """

  name: str
  scaling: str
  fingerprint: str
  num_features: int
  params: PyTree = dataclasses.field(repr=False)
  forward: Callable[[PyTree, jax.Array], dict[str, jax.Array]] = dataclasses.field(repr=False)
  batch_size: int = 16

  def global_batch_size(self) -> int:
    return self.batch_size * jax.device_count()

  @functools.cached_property
  def _compiled(self) -> Callable[[jax.Array], dict[str, jax.Array]]:
    forward = jax.jit(lambda params, x: self.forward(params, parallelism.shard_batch(x)))
    return functools.partial(forward, parallelism.replicate(self.params))

  def extract_global(self, images: jax.Array) -> dict[str, np.ndarray]:
    """`pool_3` and `logits` of a global array of uint8 images, in every process."""
    outputs = self._compiled(images)
    return {key: parallelism.to_host(outputs[key]) for key in ('pool_3', 'logits')}

  def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """The same for any number of uint8 images that every process holds."""
    size = self.global_batch_size()
    padding = -len(images) % size
    padded = np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)])
    parts = [
      self.extract_global(parallelism.split(padded[start : start + size]))
      for start in range(0, len(padded), size)
    ]
    return {key: np.concatenate([p[key] for p in parts])[: len(images)] for key in parts[0]}


def get_extractor(config: Any) -> Extractor:
  """The extractor that `config.eval.extractor` names.

  Raises:
    UserError: for an unknown name, or weights that are not there.
  """
  return _EXTRACTORS.get(config.eval.extractor)(config)


@register_extractor(name='inception')
def _inception(config: Any) -> Extractor:
  """The FID Inception network as the paper's evaluation fed it, (x - 127.5) / 127.5."""
  return get_inception_model(config.eval.inception_path)


@register_extractor(name='inception_ttur')
def _inception_ttur(config: Any) -> Extractor:
  """The FID Inception network as the FID's authors fed it, (x - 128) / 128."""
  return get_inception_model(config.eval.inception_path, 'ttur')


def get_inception_model(path: str | pathlib.Path = '', scaling: str = 'tfgan') -> Extractor:
  """The FID Inception network: 2048 features, 1008 logits (without bias, as the score has them).

  Args:
    path: of the weights; empty takes the variable SCORE_SDE_INCEPTION, else `assets/`.
    scaling: 'tfgan' for (x - 127.5) / 127.5, 'ttur' for (x - 128) / 128.

  Raises:
    UserError: if the file is not there, or not the published one.
  """
  path = pathlib.Path(
    path or os.environ.get(INCEPTION_VARIABLE) or datasets.ASSETS / INCEPTION_FILE
  )
  try:
    digest = _sha256(path)
  except OSError as error:
    raise UserError(
      f'The weights of the Inception network are not at {path} ({error.strerror}): get '
      f'{_INCEPTION_URL} and give its path as --config.eval.inception_path or in '
      f'{INCEPTION_VARIABLE}, or set eval.extractor to another one.'
    ) from error
  if not digest.startswith(_INCEPTION_SHA256):
    raise UserError(
      f'{path} is not the published file: its SHA-256 begins with {digest[:8]}, not '
      f'{_INCEPTION_SHA256}; get it again from {_INCEPTION_URL}.'
    )
  return inception_extractor(inception.params_from_torch(torch_file.load(path)), scaling, digest)


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def inception_extractor(params: PyTree, scaling: str, fingerprint: str) -> Extractor:
  """The FID Inception network with the given parameters."""

  def forward(params, images):
    outputs = inception.forward(params, images, scaling)
    return {'pool_3': outputs['pool_3'], 'logits': outputs['logits_unbiased']}

  return Extractor(
    name='inception' if scaling == 'tfgan' else f'inception_{scaling}',
    scaling=scaling,
    fingerprint=fingerprint,
    num_features=inception.NUM_FEATURES,
    params=params,
    forward=forward,
  )


@register_extractor(name='mnist5k')
def _mnist5k(config: Any) -> Extractor:
  """The classifier of the digits of MNIST5K that comes with this repository, told of least noise.

  Raises:
    UserError: for images of another shape.
  """
  _, info = mutils.read_classifier_file(MNIST5K_FILE)
  classifier, params = mutils.create_classifier(jax.random.PRNGKey(0), 1, MNIST5K_FILE)
  data = config.data
  shape = (data.image_size, data.image_size, data.num_channels)
  if shape != tuple(info['image_shape']):
    raise UserError(
      f"eval.extractor='mnist5k' knows images of shape {tuple(info['image_shape'])}, not {shape}: "
      f"use 'inception'."
    )

  def forward(params, images):
    arguments = {'params': params}, images / 255.0, jnp.full(len(images), info['sigma_min'])
    return {
      'pool_3': classifier.apply(*arguments, method='features'),
      'logits': classifier.apply(*arguments, train=False),
    }

  return Extractor(
    name='mnist5k',
    scaling='unit',
    fingerprint=_sha256(MNIST5K_FILE),
    num_features=64 * classifier.channel_multiplier,
    params=params,
    forward=forward,
    batch_size=50,
  )


@dataclasses.dataclass(frozen=True)
class DatasetStats:
  """What samples are compared with.

  Attributes:
    mean: of the features, (D,).
    covariance: (D, D).
    count: how many images; 0 if the file does not say.
    pool_3: the features, (count, D), or None.
    made: how the statistics were made: `extractor`, `scaling`, `fingerprint`, `dataset`, `split`,
      `image_size`, `num_channels`, `checksum` (of the images); empty in files of other programs.
    floor: numbers of one half of the images compared with the other.
    name: for reports.
  """

  mean: np.ndarray
  covariance: np.ndarray
  count: int
  pool_3: np.ndarray | None
  made: dict[str, Any]
  floor: dict[str, float]
  name: str

  def checksum(self) -> str:
    """Tells these statistics from others."""
    return hashlib.sha256(self.mean.tobytes() + self.covariance.tobytes()).hexdigest()[:16]


def default_stats_path(config: Any) -> pathlib.Path:
  """`assets/stats/<data set>_<size>_<split>_<extractor>.npz`, in small letters."""
  parts = [*_dataset_names(config), str(config.data.image_size)]
  parts += [config.eval.stats_split, config.eval.extractor]
  return datasets.ASSETS / 'stats' / ('_'.join(parts).lower() + '.npz')


def _dataset_names(config: Any) -> list[str]:
  """The name of the data set, then of its folder or category, if it has one."""
  data = config.data
  names = data.dataset, pathlib.Path(data.path).name, data.get('category', '')
  return [name for name in names if name]


def stats_path(config: Any) -> pathlib.Path:
  """Where the statistics are, or will be."""
  path = config.eval.stats_path
  return pathlib.Path(path) if path else default_stats_path(config)


def load_dataset_stats(config: Any, extractor: Extractor) -> DatasetStats:
  """The statistics that `config.eval.stats_path` names.

  Reads what `--mode=stats` writes, the activations of the 2021 code (`pool_3`), and the means and
  covariances of TTUR and ADM (`mu`, `sigma`).

  Raises:
    UserError: if there is no such file, or it was made with another extractor, scaling, image size
      or data set.
  """
  path = stats_path(config)
  published = datasets.ASSETS / 'stats' / f'{config.data.dataset.lower()}_stats.npz'
  if not config.eval.stats_path and not path.exists() and published.exists():
    path = published  # where the 2021 code keeps them
  if not path.is_file():
    raise UserError(
      f'There are no statistics of the data at {path}: make them with --mode=stats and the same '
      f'configuration, or give a file as --config.eval.stats_path.'
    )
  try:
    with np.load(path, allow_pickle=False) as file:
      stats = _read_stats(file, path)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(f'{path} cannot be read ({error}): make it again with --mode=stats.') from error
  _check_stats(stats, path, config, extractor)
  return stats


def _read_stats(file: Any, path: pathlib.Path) -> DatasetStats:
  made = {key[5:]: file[key].item() for key in file.files if key.startswith('made_')}
  floor = {key[6:]: file[key].item() for key in file.files if key.startswith('floor_')}
  pool_3 = file['pool_3'] if 'pool_3' in file.files else None
  if pool_3 is not None:
    pool_3 = pool_3.reshape(len(pool_3), -1)
  if {'mu', 'sigma'} <= set(file.files):
    mean, covariance = file['mu'].astype(np.float64), file['sigma'].astype(np.float64)
    count = int(file['count']) if 'count' in file.files else 0 if pool_3 is None else len(pool_3)
  elif pool_3 is not None:
    moments = metrics.moments(pool_3)
    mean, covariance, count = moments.mean, moments.covariance(), moments.count
  else:
    raise ValueError(f'it has {", ".join(file.files)}, but neither pool_3 nor mu and sigma')
  name = '{dataset}/{split}'.format(**made) if made else path.name
  name = f'{name}/{count}' if count else name
  return DatasetStats(mean, covariance, count, pool_3, made, floor, name)


def _check_stats(
  stats: DatasetStats, path: pathlib.Path, config: Any, extractor: Extractor
) -> None:
  made, wanted = stats.made, _made(config, extractor)
  wanted.pop('checksum')
  differing = [
    f'{key} (there {made.get(key)!r}, here {wanted[key]!r})'
    for key in wanted
    if made and made.get(key) != wanted[key]
  ]
  dim = extractor.num_features
  if not differing and (stats.mean.shape != (dim,) or stats.covariance.shape != (dim, dim)):
    differing = [f'number of features (there {stats.mean.size}, here {dim})']
  if differing:
    raise UserError(
      f'{path} does not fit the configuration: {", ".join(differing)}; make the statistics again '
      f'with --mode=stats, or set eval.stats_path.'
    )


def _made(config: Any, extractor: Extractor, checksum: str = '') -> dict[str, Any]:
  """See `DatasetStats`."""
  data = config.data
  return {
    'extractor': extractor.name,
    'scaling': extractor.scaling,
    'fingerprint': extractor.fingerprint,
    'dataset': ':'.join(_dataset_names(config)),
    'split': config.eval.stats_split,
    'image_size': data.image_size,
    'num_channels': data.num_channels,
    'checksum': checksum,
  }


def write_stats(config: Any) -> pathlib.Path:
  """Makes the statistics of `eval.stats_split`: each image once, as it is, in grey levels.

  Also logs `sigma_max` for the training set. Returns where the statistics are.

  Raises:
    UserError: if the weights or the data are not there, or the file cannot be written.
  """
  path = stats_path(config)
  reporting.check_writable(path.parent, 'eval.stats_path')
  extractor = get_extractor(config)
  size = extractor.global_batch_size()
  source = datasets.get_source(config, config.eval.stats_split)
  metrics.check_count(len(source))
  dataset = datasets.Dataset(source, size, config.seed, False, lambda rng, x: x)

  digest, moments, features = hashlib.sha256(), metrics.Moments(extractor.num_features), []
  for i, batch in enumerate(tqdm.tqdm(dataset.once(), 'statistics', len(dataset), disable=None)):
    images = parallelism.global_batch(batch['image'])
    count = dataset.count(i)
    digest.update(parallelism.to_host(images)[:count].tobytes())
    pool_3 = extractor.extract_global(images)['pool_3'][:count]
    moments.add(pool_3)
    features.append(pool_3)
  arrays = {'mu': moments.mean, 'sigma': moments.covariance(), 'count': moments.count}
  arrays |= {f'made_{k}': v for k, v in _made(config, extractor, digest.hexdigest()).items()}
  pool_3 = np.concatenate(features)
  floor = real_floor(extractor.name, pool_3)
  arrays |= {f'floor_{k}': v for k, v in floor.items()}
  if config.eval.stats_features:
    arrays['pool_3'] = pool_3
  if jax.process_index() == 0:
    reporting.write_npz(path, **arrays)
  logging.info('%d images of %s: %s', moments.count, config.data.dataset, path)
  for name, value in floor.items():
    logging.info('one half of them compared with the other, %s: %.6g', name, value)
  logging.info('%s', sigma_max_line(config))
  return path


def sample_metrics(
  extractor_name: str, stats: DatasetStats, pool_3: np.ndarray, logits: np.ndarray
) -> tuple[dict[str, float], list[str]]:
  """The numbers that describe samples, and warnings on what they are worth.

  FID and Inception score; where the statistics have features, also KID, precision and recall.

  Args:
    extractor_name: for the names of the numbers.
    stats: of the data.
    pool_3: features of the samples.
    logits: their logits.

  Raises:
    UserError: with too few samples.
  """
  names = _Names(extractor_name, len(pool_3))
  moments = metrics.moments(pool_3)
  covariance = moments.covariance()
  numbers = {
    names('fid'): metrics.frechet_distance(moments.mean, covariance, stats.mean, stats.covariance),
    names('inception_score'): metrics.inception_score(logits),
  }
  warnings = []
  if not stats.made:
    warnings.append(
      f'{stats.name} does not say how it was made: it is taken to be for {extractor_name}.'
    )
  dim = pool_3.shape[1]
  for what, count in (('samples', len(pool_3)), ('images of the data', stats.count)):
    if 0 < count <= dim:
      warnings.append(
        f'{count} {what} are few for {dim} features: their covariance is singular, and the FID '
        f'larger than that of more.'
      )
  if stats.pool_3 is None:
    warnings.append(f'{stats.name} has no features: no KID, precision and recall.')
  else:
    numbers |= _feature_metrics(extractor_name, stats.pool_3, pool_3)
  return numbers, warnings


def real_floor(extractor_name: str, pool_3: np.ndarray) -> dict[str, float]:
  """The numbers of every second image compared with the others: what perfect samples would have."""
  real, other = pool_3[::2], pool_3[1::2]
  if len(other) < 2:
    return {}
  a, b = metrics.moments(real), metrics.moments(other)
  fid = metrics.frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())
  name = _Names(extractor_name, len(other))('fid')
  return {name: fid, **_feature_metrics(extractor_name, real, other)}


def _feature_metrics(extractor_name: str, real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
  numbers = {_Names(extractor_name, len(fake))('kid'): metrics.kernel_distance(real, fake)}
  real, fake = real[:_PRECISION_RECALL_SAMPLES], fake[:_PRECISION_RECALL_SAMPLES]
  if min(len(real), len(fake)) > metrics.NEIGHBOURS:
    names = _Names(extractor_name, len(fake))
    precision, recall = metrics.precision_recall(real, fake)
    numbers |= {names('precision'): precision, names('recall'): recall}
  return numbers


@dataclasses.dataclass(frozen=True)
class _Names:
  """`fid` -> `fid_inception_50k`."""

  extractor: str
  count: int

  def __call__(self, metric: str) -> str:
    count = f'{self.count // 1000}k' if self.count % 1000 == 0 else str(self.count)
    return f'{metric}_{self.extractor}_{count}'


def sigma_max_line(config: Any) -> str:
  """The line of a configuration that sets `sigma_max` for its training images."""
  source = datasets.get_source(config, 'train')
  scaler = datasets.get_data_scaler(config)
  distance = largest_distance(source) / 255 * (scaler(1.0) - scaler(0.0))
  count = min(len(source), _SIGMA_MAX_IMAGES)
  of = f'{count}' if count == len(source) else f'{count} of {len(source)}'
  return (
    f'config.model.sigma_max = {distance:.4g}  # largest distance between {of} training images '
    f'in [{scaler(0.0):g}, 1]'
  )


def largest_distance(source: datasets.Source, block_bytes: int = 2**26) -> float:
  """The largest Euclidean distance between two images, in grey levels.

  Blocks against blocks on the devices. Exact up to 100,000 images; of more, as many, evenly spaced.
  """
  count = min(len(source), _SIGMA_MAX_IMAGES)
  chosen = np.linspace(0, len(source) - 1, count).astype(int)
  dim = source[0]['image'].size
  # Decoded once; in a file, because large images of a whole data set may not fit in memory.
  with tempfile.TemporaryFile() as file:
    pixels = np.memmap(file, np.uint8, 'w+', shape=(count, dim))
    for row, i in enumerate(tqdm.tqdm(chosen, 'images for sigma_max', disable=None)):
      pixels[row] = source[int(i)]['image'].reshape(-1)
    return _largest_distance(pixels, max(1, min(count, block_bytes // (4 * dim))))


def _largest_distance(pixels: np.ndarray, size: int) -> float:
  @jax.jit
  def farthest(x, y):
    x, y = (a.astype(jnp.float32) - 127.5 for a in (x, y))
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * product
    i = jnp.argmax(squares)
    return squares.reshape(-1)[i], i

  def block(start):
    rows = pixels[start : start + size]
    return np.concatenate([rows, rows[:1].repeat(size - len(rows), 0)])  # one shape for all

  starts = range(0, len(pixels), size)
  best, pair = -1.0, (0, 0)
  for a in tqdm.tqdm(starts, 'sigma_max', disable=None):
    x = block(a)
    for b in range(a, len(pixels), size):
      square, i = farthest(x, block(b))
      if square > best:
        best, pair = square, (a + int(i) // size, b + int(i) % size)
  x, y = (np.float64(pixels[i if i < len(pixels) else i - i % size]) for i in pair)
  return float(np.sqrt(((x - y) ** 2).sum()))
