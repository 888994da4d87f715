"""Distances between two sets of features, and scores of logits, in double precision on the host.

Features are arrays (N, D) of real numbers with one row for each image. They are converted to double
precision one block at a time, so that 50,000 features of Inception take little more memory than
they already do.

What would give NaN or a meaningless number raises `UserError`: values that are not finite, sets of
different width, too few images, a matrix that is not a covariance. That is why the annotations of
the public functions, unlike those of the private ones, leave the shape open: the functions check
it.

References:

- Binkowski et al. 2018 (KID), "Demystifying MMD GANs", https://arxiv.org/abs/1801.01401.
- Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance: Analysis and
  Recommendations", The American Statistician 37.
- Heusel et al. 2017 (FID), "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
  Equilibrium", https://arxiv.org/abs/1706.08500.
- Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models",
  https://arxiv.org/abs/1904.06991.
- Salimans et al. 2016 (Inception score), "Improved Techniques for Training GANs",
  https://arxiv.org/abs/1606.03498.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float64, Real, Shaped

from runtime.errors import UserError

Unchecked = Shaped[np.ndarray, '...']
Rows = Real[np.ndarray, 'N D']
Block = Float64[np.ndarray, 'n D']
Mean = Float64[np.ndarray, ' D']
Covariance = Float64[np.ndarray, 'D D']

_BLOCK = 4096
_LARGEST = 1e50  # of features and logits, so that the sums of their sixth powers are finite
_PRECISION_RECALL_SAMPLES = 10_000  # more cost the square of their number
NEIGHBOURS = 3  # of precision and recall, as in Kynkaanniemi et al. 2019


class FeatureMoments:
  """Mean and covariance of features that arrive in blocks.

  Attributes:
    count: number of images so far.
    mean: their mean, (D,).

  Args:
    dim: number of features, D.
  """

  def __init__(self, dim: int):
    self.count = 0
    self.mean: Mean = np.zeros(dim)
    self._scatter: Covariance = np.zeros((dim, dim))

  def add(self, features: Unchecked) -> 'FeatureMoments':
    """Adds more rows and returns itself (Chan, Golub and LeVeque 1983, Eq. 2.1).

    With n rows of mean m so far and k new ones of mean m', the scatter matrices of both add up to
    that of all but for n k / (n + k) (m' - m)(m' - m)^T.

    Args:
      features: (k, D).

    Raises:
      UserError: if rows are not D wide or have values that are not finite.
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

  def covariance(self) -> Covariance:
    """The unbiased covariance, (D, D).

    Raises:
      UserError: if there are fewer than two rows.
    """
    check_count(self.count)
    return self._scatter / (self.count - 1)


def moments(features: Unchecked) -> FeatureMoments:
  """Returns the moments of a whole set of features, (N, D).

  Raises:
    UserError: if it is not a matrix of finite real numbers.
  """
  _check_rows('features', features)
  return FeatureMoments(features.shape[1]).add(features)


def check_count(count: int) -> None:
  """Refuses sets without a covariance.

  Raises:
    UserError: if `count` is less than two.
  """
  if count < 2:
    raise UserError(f'{count} samples have no covariance: set eval.num_samples to 2 or more.')


def flaw(mean: Unchecked, covariance: Unchecked) -> str:
  """Says why these cannot be the mean, (D,), and the covariance, (D, D), of features.

  The result is empty if they can.
  """
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


def _check_rows(what: str, rows: Unchecked, dim: int | None = None) -> None:
  """Raises `UserError` unless `rows` is a matrix, `dim` wide, of finite real numbers."""
  if rows.ndim != 2 or not rows.shape[1] or rows.dtype.kind not in 'fiu':
    raise UserError(
      f'The {what} have the shape {rows.shape} and type {rows.dtype}: they must be real numbers, '
      f'one row for each image.'
    )
  if dim not in (None, rows.shape[1]):
    raise UserError(
      f'The {what} have {rows.shape[1]} columns, but those of the other set have {dim}: use one '
      f'eval.extractor for both.'
    )
  # The comparison is false for NaN, too.
  broken = sum(len(x) - int((np.abs(x) < _LARGEST).all(1).sum()) for x in _blocks(rows, _BLOCK))
  if broken:
    raise UserError(
      f'The {what} of {broken} of {len(rows)} images are not finite: check the images and the '
      f'weights of the extractor.'
    )


def _check_pair(real: Unchecked, fake: Unchecked) -> None:
  _check_rows('features', real)
  _check_rows('features', fake, real.shape[1])


def frechet_distance(
  first: tuple[Unchecked, Unchecked], second: tuple[Unchecked, Unchecked]
) -> float:
  """The FID: ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, Eq. 6).

  The eigenvalues of S1 S2 are the squared singular values of A1^T A2 where S = A A^T. Singular
  values are real and not negative, and no less exact where a covariance is singular.

  Args:
    first: the mean m1, (D,), and the covariance S1, (D, D), of one set of features.
    second: m2 and S2 of the other, shaped likewise.

  Raises:
    UserError: if these cannot be moments of features, or the features are of different width.
  """
  (mean1, covariance1), (mean2, covariance2) = first, second
  if found := flaw(*first) or flaw(*second):
    raise UserError(
      f'The FID is undefined, since {found}: compute the moments again from features.'
    )
  if mean1.shape != mean2.shape:
    raise UserError(
      f'FeatureMoments of {mean1.size} and of {mean2.size} features cannot be compared: use one '
      f'eval.extractor for both.'
    )
  root1, root2 = _factor(covariance1), _factor(covariance2)
  cross = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
  gap = np.sum((np.float64(mean1) - mean2) ** 2)
  traces = sum(np.trace(covariance, dtype=np.float64) for covariance in (covariance1, covariance2))
  # Rounding can make the distance between a set and itself slightly negative.
  return float(max(gap + traces - 2 * cross, 0.0))


def _factor(covariance: Real[np.ndarray, 'D D']) -> Float64[np.ndarray, 'D rank']:
  """A with A A^T = covariance, one column for each positive eigenvalue."""
  values, vectors = np.linalg.eigh(np.float64(covariance))
  positive = values > 0
  return vectors[:, positive] * np.sqrt(values[positive])


def kernel_distance(real: Unchecked, fake: Unchecked, max_block_size: int = 1024) -> float:
  """The KID (Binkowski et al. 2018): the unbiased squared MMD under k(x, y) = (x.y / D + 1)^3.

  It is a mean over blocks, which are cut in the order of the rows, as tensorflow-gan cuts them.

  Args:
    real: features of the data, (N, D).
    fake: features of the samples, (M, D).
    max_block_size: the largest number of rows in a block.

  Raises:
    UserError: if a set has fewer than two images, or values that are not finite, or if the sets are
      of different width.
  """
  _check_pair(real, fake)
  check_count(min(len(real), len(fake)))
  blocks = -(-max(len(real), len(fake)) // max_block_size)
  # A set much smaller than the other must still give two rows to each block.
  blocks = min(blocks, len(real) // 2, len(fake) // 2)
  pairs = zip(_parts(real, blocks), _parts(fake, blocks), strict=True)
  return float(np.mean([_squared_mmd(x, y) for x, y in pairs]))


def _parts(features: Rows, count: int) -> Iterator[Block]:
  """`count` runs of rows whose lengths differ by at most one, the longer ones last."""
  size, longer = divmod(len(features), count)
  lengths = [size] * (count - longer) + [size + 1] * longer
  ends = np.cumsum(lengths)
  return (
    np.float64(features[end - length : end]) for end, length in zip(ends, lengths, strict=True)
  )


def _squared_mmd(x: Float64[np.ndarray, 'N D'], y: Float64[np.ndarray, 'M D']) -> float:
  within = sum(_mean_of_different(_kernel(a, a)) for a in (x, y))
  return within - 2 * float(_kernel(x, y).mean())


def _kernel(
  x: Float64[np.ndarray, 'N D'], y: Float64[np.ndarray, 'M D']
) -> Float64[np.ndarray, 'N M']:
  return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_different(k: Float64[np.ndarray, 'n n']) -> float:
  """The mean over pairs of different rows; a row paired with itself would bias it."""
  return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))


def inception_score(logits: Unchecked) -> float:
  """exp(E_x KL(p(y | x) || p(y))) (Salimans et al. 2016), over all samples at once.

  Args:
    logits: (N, K), of K classes.

  Raises:
    UserError: if N is zero, or if it is not a matrix of finite real numbers.
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
  # A class that no sample belongs to adds the limit of p log p, which is zero.
  log_marginal = np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))
  return float(np.exp(total_p_log_p / len(logits) - marginal @ log_marginal))


def precision_recall(
  real: Unchecked, fake: Unchecked, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
  """Improved precision and recall (Kynkaanniemi et al. 2019).

  Precision is the share of `fake` that lies no farther from some point of `real` than that point's
  k-th nearest neighbour in `real`; recall is the same with the sets exchanged.

  Args:
    real: features of the data, (N, D).
    fake: features of the samples, (M, D).
    neighbours: k.

  Returns:
    Precision and recall, both in [0, 1].

  Raises:
    UserError: if a set has k points or fewer, or values that are not finite, or if the sets are of
      different width.
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


def _radii(points: Rows, neighbours: int) -> Float64[np.ndarray, ' N']:
  """Squared distance from each point to its k-th nearest neighbour, number 0 being itself."""
  radii = [
    np.partition(d, neighbours, axis=1)[:, neighbours].copy()  # a view would keep all distances
    for d in _squared_distances(points, points)
  ]
  return np.concatenate(radii)


def _covered(
  points: Real[np.ndarray, 'M D'], centers: Rows, radii: Float64[np.ndarray, ' N']
) -> float:
  """The share of the points that lie in a ball around one of the centers, of its squared radius."""
  rows = _squared_distances(points, centers)
  inside: Bool[np.ndarray, ' M'] = np.concatenate([(d <= radii).any(axis=1) for d in rows])
  return float(np.mean(inside))


def _squared_distances(x: Rows, y: Real[np.ndarray, 'M D']) -> Iterator[Float64[np.ndarray, 'n M']]:
  """Blocks of rows of the matrix (N, M) of squared distances."""
  y_squares = np.concatenate([(block**2).sum(1) for block in _blocks(y, _BLOCK)])
  for rows in _blocks(x, 512):
    products = np.concatenate([rows @ block.T for block in _blocks(y, _BLOCK)], axis=1)
    products *= -2
    products += y_squares
    products += (rows**2).sum(1, keepdims=True)
    yield products


def _blocks(features: Rows, size: int) -> Iterator[Block]:
  for start in range(0, len(features), size):
    yield np.float64(features[start : start + size])


@dataclasses.dataclass(frozen=True)
class Names:
  """Names numbers after their extractor and the number of samples, as `fid_inception_50k`.

  Attributes:
    extractor: name of the extractor.
    count: number of samples.
  """

  extractor: str
  count: int

  def __call__(self, metric: str) -> str:
    """Returns the full name of the number `metric`; `50k` stands for 50,000 samples."""
    count = f'{self.count // 1000}k' if self.count % 1000 == 0 else str(self.count)
    return f'{metric}_{self.extractor}_{count}'


def split_half_baseline(
  extractor_name: str,
  halves: tuple[FeatureMoments, FeatureMoments],
  pool_3: Unchecked | None = None,
) -> dict[str, float]:
  """Compares every second image of the data with the others: what perfect samples would score.

  Args:
    extractor_name: for the names of the numbers.
    halves: moments of the features of every second image, and of the others.
    pool_3: the features of all images, (N, D); without them only the FID is computed.

  Returns:
    Numbers by name; none if a half has fewer than two images.

  Raises:
    UserError: if the features are not finite.
  """
  real, other = halves
  if other.count < 2:
    return {}
  fid = frechet_distance((real.mean, real.covariance()), (other.mean, other.covariance()))
  baseline = {Names(extractor_name, other.count)('fid'): fid}
  if pool_3 is not None:
    baseline |= feature_metrics(extractor_name, pool_3[::2], pool_3[1::2])
  return baseline


def feature_metrics(extractor_name: str, real: Unchecked, fake: Unchecked) -> dict[str, float]:
  """Computes the numbers that need the features themselves: KID, precision and recall.

  Precision and recall are of the first 10,000 images of each set, and left out if a set has no more
  than `NEIGHBOURS`.

  Args:
    extractor_name: for the names of the numbers.
    real: features of the data, (N, D).
    fake: features of the samples, (M, D).

  Returns:
    Numbers by name.

  Raises:
    UserError: as `kernel_distance`.
  """
  numbers = {Names(extractor_name, len(fake))('kid'): kernel_distance(real, fake)}
  real, fake = real[:_PRECISION_RECALL_SAMPLES], fake[:_PRECISION_RECALL_SAMPLES]
  if min(len(real), len(fake)) > NEIGHBOURS:
    names = Names(extractor_name, len(fake))
    precision, recall = precision_recall(real, fake)
    numbers |= {names('precision'): precision, names('recall'): recall}
  return numbers
