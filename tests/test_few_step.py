"""Few-step samplers on a Gaussian, where the probability flow is known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sampling
import sde_lib
from configs.vp import mnist_ddpmpp_continuous
from modes.preparation import prepare
from runtime.errors import UserError
from samplers import few_step
from tests import tiny_config
from tests.exact_scores import (
  ConstantBetaSDE,
  end_of_gaussian_flow,
  gaussian_marginal,
  gaussian_score,
)
from train_state import init_state

pytestmark = pytest.mark.usefixtures('quickly_compiled', 'strict_promotion')

SDES = [sde_lib.VPSDE(), sde_lib.subVPSDE(), sde_lib.VESDE(sigma_max=10.0)]
MARKED = [SDES[0], *(pytest.param(sde, marks=pytest.mark.slow) for sde in SDES[1:])]
by_sde = pytest.mark.parametrize('sde', MARKED, ids=lambda sde: type(sde).__name__)
DDIM, HEUN, DPM_SOLVER = few_step.DDIM(), few_step.Heun(), few_step.DPMSolverPP()
SHAPE = (8, 3, 3, 1)
MEAN, STD = 0.3, 0.5  # of the data
EPS = 1e-2
LONGEST = 80  # steps


def method_of(sde, solver, grid, n):
  return few_step.NoiseLevelSampler(sde, solver, n, time_grid=grid, denoise=False, eps=EPS)


def draw(method, rng, shape):
  score_fn = gaussian_score(method.sde, MEAN, STD)
  return jax.jit(lambda rng: sampling.run(method, score_fn, rng, shape=shape))(rng)


@functools.cache
def along_any_grid(sde, solver):
  """The end of the flow along times `t` with noise levels `s`, compiled once for all grids.

  Shorter grids are filled up with their last time, which `n_steps` keeps the solver from.
  """

  @jax.jit
  def end(rng, t, s, n_steps):
    method = method_of(sde, solver, 'uniform', LONGEST)
    method.t, method.s, method.n_steps = t, s, n_steps
    return sampling.run(method, gaussian_score(sde, MEAN, STD), rng, shape=SHAPE)

  return end


def error(sde, solver, grid, n):
  """Distance of the end of the flow from where the closed form has it, in standard deviations."""
  rng = jax.random.PRNGKey(0)
  method = method_of(sde, solver, grid, n)
  assert len(method.t) == len(method.s) == method.n_steps + 1
  t, s = (np.pad(v, (0, LONGEST - n), mode='edge') for v in (method.t, method.s))
  x = along_any_grid(sde, solver)(rng, t, s, method.n_steps)
  prior = sde.prior_sampling(jax.random.split(rng)[1], SHAPE)
  expected = end_of_gaussian_flow(sde, prior, EPS, MEAN, STD)
  std = gaussian_marginal(sde, jnp.asarray([EPS]), MEAN, STD)[1][0]
  return float(jnp.abs(x - expected).max() / std)


@by_sde
@pytest.mark.parametrize('grid', ['uniform', 'edm', 'logsnr'])
@pytest.mark.parametrize(
  ('solver', 'order'),
  [(DDIM, 1), (HEUN, 2), (DPM_SOLVER, 2)],
  ids=['ddim', 'heun', 'dpm_solver++'],
)
def test_error_falls_at_the_order_of_the_solver(sde, grid, solver, order):
  steps = (40, 80)
  errors = [error(sde, solver, grid, n) for n in steps]
  measured = np.log2(errors[0] / errors[1])
  assert measured == pytest.approx(order, abs=0.45)


@pytest.mark.parametrize('sde', [*SDES, ConstantBetaSDE()], ids=lambda sde: type(sde).__name__)
def test_forty_steps_of_second_order_are_within_three_hundredths_of_a_deviation(sde):
  for solver in (HEUN, DPM_SOLVER):
    assert error(sde, solver, 'logsnr', 40) < 0.03


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize('grid', ['uniform', 'edm', 'logsnr'])
def test_grids_run_from_the_prior_to_eps_and_decrease(sde, grid):
  t = np.asarray(method_of(sde, DDIM, grid, 40).t)
  assert t[0] == sde.T
  assert t[-1] == np.float32(1e-2)
  assert (np.diff(t) < 0).all()


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
def test_time_is_found_from_the_noise_level(sde):
  t = jnp.linspace(1e-2, sde.T, 50)
  found = few_step.time_of_noise_level(sde, few_step.noise_level(sde, t), 1e-3)
  np.testing.assert_allclose(found, t, atol=1e-5)


@by_sde
def test_churn_keeps_the_distribution(sde):
  method = method_of(sde, few_step.Heun(churn=10.0), 'edm', 80)
  x = draw(method, jax.random.PRNGKey(1), (4096, 2, 2, 1))
  mean, std = (float(v[0]) for v in gaussian_marginal(sde, jnp.asarray([EPS]), MEAN, STD))
  assert x.mean() == pytest.approx(mean, abs=4 * std / 128 + 0.01)
  assert x.std() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize('method', ['ddim', 'heun', 'dpm_solver++'])
def test_configured_method_counts_its_network_calls(method):
  config = tiny_config.get_config()
  config.sampling.method = method
  config.sampling.n_steps = 4
  config = prepare(config)
  sde = sde_lib.get_sde(config)
  model, state = init_state(jax.random.PRNGKey(0), config)
  calls = []
  apply = type(model).__call__

  class Counting(type(model)):
    def __call__(self, x, labels, train=True):
      jax.debug.callback(lambda: calls.append(1))
      return apply(self, x, labels, train)

  counting = Counting(num_channels=1, width=8)
  sampler = sampling.get_sampling_fn(config, sde, counting, (2, 28, 28, 1), lambda x: x)
  samples, nfe = sampler(jax.random.PRNGKey(1), state)
  jax.effects_barrier()
  assert np.isfinite(samples).all()
  assert len(calls) == nfe


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'time_grid': 'cosine'}, "Unknown time grid 'cosine': choose one of edm, logsnr, uniform"),
    ({'n_steps': 1}, 'sampling.n_steps=1 is too few: use at least 2'),
    ({'churn': 1.0}, 'sampling.churn=1.0 has no meaning for this sampler'),
  ],
)
def test_bad_settings_are_refused_before_compilation(overrides, message):
  config = mnist_ddpmpp_continuous.get_config()
  config.sampling.method = 'ddim'
  config.sampling.update(overrides)
  with pytest.raises(UserError, match=message):
    prepare(config)
