"""A user's SDE, predictor, corrector, network and data set work everywhere by registering."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datasets
import losses
import sampling
import sde_lib
import train_state
from configs.vp import mnist_ddpmpp_continuous
from modes.preparation import prepare
from runtime.registry import Registry
from tests.exact_scores import ConstantBetaSDE, gaussian_score

pytestmark = pytest.mark.usefixtures('quickly_compiled')


@sampling.register_predictor(name='heun_like')
class MidpointPredictor(sampling.Predictor):
  """The midpoint rule for the probability flow."""

  nfe = 2

  def update_fn(self, rng, x, t):
    dt = -self.rsde.T / self.rsde.N
    flow = self.sde.reverse(self.score_fn, probability_flow=True)
    middle = x + 0.5 * dt * flow.sde(x, t)[0]
    x = x + dt * flow.sde(middle, jnp.maximum(t + 0.5 * dt, self.sde.sampling_eps))[0]
    return x, x


@sampling.register_corrector(name='small_step')
class SmallStepCorrector(sampling.Corrector):
  """Langevin steps of a fixed size."""

  def update_fn(self, rng, x, t):
    x_mean = x + 1e-3 * self.score_fn(x, t)
    return x_mean + (2e-3) ** 0.5 * jax.random.normal(rng, x.shape), x_mean


@datasets.register_dataset(name='noise')
def noise(config, split, *, length):
  size = config.data.image_size
  rng = np.random.RandomState(len(split))
  images = np.clip(rng.normal(127.5, 38.25, (length, size, size, 1)), 0, 255).astype(np.uint8)
  return datasets.ArraySource(images, np.zeros(length))


@pytest.fixture
def config():
  config = mnist_ddpmpp_continuous.get_config()
  config.training.sde = 'constant_beta'
  config.training.batch_size = 64
  config.training.n_jitted_steps = 1
  config.model = {'name': 'trainable_gaussian', 'b': 9.0, 'initial_scale': 1.0, 'num_scales': 1000}
  config.data.dataset = 'noise'
  config.data.length = 512
  config.data.image_size = 8
  config.sampling.predictor = 'heun_like'
  config.sampling.corrector = 'small_step'
  config.optim.lr = 0.02
  config.optim.warmup = 0
  return prepare(config)


def test_loss_optimizer_data_and_sampler_work_with_everything_replaced(config):
  train_ds, _, _ = datasets.get_dataset(config)
  sde = sde_lib.get_sde(config)
  assert isinstance(sde, ConstantBetaSDE)
  assert sde.N == 1000
  model, state = train_state.init_state(jax.random.PRNGKey(0), config)
  step_fn = jax.jit(
    losses.get_step_fn(sde, model, True, losses.optimization_manager(config), reduce_mean=True)
  )
  carry = (jax.random.PRNGKey(1), state)
  for step in range(200):
    batch = {'image': train_ds.preprocess(jax.random.PRNGKey(0), train_ds.batch(step)['image'])}
    carry, _ = step_fn(carry, batch)
  state = carry[1]
  # Score matching recovers the standard deviation of the data, 38.25 / 127.5.
  np.testing.assert_allclose(abs(state.params['s']), 0.3, rtol=0.05)

  shape = (256, 8, 8, 1)
  sampler = sampling.get_sampling_fn(config, sde, model, shape, datasets.get_data_scaler(config))
  exact = state.replace(params_ema={'s': jnp.asarray([0.3])})
  samples, nfe = sampler(jax.random.PRNGKey(2), exact)
  samples = (np.asarray(samples) + 1) / 2  # the sampler above applied the forward scaler
  assert nfe == 3000
  np.testing.assert_allclose(samples.std(), 0.3, rtol=0.05)


def one_of(base, classes, index):
  """Stands for one of several predictors or correctors, which `index` chooses at run time."""

  class Chosen(base):
    def __init__(self, *arguments):
      self.updates = [cls(*arguments).update_fn for cls in classes]

    def update_fn(self, rng, x, t):
      return jax.lax.switch(index, self.updates, rng, x, t)

  return Chosen


BUILT_IN = ('vpsde', 'subvpsde', 'vesde')
SDES = ['constant_beta', *(pytest.param(s, marks=pytest.mark.slow) for s in BUILT_IN)]


@pytest.mark.parametrize('sde', SDES)
def test_every_pair_of_solvers_runs_under_every_sde(sde, config):
  """All pairs in one program, of which each call runs one."""
  config.training.sde = sde
  config.model.num_scales = 30
  sde = sde_lib.get_sde(config)
  predictors, correctors = sampling._PREDICTORS.names(), sampling._CORRECTORS.names()

  @jax.jit
  def sample(i, j):
    method = sampling.PredictorCorrector(
      sde,
      one_of(sampling.Predictor, [sampling.get_predictor(name) for name in predictors], i),
      one_of(sampling.Corrector, [sampling.get_corrector(name) for name in correctors], j),
      snr=0.1,
      n_corrector_steps=2,
      eps=sde.sampling_eps,
    )
    return sampling.run(method, gaussian_score(sde), jax.random.PRNGKey(0), shape=(8, 2, 2, 1))

  assert {'heun_like', 'ancestral_sampling', 'none'} <= set(predictors)
  assert {'small_step', 'langevin', 'ald', 'none'} <= set(correctors)
  for i, j in itertools.product(range(len(predictors)), range(len(correctors))):
    assert np.isfinite(sample(i, j)).all(), f'{predictors[i]} and {correctors[j]}'


def test_a_taken_name_is_refused():
  registry = Registry('thing')
  registry.register(int, name='a')
  with pytest.raises(ValueError, match="thing named 'a' is already registered"):
    registry.register(float, name='a')


def test_names_are_found_in_any_case_and_shown_as_they_were_registered():
  registry = Registry('thing')

  @registry.register
  class MyThing:
    pass

  assert registry.get('mything') is registry.get('MyThing') is MyThing
  assert registry.names() == ['MyThing']
  with pytest.raises(ValueError, match="thing named 'MyThing' is already registered"):
    registry.register(float, name='mything')


def test_a_predictor_registered_without_a_name_is_found(config, monkeypatch):
  # Other tests list the predictors: this one leaves no trace.
  monkeypatch.setattr(sampling._PREDICTORS, '_entries', dict(sampling._PREDICTORS._entries))

  @sampling.register_predictor
  class Unnamed(sampling.Predictor):
    def update_fn(self, rng, x, t):
      return x, x

  for name in ('Unnamed', 'unnamed'):
    config.sampling.predictor = name
    assert sampling.get_sampler(config, sde_lib.get_sde(config)).predictor is Unnamed
