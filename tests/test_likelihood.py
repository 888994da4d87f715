"""Bits per dimension and latents: recorded values, and data whose density is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datasets
import likelihood
import sampling
import sde_lib
from runtime.errors import UserError
from samplers import latents, ode_solver
from sde_lib import batch_mul
from tests import golden_values as golden
from tests.compilation import optimized
from tests.exact_scores import (
  ConstantBetaSDE,
  GaussianNetwork,
  end_of_gaussian_flow,
  gaussian_score,
  mixture_log_density,
  mixture_score,
  noise_scales,
)
from train_state import State

pytestmark = pytest.mark.usefixtures('quickly_compiled', 'strict_promotion')

SDES = [
  sde_lib.VPSDE(),
  pytest.param(ConstantBetaSDE(), marks=pytest.mark.slow),  # a user's
  pytest.param(sde_lib.subVPSDE(), marks=pytest.mark.slow),
  pytest.param(sde_lib.VESDE(), marks=pytest.mark.slow),
]
by_name = pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)


@pytest.mark.slow
@pytest.mark.parametrize('name', golden.CONTINUOUS)
@optimized()
def test_bits_per_dimension_and_codes_agree_with_recorded_ones(name, recorded_random_bits):
  recorded, _, config, sde, model, state = golden.sampling_setup(name)
  likelihood_fn = likelihood.get_likelihood_fn(sde, model, datasets.get_data_inverse_scaler(config))
  bpd, z, nfe = likelihood_fn(jax.random.PRNGKey(31), state, jnp.asarray(recorded['lik_data']))
  golden.assert_close(bpd, recorded['lik_bpd'], 1e-3)
  # With random weights the flow amplifies the solver's error: a tenth of the tolerance moves these
  # codes by 6e-3 to 1.2e-2 of the largest entry, and as far away from the recorded ones.
  golden.assert_close(z, recorded['lik_z'], 1.5e-2)
  assert 0.8 < nfe / recorded['lik_nfe'] < 1.25


# A mixture of two Gaussians in D dimensions, whose marginals are mixtures too.
D = 4
MEANS = jnp.asarray([[0.5, -0.3, 0.2, 0.6], [-0.4, 0.5, 0.1, -0.5]])
STD = 0.3


@pytest.fixture(scope='module')
def points():
  return 0.4 * jax.random.normal(jax.random.PRNGKey(0), (64, D))


@by_name
def test_likelihood_of_a_mixture_is_its_density(sde, points):
  log_prob = likelihood.Likelihood(sde, rtol=1e-6, atol=1e-6).log_prob
  compute = jax.jit(
    lambda x: log_prob(mixture_score(sde, MEANS, STD), x, likelihood.exact_divergence)
  )
  logp, z, _ = compute(points)
  bits = logp / D / np.log(2)
  # The prior stands for p_T, which differs a little; what is exact is p_0 of the flow from p_T.
  alpha, sigma = noise_scales(sde, jnp.asarray([1e-5, sde.T]))
  log_density = jax.vmap(mixture_log_density, in_axes=(0, None, None, None, None))
  at_T = log_density(z, alpha[1], sigma[1], MEANS, STD)
  bits = bits + (at_T - sde.prior_logp(z)) / D / np.log(2)
  expected = log_density(points, alpha[0], sigma[0], MEANS, STD) / D / np.log(2)
  np.testing.assert_allclose(bits, expected, atol=1e-3)


@by_name
def test_ode_samples_of_a_mixture_have_its_moments_and_density(sde, points):
  """The flow maps quantiles to quantiles; its Jacobian turns p_T into p_0."""
  method = sampling.ODESampler(sde, rtol=1e-6, atol=1e-6, eps=1e-5)
  z = sde.prior_sampling(jax.random.PRNGKey(1), (64, D))
  decode = jax.jit(
    lambda z: sampling.run(
      method, mixture_score(sde, MEANS, STD), jax.random.PRNGKey(0), shape=z.shape, z=z
    )
  )
  log_prob = likelihood.Likelihood(sde, rtol=1e-6, atol=1e-6).log_prob
  encode = jax.jit(
    lambda x: log_prob(mixture_score(sde, MEANS, STD), x, likelihood.exact_divergence)[1]
  )
  np.testing.assert_allclose(encode(decode(z)), z, atol=1e-3 * float(jnp.abs(z).max()))
  np.testing.assert_allclose(decode(encode(points)), points, atol=1e-3)


@pytest.mark.parametrize(
  'sde', [ConstantBetaSDE(), *SDES[:1], *SDES[2:]], ids=lambda sde: type(sde).__name__
)
def test_ode_samples_of_a_gaussian_equal_the_closed_form(sde):
  mean, std, eps = 0.3, 0.5, 1e-3
  method = sampling.ODESampler(sde, eps=eps)
  z = sde.prior_sampling(jax.random.PRNGKey(0), (128, D))
  score_fn = gaussian_score(sde, mean, std)
  x = jax.jit(lambda z: sampling.run(method, score_fn, jax.random.PRNGKey(0), shape=z.shape, z=z))(
    z
  )
  expected = end_of_gaussian_flow(sde, z, eps, mean, std)
  np.testing.assert_allclose(x, expected, atol=1e-3)


@pytest.mark.parametrize('probe', ['Rademacher', 'Gaussian'])
@pytest.mark.parametrize('count', [1, 3])
def test_hutchinson_estimate_is_unbiased(probe, count):
  A = jax.random.normal(jax.random.PRNGKey(0), (6, 6))
  drift = lambda x: jnp.tanh(x @ A)
  x = jnp.broadcast_to(jnp.linspace(-1, 1, 6), (20000, 6))
  y, exact = likelihood.exact_divergence(drift, x[:1])
  probes = likelihood._PROBES.get(probe)(jax.random.PRNGKey(1), (count, *x.shape))
  y_estimate, estimates = likelihood.hutchinson_divergence(probes)(drift, x)
  jacobian = jax.jacobian(lambda x: jnp.tanh(x @ A))(x[0])
  np.testing.assert_allclose(exact[0], jnp.trace(jacobian), rtol=1e-5)
  np.testing.assert_allclose(y_estimate[0], y[0], rtol=1e-6)
  standard_error = estimates.std() / np.sqrt(len(x))
  assert abs(estimates.mean() - exact[0]) < 3 * standard_error
  # The variance of one probe is 2 |S|^2 with S the symmetric part, without its diagonal for signs.
  S = (jacobian + jacobian.T) / 2
  off = S - jnp.diag(jnp.diag(S)) * float(probe == 'Rademacher')
  np.testing.assert_allclose(estimates.var(), 2 * jnp.sum(off**2) / count, rtol=0.1)


def test_grey_levels_are_dequantized_evenly_and_counted_in_bits():
  """For a density that is constant over the levels, bits/dim is log2 of their number."""
  images = jnp.asarray(np.random.RandomState(0).randint(0, 16, (8, 2, 2, 1)), jnp.uint8)
  values = likelihood.dequantize(jax.random.PRNGKey(0), images, 16)
  np.testing.assert_array_equal(jnp.floor(values * 16), images)

  sde, model, state = tiny_gaussian()
  kwargs = {'hutchinson_type': 'exact', 'n_levels': 16}
  inverse_scaler = lambda x: (x + 1) / 2
  of_levels = likelihood.get_likelihood_fn(sde, model, inverse_scaler, **kwargs)
  rng = jax.random.PRNGKey(0)
  bpd, _, _ = of_levels(rng, state, images)
  data = likelihood.dequantize(jax.random.split(rng)[1], images, 16) * 2 - 1
  expected, _, _ = of_levels(rng, state, data)
  np.testing.assert_allclose(bpd, expected, rtol=1e-5)
  logp = jax.scipy.stats.norm.logpdf(data, scale=0.3).mean((1, 2, 3))
  np.testing.assert_allclose(bpd, -logp / np.log(2) + np.log2(16 / 2), atol=2e-3)


def tiny_gaussian():
  """A network that is the exact score of N(0, 0.3^2), its SDE and its state."""
  sde = sde_lib.VPSDE()
  return sde, GaussianNetwork(sde), State(0, {}, {}, None, {})


def test_encoder_gives_the_codes_of_the_likelihood():
  sde, model, state = tiny_gaussian()
  x = 0.3 * jax.random.normal(jax.random.PRNGKey(0), (4, 2, 2, 1))
  z, _ = latents.get_encoder(sde, model)(state, x)
  identity = lambda x: x
  _, expected, _ = likelihood.get_likelihood_fn(sde, model, identity)(
    jax.random.PRNGKey(0), state, x
  )
  np.testing.assert_allclose(z, expected, atol=1e-3)
  decode = sampling.get_ode_sampler(sde, model, x.shape, identity, eps=1e-5)
  np.testing.assert_allclose(decode(jax.random.PRNGKey(0), state, z)[0], x, atol=1e-3)


def test_interpolation_keeps_the_norm_and_meets_the_ends():
  z0, z1 = jax.random.normal(jax.random.PRNGKey(0), (2, 5, 8, 8, 1))
  z1 = batch_mul(jnp.linalg.norm(z0.reshape(5, -1), axis=-1), z1)
  z1 = batch_mul(1 / jnp.linalg.norm(z1.reshape(5, -1), axis=-1), z1)
  z1 = batch_mul(jnp.linalg.norm(z0.reshape(5, -1), axis=-1), z1)
  np.testing.assert_allclose(latents.interpolate(z0, z1, 0.0), z0, atol=1e-5)
  np.testing.assert_allclose(latents.interpolate(z0, z1, 1.0), z1, atol=1e-5)
  middle = latents.interpolate(z0, z1, 0.3)
  norms = lambda z: jnp.linalg.norm(z.reshape(5, -1), axis=-1)
  np.testing.assert_allclose(norms(middle), norms(z0), rtol=1e-4)
  np.testing.assert_allclose(latents.interpolate(z0, z0, 0.5), z0, atol=1e-4)


@pytest.mark.parametrize('method', ['RK45', 'RK23', 'DOP853', 'Tsit5'])
def test_ode_calls_are_counted(method):
  calls = []

  def drift(t, y):
    jax.debug.callback(lambda: calls.append(1))
    return -y

  y, nfe = jax.jit(lambda y: ode_solver.solve(drift, y, t0=0.0, t1=1.0, method=method))(
    jnp.ones((2, 3))
  )
  jax.effects_barrier()
  np.testing.assert_allclose(y, np.exp(-1), rtol=1e-4)
  assert nfe == len(calls)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'method': 'Euler2'}, "Unknown ODE solver 'Euler2': choose RK45, RK23, DOP853"),
    ({'hutchinson_type': 'Cauchy'}, "Unknown probe of the divergence 'Cauchy': choose one of"),
  ],
)
def test_bad_settings_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    likelihood.get_likelihood_fn(*tiny_gaussian()[:2], lambda x: x, **arguments)


@pytest.mark.parametrize('name', ['exact', pytest.param('Rademacher', marks=pytest.mark.slow)])
def test_the_case_of_the_divergence_does_not_matter(name):
  sde, model, state = tiny_gaussian()
  x = 0.3 * jax.random.normal(jax.random.PRNGKey(0), (2, 2, 2, 1))

  def bpd(name):
    likelihood_fn = likelihood.get_likelihood_fn(sde, model, lambda x: x, name, eps=0.1)
    return likelihood_fn(jax.random.PRNGKey(1), state, x)[0]

  np.testing.assert_array_equal(bpd(name.upper()), bpd(name))


def test_exact_divergence_of_large_images_is_refused():
  sde, model, state = tiny_gaussian()
  likelihood_fn = likelihood.get_likelihood_fn(sde, model, lambda x: x, 'exact')
  with pytest.raises(UserError, match='exact divergence of 12288 dimensions is too expensive'):
    likelihood_fn(jax.random.PRNGKey(0), state, jnp.zeros((1, 64, 64, 3)))


def test_a_solution_that_needs_too_many_steps_is_nan_and_its_program_is_cached():
  solve = lambda x, steps: ode_solver.solve(lambda t, y: -y, x, t0=0.0, t1=1.0, max_steps=steps)[0]
  program = jax.jit(solve, static_argnums=1)
  np.testing.assert_allclose(program(jnp.ones(3), 100), np.full(3, np.exp(-1)), rtol=1e-4)
  assert np.isnan(program(jnp.ones(3), 2)).all()
  # A call of the host is what keeps a program out of the persistent cache.
  assert 'callback' not in program.lower(jnp.ones(3), 100).as_text()


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_drift_that_is_not_finite_ends_the_solution_soon(value):
  drift = lambda t, y: jnp.full_like(y, value)
  y, nfe = jax.jit(lambda y: ode_solver.solve(drift, y, t0=0.0, t1=1.0))(jnp.ones(3))
  assert np.isnan(y).all()
  assert nfe < 1000


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (np.full((2, 4, 4, 1), 300, np.uint16), 'uint16 have values that are no grey levels, 0 to 255'),
    (np.full((2, 4, 4, 1), -1, np.int8), 'int8 have values that are no grey levels, 0 to 255'),
    (np.ones((2, 4, 4, 1), np.float16), 'of type float16: pass float32, or uint8 grey levels'),
  ],
)
def test_images_that_are_no_grey_levels_have_no_likelihood(images, message):
  sde, model, state = tiny_gaussian()
  likelihood_fn = likelihood.get_likelihood_fn(sde, model, lambda x: x)
  with pytest.raises(UserError, match=message):
    likelihood_fn(jax.random.PRNGKey(0), state, images)
