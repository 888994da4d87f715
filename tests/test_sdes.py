"""SDEs against recorded values, autodiff and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime.errors import UserError
from sde_lib import VESDE, VPSDE, subVPSDE
from tests import golden_values as golden
from tests.exact_scores import RECORDED_SDES, gaussian_marginal, gaussian_score, recorded_score

pytestmark = pytest.mark.usefixtures('strict_promotion')

SDES = [VPSDE(), subVPSDE(), VESDE()]


@pytest.mark.parametrize('name', RECORDED_SDES)
def test_forward_and_reverse_agree_with_recorded_values(name, recorded_random_bits):
  recorded = golden.load('sdes')
  x, t = jnp.asarray(recorded['x']), jnp.asarray(recorded['t'])
  sde = RECORDED_SDES[name]
  actual = {
    'drift': sde.sde(x, t)[0],
    'diffusion': sde.sde(x, t)[1],
    'mean': sde.marginal_prob(x, t)[0],
    'std': sde.marginal_prob(x, t)[1],
    'f': sde.discretize(x, t)[0],
    'G': sde.discretize(x, t)[1],
    'prior_logp': sde.prior_logp(x),
    'prior_sample': sde.prior_sampling(jax.random.PRNGKey(0), (2, 4, 4, 3)),
  }
  for flow in (0, 1):
    rsde = sde.reverse(recorded_score, probability_flow=bool(flow))
    actual[f'rev_drift_{flow}'], actual[f'rev_diffusion_{flow}'] = rsde.sde(x, t)
    actual[f'rev_f_{flow}'], actual[f'rev_G_{flow}'] = rsde.discretize(x, t)
  for key, value in actual.items():
    golden.assert_close(value, recorded[f'{name}/{key}'], 2e-5)


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
def test_marginals_solve_the_moment_equations_of_the_sde(sde):
  """d mean/dt = f(mean) and d var/dt = 2 (f / x) var + g^2 (Sarkka and Solin 2019, Eq. 5.50)."""

  def moments(t):
    mean, std = sde.marginal_prob(jnp.ones((1, 1)), t[None])
    return mean[0, 0], std[0] ** 2

  for t in jnp.asarray([0.05, 0.3, 0.7, 1.0]):
    (mean, var), (dmean, dvar) = jax.jvp(moments, (t,), (1.0,))
    drift, diffusion = sde.sde(jnp.ones((1, 1)), t[None])
    np.testing.assert_allclose(dmean, drift[0, 0] * mean, rtol=1e-4, atol=1e-6)
    g2 = diffusion[0] ** 2
    np.testing.assert_allclose(dvar, 2 * drift[0, 0] * var + g2, rtol=0, atol=1e-5 * g2)


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
def test_prior_matches_the_last_marginal_and_its_density(sde):
  z = sde.prior_sampling(jax.random.PRNGKey(0), (20000, 4))
  std = sde.marginal_prob(jnp.zeros((1, 4)), jnp.ones((1,)))[1][0]
  assert abs(np.std(z) / std - 1) < 0.01
  # The entropy of N(0, sigma^2 I) is the mean of -log p.
  entropy = 4 * (0.5 + 0.5 * np.log(2 * np.pi) + np.log(std))
  np.testing.assert_allclose(-np.mean(sde.prior_logp(z)), entropy, rtol=5e-3)


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
def test_reverse_of_the_exact_gaussian_score_keeps_the_marginal_variance(sde):
  """The probability flow of N(0, s^2) data moves each x_t along its standard deviation."""
  t = jnp.asarray([0.3])
  score = gaussian_score(sde, std=0.5)
  log_std = lambda t: jnp.log(gaussian_marginal(sde, t[None], std=0.5)[1][0])
  x = jnp.full((1, 1), 1.7)
  velocity, diffusion = sde.reverse(score, probability_flow=True).sde(x, t)
  expected = x[0, 0] * jax.grad(log_std)(t[0])
  np.testing.assert_allclose(velocity[0, 0], expected, rtol=1e-4)
  assert diffusion[0] == 0


def test_impossible_parameters_are_refused():
  with pytest.raises(UserError, match='0 < sigma_min < sigma_max, got sigma_min=3'):
    VESDE(3, 1)
  with pytest.raises(UserError, match='beta_min=5'):
    VPSDE(5, 1)
  with pytest.raises(UserError, match='N=0'):
    VPSDE(N=0)
