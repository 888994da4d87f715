"""Numerical contracts in double precision, where rounding hides nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import likelihood
import losses
import sampling
import sde_lib
from samplers import few_step
from tests.exact_scores import (
  ConstantBetaSDE,
  GaussianNetwork,
  end_of_gaussian_flow,
  gaussian_marginal,
  gaussian_score,
)

pytestmark = pytest.mark.usefixtures('strict_promotion')

SDES = [
  sde_lib.VPSDE(N=50),
  sde_lib.subVPSDE(N=50),
  sde_lib.VESDE(sigma_max=10.0, N=50),
  ConstantBetaSDE(N=50),
]
MARKED = [SDES[0], *(pytest.param(sde, marks=pytest.mark.slow) for sde in SDES[1:])]
by_sde = pytest.mark.parametrize('sde', MARKED, ids=lambda sde: type(sde).__name__)
SHAPE = (4, 2, 2, 1)
MEAN, STD, EPS = 0.3, 0.5, 1e-2


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


@by_sde
def test_the_process_is_that_of_its_marginals_to_seven_digits(sde):
  """f = (log alpha)' x and g^2 = (sigma^2)' - 2 (log alpha)' sigma^2."""
  t = jnp.linspace(0.05, 1.0, 20)
  (alpha, sigma), (alpha_rate, sigma_rate) = jax.jvp(sde.alpha_sigma, (t,), (jnp.ones_like(t),))
  drift, diffusion = sde.sde(jnp.ones((20, 1)), t)
  rate = alpha_rate / alpha
  np.testing.assert_allclose(drift[:, 0], rate, rtol=1e-7, atol=1e-12)
  variance_rate = 2 * sigma * sigma_rate - 2 * rate * sigma**2
  np.testing.assert_allclose(diffusion**2, variance_rate, rtol=3e-7)


@by_sde
@pytest.mark.parametrize(
  ('solver', 'order'),
  [(few_step.DDIM(), 1), (few_step.Heun(), 2), (few_step.DPMSolverPP(), 2)],
  ids=['ddim', 'heun', 'dpm_solver++'],
)
def test_error_of_many_steps_falls_at_the_order_of_the_solver(sde, solver, order):
  def error(n):
    sampler = few_step.NoiseLevelSampler(
      sde, solver, n_steps=n, time_grid='logsnr', denoise=False, eps=EPS
    )
    score_fn = gaussian_score(sde, MEAN, STD)
    rng = jax.random.key(0)
    x = jax.jit(lambda rng: sampling.run(sampler, score_fn, rng, shape=SHAPE))(rng)
    z = sde.prior_sampling(jax.random.split(rng)[1], SHAPE)
    std = gaussian_marginal(sde, jnp.asarray([EPS]), MEAN, STD)[1][0]
    return float(jnp.abs(x - end_of_gaussian_flow(sde, z, EPS, MEAN, STD)).max() / std)

  errors = [error(n) for n in (256, 512)]
  assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
  assert errors[1] < (2e-2 if order == 1 else 5e-4)


@by_sde
def test_the_likelihood_of_a_gaussian_is_exact_to_six_digits(sde):
  exact = likelihood.Likelihood(sde, rtol=1e-9, atol=1e-9, eps=EPS)
  score_fn = gaussian_score(sde, MEAN, STD)
  mean, std = (v[0] for v in gaussian_marginal(sde, jnp.asarray([EPS]), MEAN, STD))
  x = mean + std * jax.random.normal(jax.random.key(1), SHAPE)
  divergence = likelihood.exact_divergence
  logp, z, _ = jax.jit(lambda x: exact.log_prob(score_fn, x, divergence))(x)
  # The flow ends in N(m_T, s_T^2), and the prior stands in for it.
  expected = jax.scipy.stats.norm.logpdf(x, mean, std).reshape(4, -1).sum(-1)
  end_mean, end_std = (v[0] for v in gaussian_marginal(sde, jnp.asarray([sde.T]), MEAN, STD))
  expected += sde.prior_logp(z)
  expected -= jax.scipy.stats.norm.logpdf(z, end_mean, end_std).reshape(4, -1).sum(-1)
  np.testing.assert_allclose(logp, expected, rtol=1e-6)


@pytest.mark.parametrize('probe', ['Rademacher', 'Gaussian', 'exact'])
def test_every_divergence_takes_double_precision(probe):
  sde = SDES[0]
  network = GaussianNetwork(sde, STD)
  bpd_fn = likelihood.get_likelihood_fn(
    sde, network, lambda x: (x + 1) / 2, hutchinson_type=probe, eps=EPS
  )
  state = losses.State(0, {}, {}, {}, {})
  x = 0.5 * jax.random.normal(jax.random.key(0), SHAPE)
  bpd, z, _ = bpd_fn(jax.random.key(1), state, x)
  assert bpd.dtype == z.dtype == np.float64
  assert np.isfinite(bpd).all()


@by_sde
@pytest.mark.parametrize('corrector', ['langevin', 'none'])
def test_predictors_and_correctors_stay_in_double_precision(sde, corrector):
  sampler = sampling.PredictorCorrector(
    sde,
    sampling.get_predictor('euler_maruyama'),
    sampling.get_corrector(corrector),
    n_corrector_steps=1,
    eps=EPS,
  )
  score_fn = gaussian_score(sde, MEAN, STD)
  x = jax.jit(lambda rng: sampling.run(sampler, score_fn, rng, shape=SHAPE))(jax.random.key(0))
  assert x.dtype == np.float64
  assert np.isfinite(x).all()
