"""What users of the samplers meet: names, keys, callbacks, recompilation, NFE."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import controllable_generation as control
import likelihood
import losses
import sampling
import sde_lib
import train_state
from models import utils
from models.classifier import classifier_score
from modes.preparation import prepare
from runtime.errors import UserError
from runtime.rng import key_shape
from samplers import few_step
from tests import tiny_config
from tests.exact_scores import ConstantBetaSDE, GaussianNetwork
from train_state import State

SHAPE = (4, 4, 4, 3)
VP = sde_lib.VPSDE(N=30, beta_max=10.0)
COARSE = sde_lib.VPSDE(N=3, beta_max=1.0)
NETWORK = GaussianNetwork(VP)
identity = lambda x: x


@pytest.fixture(autouse=True)
def _compile_quickly():
  """Nothing here runs long enough to be worth optimizing."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


def slow(names, which):
  """The names as parameters, some of them marked."""
  return [pytest.param(name, marks=pytest.mark.slow if name in which else ()) for name in names]


@utils.register_classifier(name='three_classes')
class ThreeClasses(nn.Module):
  """By the brightness of an image."""

  @nn.compact
  def __call__(self, x, sigmas, train=True):
    centers = self.param('centers', nn.initializers.normal(), (3,))
    return -((x.mean((1, 2, 3))[:, None] - centers) ** 2) / (0.1 + sigmas[:, None] ** 2)


STATE = State(0, {}, {}, None, {})
CENTERS = {'centers': jnp.asarray([0.2, 0.5, 0.8])}
PC = sampling.PredictorCorrector(
  COARSE, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector
)


def test_importing_sampling_registers_every_method():
  code = 'import sampling; print(*sorted(sampling.SAMPLERS.names()))'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ['ddim', 'dpm_solver++', 'heun', 'ode', 'pc']


# Keys: `jax.random.key` and `jax.random.PRNGKey` are the same to every public function.


def draws(method, keys=None):
  sampler = sampling.compile_sampler(method, VP, NETWORK, shape=SHAPE, inverse_scaler=identity)
  return lambda rng: sampler(jax.random.split(rng, keys) if keys else rng, STATE)[0]


def conditional(make):
  """What a function of the 2021 code draws, given data like its own."""
  arguments = sampling.EulerMaruyamaPredictor, sampling.LangevinCorrector, identity, 0.1
  data = jnp.linspace(-1, 1, 192).reshape(SHAPE)
  if make is control.get_pc_inpainter:
    sampler = make(COARSE, NETWORK, *arguments)
    return lambda rng: sampler(rng, STATE, data, jnp.ones(SHAPE).at[:, 2:].set(0))
  if make is control.get_pc_colorizer:
    sampler = make(COARSE, NETWORK, *arguments)
    return lambda rng: sampler(rng, STATE, data)
  sampler = make(COARSE, NETWORK, ThreeClasses(), CENTERS, SHAPE, *arguments)
  return lambda rng: sampler(rng, STATE, jnp.asarray([0, 1, 2, 0]))


def batch_keys(per_image):
  def keys(rng):
    config = tiny_config.get_config()
    config.sampling.per_image_seeds = per_image
    rng = sampling.batch_rng(config, rng, 3, size=5)
    assert key_shape(rng) == ((5,) if per_image else ())
    return jax.random.key_data(rng)

  return keys


def loss(continuous):
  images = {'image': jnp.ones(SHAPE)}
  step_fn = losses.get_step_fn(COARSE, NETWORK, train=False, continuous=continuous)

  def value(rng):
    (rng, _), loss = step_fn((rng, STATE), images)
    return loss, jax.random.key_data(rng)

  return value


def loss_with_dropout(rng):
  config = tiny_config.get_config()
  model, _, shapes = utils.abstract_model(config)
  params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), shapes)
  loss_fn = losses.get_sde_loss_fn(COARSE, model, train=True)
  return loss_fn(rng, params, {}, {'image': jnp.ones((2, 28, 28, 1))})[0]


def bits(images):
  bits_of = likelihood.get_likelihood_fn(COARSE, NETWORK, identity, eps=0.3, rtol=1e-2, atol=1e-2)
  return lambda rng: bits_of(rng, STATE, images)


TAKE_A_KEY = {
  'pc': draws(PC),
  'pc, a key per image': draws(PC, keys=4),
  'ode': draws(sampling.ODESampler(COARSE, rtol=1e-2, atol=1e-2)),
  'ode, a key per image': draws(sampling.ODESampler(COARSE, rtol=1e-2, atol=1e-2), keys=4),
  'heun': draws(sampling.NoiseLevelSampler(COARSE, sampling.Heun(churn=1.0), 3)),
  'ddim, a key per image': draws(
    sampling.NoiseLevelSampler(COARSE, sampling.DDIM(eta=1.0), 3), keys=4
  ),
  'run': lambda rng: sampling.run(PC, lambda x, t: -x, rng, shape=SHAPE),
  'batch_rng': batch_keys(per_image=False),
  'batch_rng of images': batch_keys(per_image=True),
  'get_pc_inpainter': conditional(control.get_pc_inpainter),
  'get_pc_colorizer': conditional(control.get_pc_colorizer),
  'get_pc_conditional_sampler': conditional(control.get_pc_conditional_sampler),
  'likelihood_fn': bits(jnp.ones((2, 4, 4, 1), jnp.uint8)),
  'dequantize': lambda rng: likelihood.dequantize(rng, jnp.ones(SHAPE)),
  'continuous loss': loss(continuous=True),
  'discrete loss': loss(continuous=False),
  'loss with dropout': loss_with_dropout,
  'init_model': lambda rng: utils.init_model(rng, tiny_config.get_config())[2],
  'init_state': lambda rng: train_state.init_state(rng, tiny_config.get_config())[1].params,
  'create_classifier': lambda rng: utils.create_classifier(rng, 1, name='three_classes')[1],
  **{
    f'{type(sde).__name__}.prior_sampling': lambda rng, sde=sde: sde.prior_sampling(rng, (2, 3))
    for sde in (sde_lib.VPSDE(), sde_lib.subVPSDE(), sde_lib.VESDE(), ConstantBetaSDE())
  },
}


ALIKE = (  # those that run the code of another one
  'ode',
  'heun',
  'ddim, a key per image',
  'get_pc_colorizer',
  'get_pc_conditional_sampler',
  'continuous loss',
  'loss with dropout',
  'init_model',
  'run',
  'pc, a key per image',
  'likelihood_fn',
)


@pytest.mark.parametrize('name', slow(TAKE_A_KEY, ALIKE))
def test_typed_and_raw_keys_give_the_same_numbers(name):
  function = TAKE_A_KEY[name]
  raw, typed = function(jax.random.PRNGKey(5)), function(jax.random.key(5))
  jax.tree.map(np.testing.assert_array_equal, typed, raw)


@pytest.mark.parametrize('rng', [0, None, jnp.zeros(2), jnp.zeros((4, 3), jnp.uint32)])
def test_what_is_not_a_key_is_refused(rng):
  with pytest.raises(UserError, match='not a random key: pass jax.random.key') as error:
    draws(PC)(rng)
  assert '\n' not in str(error.value)


def test_more_axes_of_keys_than_one_are_refused():
  with pytest.raises(UserError, match=r'keys of shape \(2, 2\): pass one key, or one for each'):
    draws(PC)(jax.random.split(jax.random.key(0), (2, 2)))


# Watching.


@pytest.mark.parametrize('keys', [None, 4])
def test_every_state_that_was_watched_stays_readable(keys):
  sampler = sampling.compile_sampler(
    PC, VP, NETWORK, shape=SHAPE, inverse_scaler=identity, steps_per_call=1
  )
  rng = jax.random.split(jax.random.key(1), keys) if keys else jax.random.key(1)
  seen, seen_at_once = [], []

  def callback(done, total, x):
    seen.append(x)
    seen_at_once.append(np.asarray(x()))

  sampler(rng, STATE, callback=callback)
  assert len(seen) == 3
  np.testing.assert_array_equal([x() for x in seen], seen_at_once)


# Recompilation.

IMAGES = jnp.linspace(-1, 1, 192).reshape(SHAPE)
MASK = jnp.ones((1, 4, 4, 1)).at[:, 2:].set(0)
class_score = classifier_score(VP, utils.get_logit_fn(ThreeClasses(), CENTERS), identity)


def coarse(x):
  return x[:, ::2, ::2]


CONDITIONS = {
  'inpaint': lambda images: control.inpainting(VP, images, MASK),
  'colorize': lambda images: control.colorization(VP, images),
  'superres': lambda images: control.super_resolution(VP, images, 2),
  'class': lambda images: control.ClassGuidance(
    labels=jnp.argmax(images.reshape(4, -1)[:, :3], axis=-1), class_score=class_score
  ),
  'posterior': lambda images: control.PosteriorGuidance(sde=VP, y=coarse(images), A=coarse),
}


@pytest.mark.parametrize('task', slow(CONDITIONS, ('class', 'posterior')))
def test_a_sampler_is_compiled_once_for_all_rounds_of_a_task(task):
  traces = []

  class Traced(GaussianNetwork):
    def __call__(self, x, labels, train=True):
      traces.append(1)
      return super().__call__(x, labels, train)

  sampler = sampling.compile_sampler(PC, VP, Traced(VP), shape=SHAPE, inverse_scaler=identity)
  first, _ = sampler(jax.random.key(0), STATE, condition=CONDITIONS[task](IMAGES))
  count = len(traces)
  second, _ = sampler(jax.random.key(0), STATE, condition=CONDITIONS[task](-IMAGES))
  assert count == len(traces) > 0
  assert not np.array_equal(first, second)  # another condition it is


# Network calls.


class Midpoint(sampling.Predictor):
  nfe = 2

  def update_fn(self, rng, x, t):
    middle = x + self.score_fn(x, t)
    return x + self.score_fn(middle, t), x


def method_of(**settings):
  config = tiny_config.get_config()
  config.model.beta_max = 1.0
  config.sampling.update({'n_steps': 3, 'method': 'pc', **settings})
  config = prepare(config)
  return sampling.get_sampler(config, sde_lib.get_sde(config))


LANGEVIN = {'corrector': 'langevin', 'n_steps_each': 2}
METHODS = {
  'predictor': (3, method_of()),
  'corrector': (6, method_of(predictor='none', **LANGEVIN)),
  'both': (9, method_of(predictor='reverse_diffusion', **LANGEVIN)),
  'a predictor of two calls': (6, sampling.PredictorCorrector(COARSE, Midpoint)),
  'ddim': (3, method_of(method='ddim')),
  'ddim without denoising': (3, method_of(method='ddim', noise_removal=False)),
  'heun': (5, method_of(method='heun')),
  'heun without denoising': (6, method_of(method='heun', noise_removal=False)),
}


@pytest.mark.parametrize('name', slow(METHODS, ('corrector', 'ddim', 'heun without denoising')))
def test_n_steps_counts_updates_and_nfe_the_network_calls_they_make(name):
  expected, method = METHODS[name]
  calls = []

  class Counted(GaussianNetwork):
    def __call__(self, x, labels, train=True):
      jax.debug.callback(lambda: calls.append(1))
      return super().__call__(x, labels, train)

  sampler = sampling.compile_sampler(method, VP, Counted(VP), shape=SHAPE, inverse_scaler=identity)
  samples, nfe = sampler(jax.random.key(0), STATE)
  jax.effects_barrier()
  assert np.isfinite(samples).all()
  assert nfe == len(calls) == expected


@pytest.mark.parametrize(('denoise', 'times'), [(True, 10), (False, 11)])
def test_churn_is_shared_among_all_updates(denoise, times):
  """Karras et al. 2022, Algorithm 2: gamma = S_churn / N, where N counts the last step to zero."""
  method = sampling.NoiseLevelSampler(VP, sampling.Heun(churn=2.0), 10, denoise=denoise)
  assert len(method.t) == times
  seen = []

  def score_fn(x, t):
    seen.append(t[0])
    return -x

  y = jnp.ones((1, 2))
  method.step(score_fn, sampling.Condition(), 4, (y, y, (), jax.random.key(0)))
  s = few_step.noise_level(VP, seen[0][None])[0]
  np.testing.assert_allclose(s, method.s[4] * (1 + 2.0 / 10), rtol=1e-4)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'n_steps': -1}, 'sampling.n_steps=-1 must be at least 1, or 0 for model.num_scales'),
    ({'n_steps_each': -1}, 'sampling.n_steps_each=-1 must not be negative'),
    ({'method': 'ddim', 'n_steps': 1}, 'sampling.n_steps=1 is too few: use at least 2'),
    ({'method': 'heun', 'rho': 0.0}, 'sampling.rho=0.0 must be positive'),
    ({'method': 'ode', 'rtol': 0.0, 'atol': 0.0}, 'rtol=0.0 and atol=0.0 must not be negative'),
    ({'method': 'ddim', 'time_grid': 'karras'}, "Unknown time grid 'karras': choose one of edm"),
  ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    method_of(**settings)


def test_names_in_a_configuration_are_found_in_any_case():
  method = method_of(method='Heun', time_grid='LogSNR')
  np.testing.assert_array_equal(method.t, method_of(method='heun', time_grid='logsnr').t)
  method = method_of(method='PC', predictor='Reverse_Diffusion', corrector='LANGEVIN')
  assert method.predictor is sampling.ReverseDiffusionPredictor
  assert method.corrector is sampling.LangevinCorrector


@pytest.mark.parametrize('eps', [2.0, 1.0, -1.0, float('nan')])
def test_a_last_time_outside_the_range_is_refused(eps):
  sde, config = sde_lib.VPSDE(), prepare(tiny_config.get_config())
  model, shape = tiny_config.Tiny(), (1, 4, 4, 1)
  for make in (
    lambda: sampling.get_pc_sampler(sde, model, shape, None, None, lambda x: x, 0.1, eps=eps),
    lambda: sampling.get_ode_sampler(sde, model, shape, lambda x: x, eps=eps),
    lambda: sampling.get_sampler(config, sde, eps),
  ):
    with pytest.raises(UserError, match=r'must be a time in \[0, 1.0\), at which sampling'):
      make()


def test_grey_levels_are_no_known_images():
  images = np.zeros((1, 4, 4, 3), np.uint8)
  for condition in (
    lambda: control.inpainting(sde_lib.VPSDE(), images, np.ones((1, 4, 4, 1))),
    lambda: control.colorization(sde_lib.VPSDE(), images),
    lambda: control.super_resolution(sde_lib.VPSDE(), images, 2),
  ):
    with pytest.raises(UserError, match='of type uint8: pass floats in the range of the network'):
      condition()
