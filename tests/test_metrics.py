"""FID, KID, Inception score, precision and recall against recorded values and closed forms."""

import numpy as np
import pytest
import scipy.stats

import metrics
from runtime.errors import UserError
from tests.golden_values import load


def fid(real, fake):
  a, b = metrics.moments(real), metrics.moments(fake)
  return metrics.frechet_distance((a.mean, a.covariance()), (b.mean, b.covariance()))


def test_recorded_values():
  recorded = load('metrics')
  real, fake, logits = recorded['real'], recorded['fake'], recorded['logits']
  np.testing.assert_allclose(fid(real, fake), recorded['fid'], rtol=1e-4)
  np.testing.assert_allclose(fid(real[:40], fake[:50]), recorded['fid_rank_deficient'], rtol=1e-4)
  np.testing.assert_allclose(metrics.kernel_distance(real, fake), recorded['kid'], rtol=1e-4)
  np.testing.assert_allclose(
    metrics.kernel_distance(real, fake, 625), recorded['kid_4_blocks'], rtol=1e-4
  )
  np.testing.assert_allclose(
    metrics.inception_score(logits), recorded['inception_score'], rtol=1e-4
  )


@pytest.mark.parametrize('count', [2, 20, 2000])  # the first two have singular covariances
def test_fid_of_a_set_with_itself_is_zero(count):
  features = np.random.RandomState(0).lognormal(size=(count, 64))
  assert fid(features, features) <= 1e-6


def test_fid_of_commuting_gaussians_is_the_closed_form():
  """||m1 - m2||^2 + sum (s1 - s2)^2 in a common eigenbasis, also where some s are zero."""
  rng = np.random.RandomState(1)
  basis = np.linalg.qr(rng.randn(40, 40))[0]
  s1, s2 = rng.gamma(2, size=(2, 40))
  s1[:15] = 0
  s2[10:30] = 0
  m1, m2 = rng.randn(2, 40)
  expected = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
  actual = metrics.frechet_distance(
    (m1, (basis * s1**2) @ basis.T), (m2, (basis * s2**2) @ basis.T)
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_fid_of_gaussians_in_two_dimensions_is_the_closed_form():
  """tr sqrt(S1 S2) = sqrt(tr(S1 S2) + 2 sqrt(det(S1 S2))) for two by two, commuting or not."""
  s1, s2 = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
  product = s1 @ s2
  root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
  expected = 1 + np.trace(s1) + np.trace(s2) - 2 * root
  actual = metrics.frechet_distance((np.zeros(2), s1), (np.array([1.0, 0.0]), s2))
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_streamed_moments_are_those_of_the_whole_in_double_precision():
  features = (1000 + np.random.RandomState(2).randn(9000, 7)).astype(np.float32)
  streamed = metrics.FeatureMoments(7)
  for part in np.split(features, [1, 2, 5000, 5001]):
    streamed.add(part)
  assert streamed.count == 9000
  np.testing.assert_allclose(streamed.mean, np.float64(features).mean(0), rtol=1e-12)
  np.testing.assert_allclose(streamed.covariance(), np.cov(np.float64(features).T), rtol=1e-9)


@pytest.mark.slow
def test_kid_is_unbiased_over_resamplings():
  """The mean over resamplings is the squared MMD of the populations, zero where they are one."""
  rng = np.random.RandomState(3)
  population = rng.randn(30, 5)
  other = 1.5 * rng.randn(30, 5) + 0.5

  def kernel(a, b):
    return (a @ b.T / 5 + 1) ** 3

  expected = (
    kernel(population, population).mean()
    + kernel(other, other).mean()
    - 2 * kernel(population, other).mean()
  )

  def estimates(p, q):
    for _ in range(3000):
      x, y = p[rng.randint(30, size=25)], q[rng.randint(30, size=20)]
      yield metrics.kernel_distance(x, y, max_block_size=9)

  for values, truth in (
    (list(estimates(population, other)), expected),
    (list(estimates(population, population)), 0.0),
  ):
    error = np.mean(values) - truth
    assert abs(error) < 4 * scipy.stats.sem(values)
  assert expected > 10 * scipy.stats.sem(values)


def test_inception_score_of_certain_predictions_is_the_number_of_classes():
  certain = 1e4 * np.eye(10)[np.arange(50) % 10]
  np.testing.assert_allclose(metrics.inception_score(certain), 10, rtol=1e-9)
  np.testing.assert_allclose(metrics.inception_score(certain[:1].repeat(5, 0)), 1, rtol=1e-9)
  np.testing.assert_allclose(metrics.inception_score(np.zeros((5, 10))), 1, rtol=1e-9)


def test_precision_and_recall_by_counting():
  """Points on a line: half of the fake ones are among the real ones, and reach half of them."""
  real = np.arange(100.0)[:, None]
  fake = np.concatenate([np.arange(50.0), 1000 + np.arange(50.0)])[:, None]
  # The third neighbour of an inner point is two away, that of the last one three.
  precision, recall = metrics.precision_recall(real, fake)
  assert precision == 0.5
  assert recall == (50 + 3) / 100
  assert metrics.precision_recall(real, real) == (1, 1)
  assert metrics.precision_recall(real, real + 1000) == (0, 0)


def test_too_few_samples_are_refused():
  one = np.zeros((1, 4))
  with pytest.raises(UserError, match='1 samples have no covariance'):
    metrics.moments(one).covariance()
  with pytest.raises(UserError, match='1 samples have no covariance'):
    metrics.kernel_distance(one, one)
  with pytest.raises(UserError, match='3 samples are too few'):
    metrics.precision_recall(np.zeros((3, 4)), np.zeros((9, 4)))


SCORES = {
  'moments': lambda x: metrics.moments(x),
  'fid': lambda x: fid(np.eye(6, 4), x),
  'kid': lambda x: metrics.kernel_distance(np.eye(6, 4), x),
  'kid, exchanged': lambda x: metrics.kernel_distance(x, np.eye(6, 4)),
  'precision and recall': lambda x: metrics.precision_recall(np.eye(6, 4), x),
  'inception score': metrics.inception_score,
}


@pytest.mark.parametrize('score', SCORES.values(), ids=SCORES)
def test_values_that_are_not_finite_are_refused(score):
  """Also those whose powers would not be, and negative infinity, whose exponential would be."""
  for value in (np.nan, np.inf, -np.inf, 1e200):
    features = np.random.RandomState(0).randn(5000, 4)
    features[4097, 2] = features[4099] = value  # in the second block of rows
    with pytest.raises(UserError, match='of 2 of 5000 images are not finite'):
      score(features)


@pytest.mark.parametrize('score', SCORES.values(), ids=SCORES)
def test_what_is_no_matrix_of_real_numbers_is_refused(score):
  for features in (np.zeros(5), np.zeros((5, 2, 2)), np.zeros((5, 0)), np.zeros((5, 4), complex)):
    with pytest.raises(UserError, match='must be real numbers, one row for each image'):
      score(features)


def test_features_of_different_width_are_refused():
  eight, four = np.random.RandomState(0).randn(9, 8), np.eye(9, 4)
  with pytest.raises(UserError, match='FeatureMoments of 8 and of 4 features cannot be compared'):
    fid(eight, four)
  for score in (metrics.kernel_distance, metrics.precision_recall):
    with pytest.raises(UserError, match='have 4 columns, .* have 8: use one eval.extractor'):
      score(eight, four)
  with pytest.raises(UserError, match='have 1 columns, .* have 8'):
    metrics.FeatureMoments(8).add(np.zeros((3, 1)))  # would broadcast


def test_no_images_have_no_score():
  for score in (metrics.inception_score, lambda x: metrics.moments(x).covariance()):
    with pytest.raises(UserError, match='0 samples have no'):
      score(np.zeros((0, 4)))


def test_what_are_no_moments_are_refused():
  mean, covariance = np.zeros(3), np.cov(np.random.RandomState(0).randn(3, 9))
  asymmetric, negative, damaged = covariance.copy(), covariance.copy(), covariance.copy()
  asymmetric[0, 1] += 0.1
  negative[1, 1] *= -1
  damaged[2, 2] = np.nan
  for message, broken in (
    ('not symmetric', (mean, asymmetric)),
    ('has negative eigenvalues', (mean, negative)),
    ('not finite', (mean, damaged)),
    ('not finite', (np.full(3, np.inf), covariance)),
    (r'which must be \(D,\) and \(D, D\)', (mean, covariance[:2])),
    ('the mean has the shape', (mean[None], covariance)),
  ):
    for pair in ((broken, (mean, covariance)), ((mean, covariance), broken)):
      with pytest.raises(UserError, match=message):
        metrics.frechet_distance(*pair)


def test_moments_in_single_precision_and_of_equal_images_are_moments():
  """What rounding leaves of a singular covariance is not mistaken for damage."""
  features = np.random.RandomState(0).randn(20, 64).astype(np.float32)
  moments = metrics.moments(features)
  single = moments.covariance().astype(np.float32)
  assert np.linalg.eigvalsh(np.float64(single))[0] < 0
  assert not metrics.flaw(moments.mean, single)
  assert fid(np.ones((5, 4)), np.ones((9, 4))) == 0
