"""Predictors, correctors and whole samplers: recorded values and exact Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datasets
import sampling
from runtime.errors import UserError
from sde_lib import VESDE, VPSDE, subVPSDE
from tests import golden_values as golden
from tests.compilation import optimized
from tests.exact_scores import RECORDED_SDES, gaussian_score, recorded_score

pytestmark = pytest.mark.usefixtures('quickly_compiled', 'strict_promotion')


def _recorded_updates(name):
  prefix = f'{name}/'
  keys = [key.removeprefix(prefix) for key in golden.load('updates') if key.startswith(prefix)]
  return sorted({key.rsplit('/', 1)[0] for key in keys})


@pytest.mark.parametrize('name', RECORDED_SDES)
def test_single_updates_agree_with_recorded_values(name, recorded_random_bits):
  recorded = golden.load('updates')
  x, t = jnp.asarray(recorded['x']), jnp.asarray(recorded['t'])
  rng = jax.random.PRNGKey(7)
  for key in _recorded_updates(name):
    update, *flow = key.split('/')
    if flow:
      predictor = sampling.get_predictor(update)
      solver = predictor(RECORDED_SDES[name], recorded_score, flow == ['1'])
    else:
      solver = sampling.get_corrector(update)(RECORDED_SDES[name], recorded_score, 0.16, 3)
    x_new, x_mean = solver.update_fn(rng, x, t)
    golden.assert_close(x_new, recorded[f'{name}/{key}/x'], 2e-5)
    golden.assert_close(x_mean, recorded[f'{name}/{key}/mean'], 2e-5)


@pytest.mark.parametrize('name', golden.CONTINUOUS)
def test_pc_samplers_agree_with_recorded_samples(name, recorded_random_bits):
  recorded, settings, config, sde, model, state = golden.sampling_setup(name)
  expected = recorded['pc_denoise0']
  for denoise in (False, True):
    sampler = sampling.get_pc_sampler(
      sde,
      model,
      expected.shape,
      sampling.get_predictor(settings['predictor']),
      sampling.get_corrector(settings['corrector']),
      inverse_scaler=datasets.get_data_inverse_scaler(config),
      snr=settings['snr'],
      n_steps=settings['n_steps'],
      continuous=True,
      denoise=denoise,
      eps=settings['eps'],
    )
    x, nfe = sampler(jax.random.PRNGKey(31), state)
    golden.assert_close(x, recorded[f'pc_denoise{int(denoise)}'], 1e-3)
    # The reference counts calls of a corrector that is 'none' too.
    uncounted = sde.N * settings['n_steps'] * (settings['corrector'] == 'none')
    assert nfe == recorded['nfe'] - uncounted


@pytest.mark.slow
@pytest.mark.parametrize('name', golden.CONTINUOUS)
@optimized()
def test_ode_samplers_agree_with_recorded_samples(name):
  recorded, settings, config, sde, model, state = golden.sampling_setup(name)

  def sample(tolerance):
    sampler = sampling.get_ode_sampler(
      sde,
      model,
      recorded['ode_x'].shape,
      datasets.get_data_inverse_scaler(config),
      rtol=tolerance,
      atol=tolerance,
      eps=settings['eps'],
    )
    return sampler(jax.random.PRNGKey(31), state, jnp.asarray(recorded['ode_z']))

  # Recorded at 1e-5; solved at a tenth of it, what differs is the error of the recorded solution.
  golden.assert_close(sample(1e-6)[0], recorded['ode_x'], 1e-3)
  assert 0.8 < sample(1e-5)[1] / recorded['ode_nfe'] < 1.25


# Exact Gaussians. For data N(MEAN, STD^2) the score is known and every update is affine in x and z,
# x' = a x + b + c z, so the moments of the sampler's output follow without Monte Carlo error.

MEAN, STD = 0.4, 0.5


def output_moments(sde, predictor, probability_flow=False):
  """Mean and variance of the last x_mean, propagated exactly through all updates."""
  solver = predictor(sde, gaussian_score(sde, MEAN, STD), probability_flow)
  times = jnp.linspace(sde.T, sde.sampling_eps, sde.N)

  def step(carry, t):
    mean, variance, _ = carry
    x = jnp.asarray([[0.0], [1.0]])
    rng = jax.random.PRNGKey(0)
    x_new, x_mean = solver.update_fn(rng, x, jnp.full((2,), t))
    z = jax.random.normal(rng, x.shape)
    b, a = x_mean[0, 0], x_mean[1, 0] - x_mean[0, 0]
    c = ((x_new - x_mean) / z)[0, 0]
    mean, denoised = a * mean + b, a**2 * variance
    return (mean, denoised + c**2, denoised), None

  prior = sde.marginal_prob(jnp.zeros((1, 1)), jnp.ones((1,)))[1][0] ** 2
  mean, _, variance = jax.jit(lambda: jax.lax.scan(step, (0.0 * prior, prior, prior), times)[0])()
  return float(mean), float(variance)


CONVERGING = [
  (VPSDE, 'euler_maruyama', False),
  (VPSDE, 'euler_maruyama', True),
  (VPSDE, 'reverse_diffusion', False),
  (VPSDE, 'ancestral_sampling', False),
  (subVPSDE, 'euler_maruyama', False),
  (subVPSDE, 'reverse_diffusion', True),
  (subVPSDE, 'ancestral_sampling', False),
  (VESDE, 'reverse_diffusion', False),
  (VESDE, 'reverse_diffusion', True),
  (VESDE, 'ancestral_sampling', False),
  (VESDE, 'euler_maruyama', False),
]


# Quickly, one of each predictor, and each SDE.
IN_QUICK = (CONVERGING[1], CONVERGING[6], CONVERGING[7])
MARKED = [pytest.param(*c, marks=() if c in IN_QUICK else pytest.mark.slow) for c in CONVERGING]


@pytest.mark.parametrize(
  ('sde', 'name', 'flow'), MARKED, ids=lambda v: getattr(v, '__name__', str(v))
)
def test_predictors_converge_at_first_order_to_an_exact_gaussian(sde, name, flow):
  """Order 1 in N, to a limit that the end time and the prior keep from the data by at most 0.005.

  The chains read their tables at a truncated index, which makes the fall of their errors uneven
  from one N to the next; the order is therefore that over a factor of 32.
  """
  predictor = sampling.get_predictor(name)

  def mean_and_std(N):
    mean, variance = output_moments(sde(N=N), predictor, flow)
    return np.asarray([mean, variance**0.5])

  limit = mean_and_std(32000)
  np.testing.assert_allclose(limit, [MEAN, STD], atol=5e-3)
  coarse, fine = (np.abs(mean_and_std(N) - limit).sum() for N in (125, 4000))
  order = np.log2(coarse / fine) / 5
  assert 0.75 < order < 1.25


@pytest.mark.parametrize('corrector', ['langevin', pytest.param('ald', marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  'sde',
  [VPSDE(N=200), *(pytest.param(sde(N=200), marks=pytest.mark.slow) for sde in (subVPSDE, VESDE))],
  ids=type,
)
@optimized()
def test_pc_sampling_of_an_exact_gaussian_has_its_mean_and_variance(sde, corrector):
  """64 x 1024 samples: the standard error of the mean is 0.002, of the deviation 0.0014."""
  method = sampling.PredictorCorrector(
    sde,
    sampling.get_predictor('reverse_diffusion'),
    sampling.get_corrector(corrector),
    snr=0.1,
    eps=sde.sampling_eps,
  )
  draw = jax.jit(
    lambda rng: sampling.run(method, gaussian_score(sde, MEAN, STD), rng, shape=(64, 1024))
  )
  x_mean = draw(jax.random.PRNGKey(0))
  assert abs(x_mean.mean() - MEAN) < 0.02
  assert abs(x_mean.std() - STD) < 0.02


def test_samplers_refuse_probability_flow_of_an_ancestral_sampler():
  with pytest.raises(UserError, match='ancestral_sampling has no probability flow'):
    sampling.get_predictor('ancestral_sampling')(VPSDE(), lambda x, t: x, True)
