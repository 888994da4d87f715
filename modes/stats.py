"""`--mode=stats`: statistics of a data set, with which samples are compared, and its `sigma_max`.

`sigma_max` follows Technique 1 of Song and Ermon, "Improved techniques for training score-based
generative models", https://arxiv.org/abs/2006.09011.
"""

import functools
import hashlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import UInt8
from ml_collections import ConfigDict

import datasets
import metrics
from evaluation import check_replaceable, get_extractor, provenance, stats_path
from runtime import parallelism, progress, reporting
from runtime.array_types import Array, Count, Features, GreyLevels, Scalar, Scaler
from runtime.errors import UserError
from runtime.workdir import log_start

_Levels = UInt8[Array, 'N *dims']
_Rows = UInt8[Array, 'N D']

_SIGMA_MAX_BYTES = 2**30  # of the images whose distances are measured
_BLOCK = 4096  # rows of features that are added to the moments at a time


def write_stats(config: ConfigDict) -> pathlib.Path:
  """Computes the statistics of `eval.stats_split` and returns the path of their file.

  Each image counts once, neither flipped nor dequantized. Features are kept in memory only if the
  file is to hold them, and at most 1 GiB of training images are, for `sigma_max`.

  Raises:
    UserError: if the weights of the extractor or the data are missing, or the file cannot be
      written.
  """
  log_start(config)
  path = check(config)
  reporting.check_writable(path.parent, 'eval.stats_path')
  extractor = get_extractor(config)
  size, split = extractor.global_batch_size(), config.eval.stats_split
  source = datasets.get_source(config, split)
  if len(source) < 2:
    raise UserError(
      f'The split {split!r} of {config.data.dataset} has {len(source)} images, and fewer than two '
      f'have no covariance: set eval.stats_split or data.path to a larger set.'
    )
  made = provenance(config, extractor, images=getattr(source, 'fingerprint', None) or '')
  check_replaceable(path, made)
  dataset = datasets.Dataset(
    source, batch_size=size, seed=config.seed, shuffle=False, preprocess=None
  )

  digest, images = hashlib.sha256(), TrainingImages(config, source) if split == 'train' else None
  features = _Features(extractor.num_features, len(source), config.eval.stats_features)
  batches = progress.bar(dataset.once(), 'statistics', len(dataset), unit='images', scale=size)
  for i, batch in enumerate(batches):
    batch = parallelism.global_batch(batch['image'])
    pixels = parallelism.to_host(batch)[: dataset.count(i)]
    digest.update(pixels.tobytes())
    features.add(extractor.extract_global(batch)['pool_3'][: len(pixels)])
    if images is not None:
      images.add(i * size, pixels)
  features.finish()
  moments = features.moments
  baseline = metrics.split_half_baseline(extractor.name, features.halves, features.pool_3)
  arrays = {'mu': moments.mean, 'sigma': moments.covariance(), 'count': moments.count}
  arrays |= {f'made_{k}': v for k, v in made.items()} | {'made_checksum': digest.hexdigest()}
  arrays |= {f'floor_{k}': v for k, v in baseline.items()}
  if features.pool_3 is not None:
    arrays['pool_3'] = features.pool_3
  if jax.process_index() == 0:
    reporting.write_npz(path, **arrays)
  logging.info('%d images of %s: %s', moments.count, config.data.dataset, path)
  for name, value in baseline.items():
    logging.info('split-half baseline, %s: %.6g', name, value)
  if config.eval.sigma_max_images:
    logging.info('%s', images.sigma_max_line() if images else sigma_max_line(config))
  return path


def check(config: ConfigDict) -> pathlib.Path:
  """Refuses settings that `--mode=stats` cannot use; returns the path of its file."""
  settings, path = config.eval, stats_path(config)
  if settings.stats_split not in ('train', 'test'):
    raise UserError(f"eval.stats_split={settings.stats_split!r} must be 'train' or 'test'.")
  if settings.sigma_max_images < 0 or settings.sigma_max_images == 1:
    raise UserError(
      f'eval.sigma_max_images={settings.sigma_max_images} must be 2 or more, or 0 to leave '
      f'sigma_max out.'
    )
  if path.is_dir():
    raise UserError(f'eval.stats_path={path} is a folder: set the path of a file.')
  return path


class _Features:
  """Collects features that arrive in batches, and their moments.

  Args:
    dim: the number of features D of an image.
    count: the number of images N.
    keep: whether to keep the features.

  Attributes:
    moments: the moments of all images.
    halves: the moments of the images of even and of odd number.
    pool_3: all features, (N, D), or None.
  """

  def __init__(self, dim: int, count: int, keep: bool):
    self.moments = metrics.FeatureMoments(dim)
    self.halves = metrics.FeatureMoments(dim), metrics.FeatureMoments(dim)
    self.pool_3 = np.empty((count, dim), np.float32) if keep else None
    self._waiting: list[np.ndarray] = []  # many rows at a time cost little more than one

  def add(self, pool_3: Features) -> None:
    """Adds the features (B, D) of the next B images."""
    self._waiting.append(pool_3)
    if sum(map(len, self._waiting)) >= _BLOCK:
      self.finish()

  def finish(self) -> None:
    """Adds the waiting features to the moments; must be called after the last batch."""
    if not self._waiting:
      return
    rows, self._waiting, start = np.concatenate(self._waiting), [], self.moments.count
    self.moments.add(rows)
    for k, half in enumerate(self.halves):
      half.add(rows[(start + k) % 2 :: 2])
    if self.pool_3 is not None:
      self.pool_3[start : self.moments.count] = rows


class TrainingImages:
  """The training images that `sigma_max` is measured on: all, or a random sample of allowed size.

  Args:
    config: the configuration; `eval.sigma_max_images`, `seed` and `data` are read.
    source: the training images.
  """

  def __init__(self, config: ConfigDict, source: datasets.Source):
    shape = (config.data.image_size, config.data.image_size, config.data.num_channels)
    count = min(len(source), config.eval.sigma_max_images, _SIGMA_MAX_BYTES // math.prod(shape))
    rng = np.random.RandomState(config.seed)
    self._source, self._scaler = source, datasets.get_data_scaler(config)
    self._chosen = np.sort(rng.permutation(len(source))[:count])
    self._pixels = np.empty((count, *shape), np.uint8)

  def add(self, start: int, images: GreyLevels) -> None:
    """Keeps those of the images (B, H, W, C) of number `start`, ... that are in the sample."""
    first, last = np.searchsorted(self._chosen, (start, start + len(images)))
    self._pixels[first:last] = images[self._chosen[first:last] - start]

  def read(self) -> 'TrainingImages':
    """Reads the sample, and no other images, from the source; returns itself."""
    for i in progress.bar(self._chosen.tolist(), 'reading for sigma_max', unit='images'):
      self.add(i, self._source[i]['image'][None])
    return self

  @functools.cached_property
  def _largest_distance(self) -> float:
    return largest_distance(self._pixels)

  def sigma_max(self, scaler: Scaler | None = None) -> float:
    """The largest distance between two of these images, in the units of `scaler`.

    Args:
      scaler: the map from [0, 1] to the range of the images; None takes that of the configuration.
    """
    scaler = scaler or self._scaler
    return self._largest_distance / 255 * (scaler(1.0) - scaler(0.0))

  def sigma_max_line(self, scaler: Scaler | None = None) -> str:
    """The line of a configuration that sets `sigma_max`, for images in the units of `scaler`."""
    scaler = scaler or self._scaler
    low, high, distance = scaler(0.0), scaler(1.0), self.sigma_max(scaler)
    count, total = len(self._chosen), len(self._source)
    whole = count == total
    return (
      f'config.model.sigma_max = {distance:.4g}  # largest distance between '
      f'{count if whole else f"{count} of {total}"} training images in [{low:g}, {high:g}]'
      f'{"" if whole else "; that of all may be larger"}'
    )


def sigma_max_line(config: ConfigDict) -> str:
  """The line of a configuration that sets `sigma_max` for its training images."""
  return TrainingImages(config, datasets.get_source(config, 'train')).read().sigma_max_line()


def largest_distance(images: _Levels, block_bytes: int = 2**26) -> float:
  """The largest Euclidean distance between two of the images (N, ...), in grey levels.

  It compares all pairs on the devices, blocks of `block_bytes` (as float32) with blocks.
  """
  pixels = images.reshape(len(images), -1)
  size = max(1, min(len(pixels), block_bytes // (4 * pixels.shape[1])))

  @jax.jit
  def farthest(x: _Rows, y: _Rows) -> tuple[Scalar, Count]:
    x, y = (a.astype(jnp.float32) - 127.5 for a in (x, y))
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * product
    i = jnp.argmax(squares)
    return squares.reshape(-1)[i], i

  def block(start: int) -> _Rows:
    rows = pixels[start : start + size]
    return np.concatenate([rows, rows[:1].repeat(size - len(rows), 0)])  # all blocks have one shape

  starts = range(0, len(pixels), size)
  best, pair = -1.0, (0, 0)
  for a in progress.bar(starts, 'sigma_max', unit='blocks'):
    x = block(a)
    for b in range(a, len(pixels), size):
      square, i = farthest(x, block(b))
      if square > best:
        best, pair = square, (a + int(i) // size, b + int(i) % size)
  x, y = (np.float64(pixels[i if i < len(pixels) else i - i % size]) for i in pair)
  return float(np.sqrt(((x - y) ** 2).sum()))
