"""Distances between two sets of features, and scores of logits, in double precision on the host.

Features are (N, D) arrays of any floating point type, rows are images. They are brought to double
precision a block at a time, so that 50,000 features of Inception take little more than they are.

What would give NaN, or a number without meaning, raises `UserError`: values that are not finite,
sets of different widths, too few images, a matrix that is no covariance.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from runtime.errors import UserError

_BLOCK = 4096
_LARGEST = 1e50  # of features and logits: the sums of their sixth powers are finite
_PRECISION_RECALL_SAMPLES = 10_000  # more cost the square of their number
NEIGHBOURS = 3  # of precision and recall, as published


class FeatureMoments:
  """Mean and covariance of features that arrive in blocks.

  Args:
    dim: number of features.
  """

  def __init__(self, dim: int):
    self.count = 0
    self.mean = np.zeros(dim)
    self._scatter = np.zeros((dim, dim))

  def add(self, features: np.ndarray) -> 'FeatureMoments':
    """Takes in more rows (Chan, Golub and LeVeque 1983, Eq. 2.1); returns itself.

    Raises:
      UserError: for rows of another width, or values that are not finite.
    """
    _check_rows('features', features, len(self.mean))
    for block in _blocks(features, _BLOCK):
      total, mean = self.count + len(block), block.mean(0)
      delta, centered = mean - self.mean, block - mean
      self._scatter += centered.T @ centered
      self._scatter += np.outer(delta, delta) * (self.count * len(block) / total)
      self.mean += delta * (len(block) / total)
      self.count = total
    return self

  def covariance(self) -> np.ndarray:
    """The unbiased covariance.

    Raises:
      UserError: with fewer than two rows.
    """
    check_count(self.count)
    return self._scatter / (self.count - 1)


def moments(features: np.ndarray) -> FeatureMoments:
  """Those of a whole set."""
  _check_rows('features', features)
  return FeatureMoments(features.shape[1]).add(features)


def check_count(count: int) -> None:
  """Raises `UserError` below two samples, which have no covariance."""
  if count < 2:
    raise UserError(f'{count} samples have no covariance: set eval.num_samples to 2 or more.')


def flaw(mean: np.ndarray, covariance: np.ndarray) -> str:
  """Why these cannot be the mean and the covariance of features; empty if they can."""
  mean, covariance = np.float64(mean), np.float64(covariance)
  dim, tolerance = mean.size, 1e-5  # far above the rounding of single precision
  if not dim or mean.shape != (dim,) or covariance.shape != (dim, dim):
    return (
      f'the mean has the shape {mean.shape} and the covariance {covariance.shape}, which must be '
      f'(D,) and (D, D)'
    )
  if not ((np.abs(mean) < _LARGEST).all() and (np.abs(covariance) < _LARGEST**2).all()):
    return 'the mean or the covariance has values that are not finite'
  if np.abs(covariance - covariance.T).max() > tolerance * np.abs(covariance).max():
    return 'the covariance is not symmetric'
  shift = tolerance * np.trace(covariance) + np.finfo(np.float64).tiny
  try:
    # It exists if no eigenvalue is below -shift, and costs a fraction of the eigenvalues.
    np.linalg.cholesky(covariance + shift * np.eye(dim))
  except np.linalg.LinAlgError:
    return 'the covariance has negative eigenvalues'
  return ''


def _check_rows(what: str, rows: np.ndarray, dim: int | None = None) -> None:
  """Raises `UserError` unless `rows` is a matrix, `dim` wide, of finite real numbers."""
  if rows.ndim != 2 or not rows.shape[1] or rows.dtype.kind not in 'fiu':
    raise UserError(
      f'The {what} have the shape {rows.shape} and type {rows.dtype}: they must be real numbers, '
      f'one row for each image.'
    )
  if dim not in (None, rows.shape[1]):
    raise UserError(
      f'The {what} have {rows.shape[1]} columns, but those that they belong to have {dim}: use one '
      f'eval.extractor for both.'
    )
  # NaN is not below it either.
  broken = sum(len(x) - int((np.abs(x) < _LARGEST).all(1).sum()) for x in _blocks(rows, _BLOCK))
  if broken:
    raise UserError(
      f'The {what} of {broken} of {len(rows)} images are not finite: check the images and the '
      f'weights of the extractor.'
    )


def _check_pair(real: np.ndarray, fake: np.ndarray) -> None:
  _check_rows('features', real)
  _check_rows('features', fake, real.shape[1])


def frechet_distance(
  mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
  """The FID: ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, Eq. 6).

  The eigenvalues of S1 S2 are the squared singular values of A1^T A2 where S = A A^T, and those are
  real and not negative. They also are as exact where a covariance is singular.

  Raises:
    UserError: for what cannot be moments of features, or features of different width.
  """
  if found := flaw(mean1, covariance1) or flaw(mean2, covariance2):
    raise UserError(f'There is no FID, because {found}: make the moments again from the features.')
  if mean1.shape != mean2.shape:
    raise UserError(
      f'FeatureMoments of {mean1.size} and of {mean2.size} features cannot be compared: use one '
      f'eval.extractor for both.'
    )
  root1, root2 = _factor(covariance1), _factor(covariance2)
  cross = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
  gap = np.sum((np.float64(mean1) - mean2) ** 2)
  traces = sum(np.trace(covariance, dtype=np.float64) for covariance in (covariance1, covariance2))
  # Rounding may leave less than nothing of the distance between a set and itself.
  return float(max(gap + traces - 2 * cross, 0.0))


def _factor(covariance: np.ndarray) -> np.ndarray:
  """A with A A^T = covariance, one column for each positive eigenvalue."""
  values, vectors = np.linalg.eigh(np.float64(covariance))
  positive = values > 0
  return vectors[:, positive] * np.sqrt(values[positive])


def kernel_distance(real: np.ndarray, fake: np.ndarray, max_block_size: int = 1024) -> float:
  """The KID (Binkowski et al. 2018): the unbiased squared MMD under k(x, y) = (x.y / D + 1)^3.

  A mean over blocks, cut in the order of the rows as tensorflow-gan cuts them.

  Raises:
    UserError: for sets of fewer than two images, of different width, or not finite.
  """
  _check_pair(real, fake)
  check_count(min(len(real), len(fake)))
  blocks = -(-max(len(real), len(fake)) // max_block_size)
  # A set much smaller than the other must still give two rows to each block.
  blocks = min(blocks, len(real) // 2, len(fake) // 2)
  pairs = zip(_parts(real, blocks), _parts(fake, blocks), strict=True)
  return float(np.mean([_squared_mmd(x, y) for x, y in pairs]))


def _parts(features: np.ndarray, count: int) -> Iterator[np.ndarray]:
  """`count` runs of rows whose lengths differ by at most one, the longer ones last."""
  size, longer = divmod(len(features), count)
  lengths = [size] * (count - longer) + [size + 1] * longer
  ends = np.cumsum(lengths)
  return (
    np.float64(features[end - length : end]) for end, length in zip(ends, lengths, strict=True)
  )


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
  def kernel(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3

  def mean_of_different(k):
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

  return mean_of_different(kernel(x, x)) + mean_of_different(kernel(y, y)) - 2 * kernel(x, y).mean()


def inception_score(logits: np.ndarray) -> float:
  """exp(E KL(p(y | x) || p(y))) (Salimans et al. 2016), over all samples at once.

  Raises:
    UserError: for no logits, or values that are not finite.
  """
  _check_rows('logits', logits)
  if not len(logits):
    raise UserError('0 samples have no Inception score: set eval.num_samples to 2 or more.')
  total_p, total_p_log_p = np.zeros(logits.shape[1]), 0.0
  for block in _blocks(logits, _BLOCK):
    log_p = block - block.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    total_p += p.sum(0)
    total_p_log_p += np.sum(p * log_p)
  marginal = total_p / len(logits)
  # Of a class that no sample belongs to, the limit of p log p is zero.
  log_marginal = np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))
  return float(np.exp(total_p_log_p / len(logits) - marginal @ log_marginal))


def precision_recall(
  real: np.ndarray, fake: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
  """Improved precision and recall (Kynkaanniemi et al. 2019).

  Precision is the share of `fake` that lies no farther from some point of `real` than that point's
  k-th nearest neighbour in `real`; recall is the same with the sets exchanged.

  Raises:
    UserError: if a set has not more than k points, or as `kernel_distance`.
  """
  _check_pair(real, fake)
  smallest = min(len(real), len(fake))
  if smallest <= neighbours:
    raise UserError(
      f'{smallest} samples are too few for precision and recall with {neighbours} neighbours: set '
      f'eval.num_samples to {neighbours + 1} or more.'
    )
  return (
    _covered(fake, real, _radii(real, neighbours)),
    _covered(real, fake, _radii(fake, neighbours)),
  )


def _radii(points: np.ndarray, neighbours: int) -> np.ndarray:
  """Squared distance from each point to its k-th nearest neighbour; the nearest is itself."""
  radii = [
    np.partition(d, neighbours, axis=1)[:, neighbours].copy()  # a view would keep all distances
    for d in _squared_distances(points, points)
  ]
  return np.concatenate(radii)


def _covered(points: np.ndarray, centers: np.ndarray, radii: np.ndarray) -> float:
  rows = _squared_distances(points, centers)
  return float(np.mean(np.concatenate([(d <= radii).any(axis=1) for d in rows])))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
  """Rows of the matrix of squared distances, some at a time."""
  y_squares = np.concatenate([(block**2).sum(1) for block in _blocks(y, _BLOCK)])
  for rows in _blocks(x, 512):
    products = np.concatenate([rows @ block.T for block in _blocks(y, _BLOCK)], axis=1)
    products *= -2
    products += y_squares
    products += (rows**2).sum(1, keepdims=True)
    yield products


def _blocks(features: np.ndarray, size: int) -> Iterator[np.ndarray]:
  for start in range(0, len(features), size):
    yield np.float64(features[start : start + size])


@dataclasses.dataclass(frozen=True)
class Names:
  """`fid` -> `fid_inception_50k`."""

  extractor: str
  count: int

  def __call__(self, metric: str) -> str:
    count = f'{self.count // 1000}k' if self.count % 1000 == 0 else str(self.count)
    return f'{metric}_{self.extractor}_{count}'


def split_half_baseline(
  extractor_name: str,
  halves: tuple[FeatureMoments, FeatureMoments],
  pool_3: np.ndarray | None = None,
) -> dict[str, float]:
  """Numbers of every second image compared with the others: what perfect samples would have.

  Args:
    extractor_name: for the names of the numbers.
    halves: moments of the features of every second image, and of the others.
    pool_3: the features of all; without them there is only the FID.
  """
  real, other = halves
  if other.count < 2:
    return {}
  fid = frechet_distance(real.mean, real.covariance(), other.mean, other.covariance())
  baseline = {Names(extractor_name, other.count)('fid'): fid}
  if pool_3 is not None:
    baseline |= feature_metrics(extractor_name, pool_3[::2], pool_3[1::2])
  return baseline


def feature_metrics(extractor_name: str, real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
  numbers = {Names(extractor_name, len(fake))('kid'): kernel_distance(real, fake)}
  real, fake = real[:_PRECISION_RECALL_SAMPLES], fake[:_PRECISION_RECALL_SAMPLES]
  if min(len(real), len(fake)) > NEIGHBOURS:
    names = Names(extractor_name, len(fake))
    precision, recall = precision_recall(real, fake)
    numbers |= {names('precision'): precision, names('recall'): recall}
  return numbers
