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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import datasets
import metrics
from models import inception
from models.classifier import load_classifier
from runtime import npz_file, parallelism, torch_file
from runtime.errors import UserError
from runtime.registry import Registry

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


# What a file of statistics may have; `floor_...` besides.
_MATRICES = ('mu', 'sigma', 'pool_3')
_WHOLE = ('count', 'made_image_size', 'made_num_channels')
_TEXTS = tuple(
  f'made_{name}' for name in ('extractor', 'scaling', 'fingerprint', 'dataset', 'split', 'checksum')
)


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
    """`pool_3` and `logits` of a global array of uint8 images, in every process.

    Raises:
      UserError: for images of another type, or if the network does not give what is declared.
    """
    if images.dtype != np.uint8:
      raise UserError(
        f'The extractor {self.name!r} takes grey levels of type uint8, not {images.dtype}: scale '
        f'the images to 0...255 and round them.'
      )
    outputs = self._compiled(images)
    pool_3, logits = (np.float32(parallelism.to_host(outputs[k])) for k in ('pool_3', 'logits'))
    expected = (len(images), self.num_features)
    if pool_3.shape != expected or logits.ndim != 2 or len(logits) != len(images):
      raise UserError(
        f'The extractor {self.name!r} gives pool_3 of shape {pool_3.shape} and logits of shape '
        f'{logits.shape}, which must be {expected} and ({len(images)}, K): mend its forward or its '
        f'num_features.'
      )
    return {'pool_3': pool_3, 'logits': logits}

  def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """The same for any number of uint8 images, at least one, that every process holds."""
    if not len(images):
      raise UserError(f'The extractor {self.name!r} was given no images: give it at least one.')
    size = self.global_batch_size()
    padding = -len(images) % size
    padded = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
    parts = [
      self.extract_global(parallelism.split(padded[start : start + size]))
      for start in range(0, len(padded), size)
    ]
    return {key: np.concatenate([p[key] for p in parts])[: len(images)] for key in parts[0]}


def get_extractor(config: ConfigDict) -> Extractor:
  """The extractor that `config.eval.extractor` names.

  Raises:
    UserError: for an unknown name, or weights that are not there.
  """
  return _EXTRACTORS.get(config.eval.extractor)(config)


@register_extractor(name='inception')
def _inception(config: ConfigDict) -> Extractor:
  """The FID Inception network as the paper's evaluation fed it, (x - 127.5) / 127.5."""
  return get_inception_model(config.eval.inception_path)


@register_extractor(name='inception_ttur')
def _inception_ttur(config: ConfigDict) -> Extractor:
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
  ).expanduser()
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
def _mnist5k(config: ConfigDict) -> Extractor:
  """The classifier of the digits of MNIST5K that comes with this repository, told of least noise.

  Raises:
    UserError: for images of another shape.
  """
  trained = load_classifier(MNIST5K_FILE)
  data = config.data
  shape = (data.image_size, data.image_size, data.num_channels)
  if shape != trained.image_shape:
    raise UserError(
      f"eval.extractor='mnist5k' knows images of shape {trained.image_shape}, not {shape}: "
      f"use 'inception'."
    )

  def forward(params, images):
    network = dataclasses.replace(trained, params=params)
    images, clean = images / 255.0, jnp.zeros(len(images))
    return {'pool_3': network.features(images, clean), 'logits': network.logits(images, clean)}

  return Extractor(
    name='mnist5k',
    scaling='unit',
    fingerprint=_sha256(MNIST5K_FILE),
    num_features=64 * trained.module.channel_multiplier,
    params=trained.params,
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
    provenance: how the statistics were made: `extractor`, `scaling`, `fingerprint`, `dataset`,
      `split`, `image_size`, `num_channels`, `checksum` (of the images); empty in files of other
      programs.
    split_half: the split-half baseline: numbers of one half of the images against the other.
    name: for reports.
  """

  mean: np.ndarray
  covariance: np.ndarray
  count: int
  pool_3: np.ndarray | None
  provenance: dict[str, Any]
  split_half: dict[str, float]
  name: str

  def checksum(self) -> str:
    """Tells these statistics from others."""
    return hashlib.sha256(self.mean.tobytes() + self.covariance.tobytes()).hexdigest()[:16]


def default_stats_path(config: ConfigDict) -> pathlib.Path:
  """`assets/stats/<data set>_<size>_<split>_<extractor>.npz`, in small letters."""
  parts = [*_dataset_names(config), str(config.data.image_size)]
  parts += [config.eval.stats_split, config.eval.extractor]
  return datasets.ASSETS / 'stats' / ('_'.join(parts).lower() + '.npz')


def _dataset_names(config: ConfigDict) -> list[str]:
  """The name of the data set, then of its folder or category, if it has one."""
  data = config.data
  names = data.dataset, pathlib.Path(data.path).name, data.get('category', '')
  return [name for name in names if name]


def stats_path(config: ConfigDict) -> pathlib.Path:
  """Where the statistics are, or will be."""
  path = config.eval.stats_path
  return pathlib.Path(path).expanduser() if path else default_stats_path(config)


def load_dataset_stats(config: ConfigDict, extractor: Extractor) -> DatasetStats:
  """The statistics that `config.eval.stats_path` names.

  Reads what `--mode=stats` writes, the activations of the 2021 code (`pool_3`), and the means and
  covariances of TTUR and ADM (`mu`, `sigma`).

  Raises:
    UserError: if there is no such file, it is damaged or holds something else, or it was made with
      another extractor, scaling, image size or data set.
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
    stats = _read_stats(npz_file.load_arrays(path, _wanted_arrays), path.name)
  except npz_file.UNREADABLE as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f'{path} cannot be read as statistics of the data ({reason}): make them again with '
      f'--mode=stats, or give another file as --config.eval.stats_path.'
    ) from error
  _check_stats(stats, path, config, extractor)
  return stats


def _wanted_arrays(names: list[str]) -> list[str]:
  """Those of a file that statistics are made of."""
  known = (*_MATRICES, *_WHOLE, *_TEXTS)
  wanted = [name for name in names if name in known or name.startswith('floor_')]
  if not ({'mu', 'sigma'} <= set(wanted) or 'pool_3' in wanted):
    raise ValueError(f'it has {names[:10]}, but neither pool_3 nor mu and sigma')
  return wanted


def _read_stats(arrays: dict[str, np.ndarray], file_name: str) -> DatasetStats:
  """What `_load_arrays` found, if it makes sense.

  Raises:
    ValueError: if not; the message says what is wrong.
  """
  for name in filter(arrays.__contains__, _MATRICES):
    array = arrays[name]
    if array.dtype.kind not in 'fiu' or not np.isfinite(array).all():
      raise ValueError(f'{name} has values that are not finite numbers')
  scalars = {name: _scalar(name, array) for name, array in arrays.items() if name not in _MATRICES}
  provenance = {name[5:]: value for name, value in scalars.items() if name.startswith('made_')}
  split_half = {name[6:]: value for name, value in scalars.items() if name.startswith('floor_')}
  pool_3 = arrays.get('pool_3')
  if pool_3 is not None:
    if pool_3.ndim < 2 or pool_3.size == 0 or len(pool_3) < 2:
      raise ValueError(f'pool_3 has the shape {pool_3.shape}, which must be (N, D), N at least 2')
    pool_3 = pool_3.reshape(len(pool_3), -1)
  if 'mu' in arrays and 'sigma' in arrays:
    mean, covariance = np.float64(arrays['mu']), np.float64(arrays['sigma'])
  else:
    moments = metrics.moments(pool_3)
    mean, covariance = moments.mean, moments.covariance()
  if found := metrics.flaw(mean, covariance):
    raise ValueError(found)
  count = scalars.get('count', 0 if pool_3 is None else len(pool_3))
  if pool_3 is not None and pool_3.shape != (count, mean.size):
    raise ValueError(
      f'pool_3 has the shape {pool_3.shape}, but count and mu say ({count}, {mean.size})'
    )
  name = f'{provenance.get("dataset")}/{provenance.get("split")}' if provenance else file_name
  name = f'{name}/{count}' if count else name
  return DatasetStats(mean, covariance, count, pool_3, provenance, split_half, name)


def _scalar(name: str, array: np.ndarray) -> Any:
  """A single value of the type that goes with this name.

  Raises:
    ValueError: if it is something else.
  """
  what, kinds = 'number', 'fiu'
  if name in _WHOLE:
    what, kinds = 'whole number', 'iu'
  elif name in _TEXTS:
    what, kinds = 'text', 'U'
  if array.size != 1 or array.dtype.kind not in kinds:
    raise ValueError(f'{name} is of shape {array.shape} and type {array.dtype}, not one {what}')
  value = array.item()
  if name == 'count' and value < 2:
    raise ValueError(f'count is {value}, not 2 or more')
  if name.startswith('floor_') and not np.isfinite(value):
    raise ValueError(f'{name} is {value}, not finite')
  return value


def _check_stats(
  stats: DatasetStats, path: pathlib.Path, config: ConfigDict, extractor: Extractor
) -> None:
  recorded, wanted = stats.provenance, provenance(config, extractor)
  wanted.pop('checksum')
  differing = [
    f'{key} (there {recorded.get(key)!r}, here {wanted[key]!r})'
    for key in wanted
    if recorded and recorded.get(key) != wanted[key]
  ]
  dim = extractor.num_features
  if not differing and (stats.mean.shape != (dim,) or stats.covariance.shape != (dim, dim)):
    differing = [f'number of features (there {stats.mean.size}, here {dim})']
  if differing:
    raise UserError(
      f'{path} does not fit the configuration: {", ".join(differing)}; make the statistics again '
      f'with --mode=stats, or set eval.stats_path.'
    )


def provenance(config: ConfigDict, extractor: Extractor, checksum: str = '') -> dict[str, Any]:
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
  names = metrics.Names(extractor_name, len(pool_3))
  moments = metrics.moments(pool_3)
  covariance = moments.covariance()
  numbers = {
    names('fid'): metrics.frechet_distance(moments.mean, covariance, stats.mean, stats.covariance),
    names('inception_score'): metrics.inception_score(logits),
  }
  warnings = []
  if not stats.provenance:
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
    numbers |= metrics.feature_metrics(extractor_name, stats.pool_3, pool_3)
  return numbers, warnings
