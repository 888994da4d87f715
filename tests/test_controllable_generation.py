"""Conditions: recorded values, Gaussians whose posterior is known, and what must never leak."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import controllable_generation as control
import datasets
import run_lib
import sampling
import sde_lib
from models.classifier import classifier_score
from runtime.errors import UserError
from samplers import few_step
from tests import golden_values as golden
from tests import tiny_config
from tests.compilation import optimized
from tests.exact_scores import correlated_gaussian_score, gaussian_score, mixture_score
from train_state import State

pytestmark = pytest.mark.usefixtures('quickly_compiled')


@pytest.mark.slow
@pytest.mark.parametrize('name', golden.CONTINUOUS)
def test_inpainting_and_colorization_agree_with_recorded_images(name, recorded_random_bits):
  recorded, settings, config, sde, model, state = golden.sampling_setup(name)
  arguments = (
    sde,
    model,
    sampling.get_predictor(settings['predictor']),
    sampling.get_corrector(settings['corrector']),
    datasets.get_data_inverse_scaler(config),
    settings['snr'],
    settings['n_steps'],
  )
  options = {'continuous': True, 'denoise': False, 'eps': settings['eps']}
  data = jnp.asarray(recorded['lik_data'])
  mask = jnp.ones(data.shape).at[:, :, data.shape[2] // 2 :].set(0)
  inpainter = control.get_pc_inpainter(*arguments, **options)
  x = inpainter(jax.random.PRNGKey(31), state, data, mask)
  golden.assert_close(x, recorded['inpaint'], 1e-3)
  colorizer = control.get_pc_colorizer(*arguments, **options)
  x = colorizer(jax.random.PRNGKey(31), state, jnp.asarray(recorded['gray']))
  golden.assert_close(x, recorded['colorize'], 1e-3)


# Correlated Gaussian data of the shape of an image, whose posterior given a part is known.

SHAPE = (2, 2, 3)
D = 12
SDES = [sde_lib.VPSDE(N=150), sde_lib.subVPSDE(N=150), sde_lib.VESDE(sigma_max=10.0, N=150)]
COUNT = 4096  # samples; the standard error of a mean is 0.016 deviations, of a variance 0.022


def covariance(correlation):
  """0.25 on the diagonal, and equal correlations of all pairs of entries."""
  return 0.25 * ((1 - correlation) * np.eye(D) + correlation * np.ones((D, D)))


MEAN = np.linspace(-0.4, 0.4, D)


def posterior(C, A, y, noise_std=0.0):
  """Mean and covariance of x ~ N(MEAN, C) given y = A x + noise."""
  S = A @ C @ A.T + noise_std**2 * np.eye(len(A))
  gain = np.linalg.solve(S, A @ C).T
  return MEAN + gain @ (y - A @ MEAN), C - gain @ A @ C


def matrix_of(function):
  """The matrix of a linear function of one image."""
  columns = [np.asarray(function(e)).ravel() for e in np.eye(D).reshape(D, 1, *SHAPE)]
  return np.stack(columns, axis=1)


def measurements(sde):
  """Conditions on COUNT copies of one image, with the matrix that they measure by."""
  image = np.random.RandomState(0).normal(0, 0.5, (1, *SHAPE)).astype(np.float32)
  images = jnp.repeat(image, COUNT, axis=0)
  mask = np.ones((1, *SHAPE), np.float32)
  mask[:, :, 1] = 0
  for condition in (
    control.inpainting(sde, images, mask),
    control.colorization(sde, images),
    control.super_resolution(sde, images, 2),
  ):
    A = matrix_of(condition.transform)[np.asarray(condition.mask[0]).ravel() != 0]
    yield condition, A, A @ image.ravel()


@functools.cache
def sampler(make_method, sde, count, **options):
  """A function of the data's covariance and of a condition, compiled once for all of these."""
  method = make_method(sde, **options)

  @jax.jit
  def sample(C, condition):
    score_fn = correlated_gaussian_score(sde, MEAN, C)
    rng = jax.random.PRNGKey(0)
    return sampling.run(method, score_fn, rng, shape=(count, *SHAPE), condition=condition)

  return sample


def draw(make_method, sde, C, condition, count=COUNT, **options):
  return np.asarray(sampler(make_method, sde, count, **options)(C, condition))


def errors(x, expected):
  """Largest errors of the mean and of the covariance, in units of the data's deviation, 0.5."""
  mean, C = expected
  x = x.reshape(len(x), D)
  return np.abs(x.mean(0) - mean).max() / 0.5, np.abs(np.cov(x.T) - C).max() / 0.25


def pc(sde):
  predictor, corrector = (
    sampling.get_predictor('reverse_diffusion'),
    sampling.get_corrector('langevin'),
  )
  return sampling.PredictorCorrector(sde, predictor, corrector, snr=0.1, eps=sde.sampling_eps)


def flow(sde):
  return few_step.NoiseLevelSampler(
    sde, few_step.DPMSolverPP(eta=1.0), 100, time_grid='logsnr', eps=1e-3
  )


METHODS = {'pc': pc, 'dpm_solver++': flow}

# Sampling error: the largest of 12 means and of 144 covariances of 4096 samples.
MEAN_NOISE, COVARIANCE_NOISE = 0.05, 0.08
CASES = [
  pytest.param(sde, method, id=f'{type(sde).__name__}-{method}', marks=marks)
  for sde, method, marks in (
    (SDES[0], 'dpm_solver++', ()),
    (SDES[2], 'pc', pytest.mark.slow),
    (SDES[0], 'pc', pytest.mark.slow),
    (SDES[1], 'pc', pytest.mark.slow),
    (SDES[2], 'dpm_solver++', pytest.mark.slow),
  )
]


@pytest.mark.slow
@pytest.mark.parametrize(('sde', 'method'), CASES)
@optimized()
def test_measurements_of_uncorrelated_data_lead_to_the_posterior(sde, method):
  C = covariance(0.0)
  for condition, A, y in measurements(sde):
    x = draw(METHODS[method], sde, C, condition)
    mean_error, covariance_error = errors(x, posterior(C, A, y))
    assert mean_error < MEAN_NOISE
    assert covariance_error < COVARIANCE_NOISE


@pytest.mark.parametrize(('sde', 'method'), CASES)
@optimized()
def test_measurements_of_correlated_data_lead_near_the_posterior(sde, method):
  """Entries correlated by 0.6. What is known acts through noisy values of it: an approximation.

  For inpainting, where known and unknown entries are correlated, predictor and corrector miss the
  mean by 0.14 (VP), 0.12 (sub-VP) and 0.05 (VE) deviations at N = 500, and by 0.22, 0.20 and 0.15
  at N = 150: the corrector needs its steps. Along the flow it is 0.26 in 100 steps. Covariances are
  off by 0.06 and 0.14 of the variance. Colour and detail are uncorrelated with what is known here,
  and right.
  """
  C = covariance(0.6)
  mean_bounds = [{'pc': 0.18, 'dpm_solver++': 0.3}[method], MEAN_NOISE, MEAN_NOISE]
  covariance_bounds = [
    {'pc': 0.1, 'dpm_solver++': 0.18}[method],
    COVARIANCE_NOISE,
    COVARIANCE_NOISE,
  ]
  more_steps = dataclasses.replace(sde, N=500)
  for i, (condition, A, y) in enumerate(measurements(sde)):
    if i == 0 and method == 'pc':
      condition = condition.replace(sde=more_steps)
    x = draw(METHODS[method], condition.sde, C, condition)
    mean_error, covariance_error = errors(x, posterior(C, A, y))
    assert mean_error < mean_bounds[i]
    assert covariance_error < covariance_bounds[i]


def left_column(x):
  return x[:, :, 0].reshape(len(x), -1)


@pytest.mark.parametrize(('sde', 'method'), CASES)
@pytest.mark.parametrize('correlation', [0.0, 0.6])
def test_posterior_guidance_leads_to_the_posterior_of_a_noisy_measurement(sde, method, correlation):
  """Exact for uncorrelated data; else off by 0.07 deviations with the corrector, 0.13 without."""
  C = covariance(correlation)
  A = matrix_of(left_column)
  y = np.random.RandomState(1).normal(0, 0.5, len(A))
  condition = control.PosteriorGuidance(
    sde=sde,
    y=jnp.broadcast_to(jnp.asarray(y, jnp.float32), (COUNT, len(A))),
    A=left_column,
    noise_std=0.3,
    data_std=0.5,
  )
  x = draw(METHODS[method], sde, C, condition)
  mean_error, covariance_error = errors(x, posterior(C, A, y, noise_std=0.3))
  assert mean_error < (MEAN_NOISE if correlation == 0 else 0.18)
  assert covariance_error < COVARIANCE_NOISE


def test_bounds_keep_posterior_guidance_finite_where_the_network_is_far_off():
  sde = sde_lib.VPSDE(N=30)
  network = lambda x, t: 1e25 * x  # of a score that no data have
  x, t = jnp.ones((2, *SHAPE)), jnp.full(2, 0.9)
  given = {'sde': sde, 'y': jnp.zeros((2, *SHAPE))}
  unbounded = control.PosteriorGuidance(A=lambda x: x, **given).score(network)(x, t)
  assert not np.isfinite(unbounded).all()
  bounded = control.PosteriorGuidance(A=lambda x: x, bounds=(-1.0, 1.0), **given).score(network)
  np.testing.assert_array_equal(bounded(x, t), network(x, t))
  # Inside the bounds nothing changes.
  score_fn = gaussian_score(sde, 0.0, 0.5)
  guided = [
    control.PosteriorGuidance(A=lambda x: x, bounds=bounds, **given).score(score_fn)(x, t)
    for bounds in (None, (-100.0, 100.0))
  ]
  np.testing.assert_array_equal(*guided)


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
def test_class_guidance_makes_the_score_of_the_class(sde):
  """Two Gaussian classes, whose noisy posterior and scores are known: Eq. 14 to rounding."""
  means = jnp.asarray([-0.5, 0.7])

  def log_p(y, noise):  # log p(y | class) of an image in [0, 1] plus noise, (B, 2)
    centers = (means + 1) / 2
    variance = (0.25**2 + noise**2)[:, None]
    squares = jnp.sum((y[..., None] - centers) ** 2, axis=(1, 2, 3))
    return -squares / (2 * variance)

  guidance = classifier_score(sde, log_p, lambda x: (x + 1) / 2)
  t = jnp.linspace(0.1, 0.9, 6)
  labels = jnp.asarray([0, 1, 0, 1, 0, 1])
  x = sde_lib.batch_mul(sde.marginal_prob(jnp.zeros((6, 1)), t)[1], jnp.ones((6, *SHAPE))) * 0.7
  condition = control.ClassGuidance(labels=labels, class_score=guidance)
  score_fn = mixture_score(sde, means[:, None, None, None] * jnp.ones(SHAPE), 0.5)
  score = jax.jit(condition.score(score_fn))(x, t)
  expected = gaussian_score(sde, means[labels], 0.5)(x, t)
  np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-4)


def small_pc(sde, denoise):
  predictor = sampling.get_predictor('reverse_diffusion')
  corrector = sampling.get_corrector('langevin')
  sde = dataclasses.replace(sde, N=30)
  return sampling.PredictorCorrector(
    sde, predictor, corrector, denoise=denoise, eps=sde.sampling_eps
  )


def small_flow(solver):
  return lambda sde, denoise: few_step.NoiseLevelSampler(sde, solver, 8, denoise=denoise)


SMALL_METHODS = {
  'pc': small_pc,
  'ode': lambda sde, denoise: sampling.ODESampler(sde, rtol=1e-3, atol=1e-3),
  'ddim': small_flow(few_step.DDIM()),
  'heun': small_flow(few_step.Heun(churn=2.0)),
  'dpm_solver++': small_flow(few_step.DPMSolverPP()),
}
IMAGES = np.random.RandomState(1).normal(size=(3, *SHAPE)).astype(np.float32)
MASK = np.ones((1, *SHAPE), np.float32)
MASK[:, :, 1] = 0


def draw_three(method, sde, condition, denoise=True):
  """Three images, of which something is known."""
  return draw(SMALL_METHODS[method], sde, covariance(0.6), condition, len(IMAGES), denoise=denoise)


@pytest.mark.parametrize(
  ('sde', 'method'),
  [
    pytest.param(sde, method, id=f'{type(sde).__name__}-{method}', marks=marks)
    for sde, marks in ((SDES[0], ()), (SDES[1], pytest.mark.slow), (SDES[2], pytest.mark.slow))
    for method in SMALL_METHODS
  ],
)
def test_known_pixels_come_back_exactly_and_unknown_ones_never_matter(sde, method):
  x = draw_three(method, sde, control.inpainting(sde, IMAGES, MASK))
  np.testing.assert_array_equal(x[:, :, 0], IMAGES[:, :, 0])
  assert np.isfinite(x).all()
  without = np.where(MASK == 0, np.float32(np.nan), IMAGES)
  np.testing.assert_array_equal(draw_three(method, sde, control.inpainting(sde, without, MASK)), x)


@pytest.mark.parametrize(
  'method',
  ['pc', 'ddim', *(pytest.param(m, marks=pytest.mark.slow) for m in ('ode', 'heun'))],
)
def test_known_pixels_come_back_exactly_without_noise_removal_too(method):
  known = control.inpainting(SDES[0], IMAGES, MASK)
  x = draw_three(method, SDES[0], known, denoise=False)
  np.testing.assert_array_equal(x[:, :, 0], IMAGES[:, :, 0])
  assert np.abs(x[:, :, 1] - IMAGES[:, :, 1]).min() > 0


class Zero(nn.Module):
  """A score that is zero."""

  @nn.compact
  def __call__(self, x, labels, train=True):
    return jnp.zeros_like(x)


@pytest.mark.parametrize('denoise', [True, False])
def test_the_inpainter_of_2021_leaves_noise_on_known_pixels_only_without_denoising(denoise):
  sde = sde_lib.VESDE(sigma_max=1.0, N=2)
  none = sampling.NonePredictor, sampling.NoneCorrector
  inpainter = control.get_pc_inpainter(sde, Zero(), *none, lambda x: x, 0.1, denoise=denoise)
  x = inpainter(jax.random.PRNGKey(0), State(0, {}, {}, None, {}), IMAGES, MASK)
  error = np.abs(x - IMAGES)[:, :, 0]
  sigma = float(sde.sigma(1e-5))
  assert error.max() < 5 * sigma
  assert (error.max() == 0) == denoise


def test_colorization_and_super_resolution_keep_what_is_given_and_use_nothing_else():
  def colorize(images):
    return draw_three('pc', SDES[1], control.colorization(SDES[1], images))

  def sharpen(images):
    return draw_three('pc', SDES[1], control.super_resolution(SDES[1], images, 2))

  gray = np.broadcast_to(IMAGES.mean(-1, keepdims=True), IMAGES.shape)
  coarse = np.broadcast_to(IMAGES.mean((1, 2), keepdims=True), IMAGES.shape)
  x = colorize(IMAGES)
  np.testing.assert_allclose(x.mean(-1), IMAGES.mean(-1), atol=1e-5)
  np.testing.assert_allclose(x, colorize(gray), atol=1e-3)
  x = sharpen(IMAGES)
  np.testing.assert_allclose(x.mean((1, 2)), IMAGES.mean((1, 2)), atol=1e-5)
  np.testing.assert_allclose(x, sharpen(coarse), atol=1e-3)


def test_colorization_of_one_channel_is_refused():
  with pytest.raises(UserError, match='have one channel, whose mean is the image itself: pass'):
    control.colorization(SDES[1], IMAGES[..., :1])


@pytest.mark.parametrize('size', [2, 3, 4, 16])
def test_constant_first_basis_is_orthonormal(size):
  basis = control.constant_first_basis(size)
  np.testing.assert_allclose(basis @ basis.T, np.eye(size), atol=1e-6)
  np.testing.assert_allclose(basis[0], size**-0.5, rtol=1e-6)


def test_super_resolution_transform_is_orthonormal_and_inverted():
  images = jax.random.normal(jax.random.PRNGKey(0), (2, 8, 12, 3))
  condition = control.super_resolution(SDES[0], images, 4)
  u = condition.transform(images)
  np.testing.assert_allclose(jnp.sum(u**2), jnp.sum(images**2), rtol=1e-5)
  np.testing.assert_allclose(condition.inverse(u), images, atol=1e-5)
  means = images.reshape(2, 2, 4, 3, 4, 3).mean((2, 4))
  np.testing.assert_allclose(u[..., 0] / 4, means, atol=1e-5)


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'task': 'deblur'}, "Unknown sampling task 'deblur': choose one of .*inpaint"),
    ({'task': 'inpaint', 'mask': 'edge'}, "Unknown sampling.mask 'edge': choose one of right"),
    ({'task': 'colorize'}, 'sampling.task=colorize needs images in colour'),
    ({'task': 'superres', 'superres_factor': 3}, 'sampling.superres_factor=3 must be at least 2'),
    ({'batch_size': 0}, 'sampling.batch_size=0 cannot be split'),
    ({'num_samples': 0}, 'sampling.num_samples=0 must be at least 1'),
  ],
)
def test_tasks_that_cannot_run_are_refused_before_compilation(overrides, message, tmp_path):
  config = tiny_config.get_config()
  config.sampling.update(overrides)
  with pytest.raises(UserError, match=message):
    run_lib.sample(config, str(tmp_path))
