"""Sample quality: statistics of data sets, and the numbers that compare samples with them.

Every number is named after its extractor and the number of samples, `fid_inception_50k`, and is
reported beside the name of the data that it was compared with. `models.extractors` has the
networks, and `metrics` the definitions of the numbers.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np
from absl import logging
from jaxtyping import Float64, Real, Shaped
from ml_collections import ConfigDict

import datasets
import metrics
from models.extractors import (
  Extractor,
  get_extractor,
  get_inception_model,
  inception_extractor,
  register_extractor,
)
from runtime import npz_file
from runtime.errors import UserError

__all__ = [
  'DatasetStats',
  'Extractor',
  'default_stats_path',
  'get_extractor',
  'get_inception_model',
  'inception_extractor',
  'load_dataset_stats',
  'provenance',
  'register_extractor',
  'sample_metrics',
  'stats_path',
]

AnyArray = Shaped[np.ndarray, '...']
Value = str | int | float  # of one entry of a file of statistics

# Entries of a file of statistics, beside those named `floor_...`.
_MATRICES = ('mu', 'sigma', 'pool_3')
_WHOLE = ('count', 'made_image_size', 'made_num_channels')
_TEXTS = tuple(
  f'made_{name}'
  for name in ('extractor', 'scaling', 'fingerprint', 'dataset', 'split', 'images', 'checksum')
)


@dataclasses.dataclass(frozen=True)
class DatasetStats:
  """Statistics of a data set, with which samples are compared.

  Attributes:
    mean: of the features, (D,).
    covariance: of the features, (D, D).
    count: number of images; 0 if the file does not say.
    pool_3: the features, (count, D); None if the file has only their moments.
    provenance: `extractor`, `scaling`, `fingerprint`, `dataset`, `split`, `image_size`,
      `num_channels`, `images` (the fingerprint of their source) and `checksum` (of their pixels);
      empty in files of other programs.
    split_half: the split-half baseline: numbers of one half of the images against the other.
    name: of the data, for reports.
  """

  mean: Float64[np.ndarray, ' D']
  covariance: Float64[np.ndarray, 'D D']
  count: int
  pool_3: Real[np.ndarray, 'N D'] | None
  provenance: dict[str, Value]
  split_half: dict[str, float]
  name: str

  def checksum(self) -> str:
    """The beginning of the SHA-256 of the moments, which differs between different statistics."""
    return hashlib.sha256(self.mean.tobytes() + self.covariance.tobytes()).hexdigest()[:16]


def default_stats_path(config: ConfigDict) -> pathlib.Path:
  """`assets/stats/<data set>_<size>_<split>_<extractor>.npz`, in lower case."""
  parts = [*_dataset_names(config), str(config.data.image_size)]
  parts += [config.eval.stats_split, config.eval.extractor]
  return datasets.ASSETS / 'stats' / ('_'.join(parts).lower() + '.npz')


def _dataset_names(config: ConfigDict) -> list[str]:
  """The name of the data set, and that of its folder or category, if it has one."""
  data = config.data
  names = data.dataset, pathlib.Path(data.path).name, data.get('category', '')
  return [name for name in names if name]


def stats_path(config: ConfigDict) -> pathlib.Path:
  """The path of the statistics: `eval.stats_path`, or `default_stats_path` if that is empty."""
  path = config.eval.stats_path
  return pathlib.Path(path).expanduser() if path else default_stats_path(config)


def load_dataset_stats(config: ConfigDict, extractor: Extractor) -> DatasetStats:
  """Loads the statistics that `config.eval.stats_path` names.

  The file may be of `--mode=stats`, or hold the activations of the 2021 code (`pool_3`) or the mean
  and the covariance of TTUR and ADM (`mu`, `sigma`).

  Raises:
    UserError: if the file is missing, damaged or holds something else, or if it comes from another
      extractor, scaling, image size or data set.
  """
  path = stats_path(config)
  published = datasets.ASSETS / 'stats' / f'{config.data.dataset.lower()}_stats.npz'
  if not config.eval.stats_path and not path.exists() and published.exists():
    path = published  # the name of the file in the 2021 code
  if not path.is_file():
    raise UserError(
      f'Found no statistics of the data at {path}: make them with --mode=stats and the same '
      f'configuration, or set --config.eval.stats_path to a file of them.'
    )
  stats = _load_stats(path)
  _check_stats(stats, path, config=config, extractor=extractor)
  return stats


def check_replaceable(path: pathlib.Path, made: dict[str, Value]) -> None:
  """Refuses to replace a file that is not of statistics with this provenance, see `provenance`.

  Raises:
    UserError: if it holds something else, or statistics of other images or settings.
  """
  if not path.exists():
    return
  old = _load_stats(path).provenance
  differing = [
    name for name, value in made.items() if name != 'checksum' and old.get(name, value) != value
  ]
  if differing or not old:
    others = f'of another {" and ".join(differing)}' if old else 'that --mode=stats did not make'
    raise UserError(
      f'{path} has statistics {others}, and is not replaced: set eval.stats_path to another file, '
      f'or remove it.'
    )


def _load_stats(path: pathlib.Path) -> DatasetStats:
  try:
    return _read_stats(npz_file.load_arrays(path, _wanted_arrays), path.name)
  except npz_file.UNREADABLE as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f'{path} cannot be read as statistics of the data ({reason}): make them again with '
      f'--mode=stats, or give another file as --config.eval.stats_path.'
    ) from error


def _wanted_arrays(names: list[str]) -> list[str]:
  """Those arrays of a file that belong to statistics, by name.

  Raises:
    ValueError: if the moments are missing, and the features, too.
  """
  known = (*_MATRICES, *_WHOLE, *_TEXTS)
  wanted = [name for name in names if name in known or name.startswith('floor_')]
  if not ({'mu', 'sigma'} <= set(wanted) or 'pool_3' in wanted):
    raise ValueError(f'it has {names[:10]}, but neither pool_3 nor mu and sigma')
  return wanted


def _read_stats(arrays: dict[str, AnyArray], file_name: str) -> DatasetStats:
  """The statistics in the arrays of a file.

  Raises:
    ValueError: if they cannot be statistics; the message says why.
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
  return DatasetStats(
    mean=mean,
    covariance=covariance,
    count=count,
    pool_3=pool_3,
    provenance=provenance,
    split_half=split_half,
    name=name,
  )


def _scalar(name: str, array: AnyArray) -> Value:
  """The value of an array of one element.

  Raises:
    ValueError: if the array has more elements, or the value is not of the type and range that
      belong to this name.
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
  stats: DatasetStats, path: pathlib.Path, *, config: ConfigDict, extractor: Extractor
) -> None:
  recorded, wanted = stats.provenance, provenance(config, extractor)
  del wanted['checksum'], wanted['images']
  differing = [
    f'{key} (recorded {recorded.get(key)!r}, configured {wanted[key]!r})'
    for key in wanted
    if recorded and recorded.get(key) != wanted[key]
  ]
  if not differing and recorded.get('images') and _has_other_images(config, recorded['images']):
    differing = [f'images (others than those of data.path={config.data.path!r})']
  dim = extractor.num_features
  if not differing and (stats.mean.shape != (dim,) or stats.covariance.shape != (dim, dim)):
    differing = [f'number of features (recorded {stats.mean.size}, configured {dim})']
  if differing:
    raise UserError(
      f'{path} does not fit the configuration: {", ".join(differing)}; make the statistics again '
      f'with --mode=stats, or set eval.stats_path to others.'
    )


def _has_other_images(config: ConfigDict, fingerprint: Value) -> bool:
  """Whether the configured images, if they are here, are others than those of this fingerprint."""
  try:
    source = datasets.get_source(config, config.eval.stats_split)
  except UserError as error:
    logging.warning('The images are not compared with those of the statistics: %s', error)
    return False
  return getattr(source, 'fingerprint', None) not in (None, fingerprint)


def provenance(
  config: ConfigDict, extractor: Extractor, *, images: str = '', checksum: str = ''
) -> dict[str, Value]:
  """The provenance of statistics under this configuration; see `DatasetStats`."""
  data = config.data
  return {
    'extractor': extractor.name,
    'scaling': extractor.scaling,
    'fingerprint': extractor.fingerprint,
    'dataset': ':'.join(_dataset_names(config)),
    'split': config.eval.stats_split,
    'image_size': data.image_size,
    'num_channels': data.num_channels,
    'images': images,
    'checksum': checksum,
  }


def sample_metrics(
  extractor_name: str,
  stats: DatasetStats,
  *,
  pool_3: Real[np.ndarray, 'N D'],
  logits: Real[np.ndarray, 'N K'],
) -> tuple[dict[str, float], list[str]]:
  """Computes the numbers that describe samples, and warns of what limits their worth.

  They are the FID and the Inception score; if the statistics have features, also the KID, precision
  and recall.

  Args:
    extractor_name: for the names of the numbers.
    stats: of the data.
    pool_3: features of the samples, (N, D).
    logits: logits of the samples, (N, K).

  Returns:
    Numbers by name, and warnings.

  Raises:
    UserError: if N is less than two, or features or logits are not finite.
  """
  names = metrics.Names(extractor_name, len(pool_3))
  moments = metrics.moments(pool_3)
  covariance = moments.covariance()
  numbers = {
    names('fid'): metrics.frechet_distance(
      (moments.mean, covariance), (stats.mean, stats.covariance)
    ),
    names('inception_score'): metrics.inception_score(logits),
  }
  warnings = []
  if not stats.provenance:
    warnings.append(
      f'{stats.name} does not record its provenance: its features are taken to be those of '
      f'{extractor_name}.'
    )
  dim = pool_3.shape[1]
  for what, count in (('samples', len(pool_3)), ('images of the data', stats.count)):
    if 0 < count <= dim:
      warnings.append(
        f'{count} {what} are few for {dim} features: their covariance is singular, and the FID '
        f'larger than with more.'
      )
  if stats.pool_3 is None:
    warnings.append(f'{stats.name} has no features: no KID, precision or recall.')
  else:
    numbers |= metrics.feature_metrics(extractor_name, stats.pool_3, pool_3)
  return numbers, warnings
