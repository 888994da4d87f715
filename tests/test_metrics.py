"""FID, KID, Inception score, precision and recall against recorded values and closed forms."""

import numpy as np
import pytest
import scipy.stats

import metrics
from errors import UserError
from tests.golden_values import load


def fid(real, fake):
  a, b = metrics.moments(real), metrics.moments(fake)
  return metrics.frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())


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
  actual = metrics.frechet_distance(m1, (basis * s1**2) @ basis.T, m2, (basis * s2**2) @ basis.T)
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_fid_of_gaussians_in_two_dimensions_is_the_closed_form():
  """tr sqrt(S1 S2) = sqrt(tr(S1 S2) + 2 sqrt(det(S1 S2))) for two by two, commuting or not."""
  s1, s2 = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
  product = s1 @ s2
  root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
  expected = 1 + np.trace(s1) + np.trace(s2) - 2 * root
  actual = metrics.frechet_distance(np.zeros(2), s1, np.array([1.0, 0.0]), s2)
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_streamed_moments_are_those_of_the_whole_in_double_precision():
  features = (1000 + np.random.RandomState(2).randn(9000, 7)).astype(np.float32)
  streamed = metrics.Moments(7)
  for part in np.split(features, [1, 2, 5000, 5001]):
    streamed.add(part)
  assert streamed.count == 9000
  np.testing.assert_allclose(streamed.mean, np.float64(features).mean(0), rtol=1e-12)
  np.testing.assert_allclose(streamed.covariance(), np.cov(np.float64(features).T), rtol=1e-9)


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
