"""Networks against recorded values: parameter trees, outputs and gradients."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import losses
import sampling
import sde_lib
import train_state
from models import layers, ncsnpp, refinenet, utils
from modes.preparation import prepare
from runtime.errors import UserError
from tests import golden_values as golden

pytestmark = pytest.mark.usefixtures('quickly_compiled')

QUICK = ['vp_ddpmpp_continuous']
SLOW = [
  've_ncsnv2',
  've_ncsnpp_continuous',
  'vp_ddpm',
  've_ddpm',
  've_ncsn',
  've_ncsnv2_128',
  've_ncsnv2_256',
  've_ncsnpp_discrete',
  've_ncsnpp_1024_style',
  'subvp_ddpmpp_continuous',
  'vp_ncsnpp_continuous',
  'vp_ncsnpp_cat_skip',
  'vp_ncsnpp_ddpmblocks_residual',
]
SMALL = {
  'data.image_size': 16,
  'model.nf': 32,
  'model.ch_mult': (1, 2),
  'model.num_res_blocks': 1,
  'model.attn_resolutions': (8,),
}
NARROW = {'data.image_size': 16, 'model.nf': 8}
# Configuration files and what makes them small enough to train and sample here.
REDUCED = [
  ('vp/ddpm/cifar10_unconditional', SMALL),
  ('ve/ffhq_ncsnpp_continuous', SMALL),
  ('ve/ncsn/cifar10', NARROW),
  ('ve/ncsnv2/cifar10', NARROW),
  ('ve/ncsnv2/bedroom', NARROW),
  ('ve/ncsnv2/celeba', NARROW | {'model.name': 'ncsnv2_256'}),
]
NETWORKS = QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]


@pytest.mark.parametrize('name', NETWORKS)
def test_network_agrees_with_recorded_outputs_and_gradients(name):
  recorded = golden.load(f'net_{name}')
  config = golden.config_of(recorded)
  model = utils.create_model(config)
  x, labels, probe = (jnp.asarray(recorded[key]) for key in ('x', 'labels', 'probe'))
  shapes = jax.eval_shape(
    lambda x, labels: model.init(jax.random.PRNGKey(0), x, labels, train=False), x, labels
  )
  params = golden.filled_like(shapes['params'])

  leaves = golden.flatten(params)
  assert list(leaves) == recorded['param_names'].tolist()
  assert [str(list(leaf.shape)) for leaf in leaves.values()] == recorded['param_shapes'].tolist()

  def objective(params, x):
    y = model.apply({'params': params}, x, labels, train=False)
    return jnp.mean(y * probe), y

  grad = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
  (_, y), (grad_params, grad_x) = grad(params, x)
  golden.assert_close(y, recorded['y'], 2e-5)
  golden.assert_close(grad_x, recorded['grad_x'], 1e-4)
  norms = [np.linalg.norm(leaf) for leaf in golden.flatten(grad_params).values()]
  golden.assert_close(norms, recorded['grad_norms'], 1e-4)


def program(config):
  """All that the configured network computes, its parameters' paths among it."""
  model, _, params = utils.abstract_model(config)
  size = config.data.image_size
  x, labels = jnp.zeros((1, size, size, config.data.num_channels)), jnp.ones(1)
  apply = lambda params: model.apply({'params': params}, x, labels, train=False)
  return jax.tree.structure(params), str(jax.make_jaxpr(apply)(params))


@pytest.mark.parametrize(
  'names',
  [
    {
      'resblock_type': 'ddpm',
      'embedding_type': 'fourier',
      'progressive': 'output_skip',
      'progressive_input': 'input_skip',
      'progressive_combine': 'cat',
      'nonlinearity': 'elu',
    },
    pytest.param(
      {'resblock_type': 'biggan', 'progressive': 'residual', 'progressive_input': 'residual'},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_case_of_names_does_not_change_the_network(names):
  config = golden.configure('vp/cifar10_ncsnpp_continuous', SMALL | {'model.nf': 8})
  config.model.update(names)
  expected = program(config)
  config.model.update({field: value.upper() for field, value in names.items()})
  config.model.update({'name': 'NCSNpp', 'normalization': 'groupnorm'})
  assert program(config) == expected


def test_an_unknown_name_is_refused_however_the_network_is_made():
  with pytest.raises(UserError, match="model.resblock_type='resnet' is unknown: choose one of"):
    ncsnpp.NCSNpp(image_size=8, resblock_type='resnet')


@pytest.mark.parametrize(
  ('layer', 'variance'),
  [
    # DDPM: one over the mean of fan in and fan out.
    (lambda x: layers.conv3x3(64)(x), 2 / (9 * 32 + 9 * 64)),
    # NCSN: uniform in +-1 / sqrt(fan in).
    (lambda x: refinenet.ncsn_conv(x, 64), 1 / (3 * 9 * 32)),
  ],
  ids=['ddpm', 'ncsn'],
)
def test_initial_kernels_are_uniform_with_the_variance_of_their_papers(layer, variance):
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return layer(x)

  params = Layer().init(jax.random.PRNGKey(0), jnp.zeros((1, 4, 4, 32)))['params']['Conv_0']
  np.testing.assert_allclose(params['kernel'].var(), variance, rtol=0.05)
  np.testing.assert_allclose(jnp.abs(params['kernel']).max(), (3 * variance) ** 0.5, rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'overrides'), REDUCED, ids=[name for name, _ in REDUCED])
def test_reduced_configuration_trains_a_step_and_samples_two(name, overrides):
  config = golden.configure(name, overrides)
  config.optim.warmup = 0
  config.model.beta_max = 1.0  # so that two steps are enough for the VP chain
  config.model.num_scales = 2
  config = prepare(config)
  sde = sde_lib.get_sde(config)
  model, model_state, shapes = utils.abstract_model(config)
  state = train_state.first_state(config, model_state, golden.filled_like(shapes))
  size = config.data.image_size
  images = jax.random.uniform(jax.random.PRNGKey(1), (4, size, size, config.data.num_channels))
  step_fn = losses.get_step_fn(
    sde,
    model,
    True,
    losses.optimization_manager(config),
    config.training.reduce_mean,
    config.training.continuous,
  )
  (_, new), loss = jax.jit(step_fn)((jax.random.PRNGKey(2), state), {'image': images})
  assert np.isfinite(loss)
  assert loss > 0
  updates = jax.tree.map(lambda a, b: np.abs(a - b).max(), new.params, state.params)
  assert 0 < max(jax.tree.leaves(updates)) <= 1.01 * config.optim.lr

  sampler = sampling.get_sampling_fn(config, sde, model, images.shape, lambda x: x)
  samples, _ = sampler(jax.random.PRNGKey(3), new)
  assert samples.shape == images.shape
  assert np.isfinite(samples).all()


@utils.register_model(name='counted')
class Counted(nn.Module):
  """A network that counts how often it is traced."""

  traced: ClassVar[list[int]] = []

  @nn.compact
  def __call__(self, x, labels, train=True):
    self.traced.append(1)
    return layers.conv3x3(x.shape[-1])(x)


@utils.register_model(name='without_hash')
class WithoutHash(nn.Module):
  widths: dict = dataclasses.field(default_factory=lambda: {'hidden': 4})

  @nn.compact
  def __call__(self, x, labels, train=True):
    return nn.Dense(self.widths['hidden'])(x) @ jnp.ones((self.widths['hidden'], x.shape[-1]))


def test_a_network_is_traced_once_for_its_shapes_and_its_parameters():
  config = golden.configure('vp/cifar10_ddpmpp_continuous', {'model.name': 'counted'})
  Counted.traced.clear()
  utils.abstract_model(config)
  _, like = train_state.abstract_state(config)
  _, state = train_state.init_state(jax.random.PRNGKey(0), config)
  assert len(Counted.traced) == 1
  assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, like.params)


def test_a_network_with_a_field_that_has_no_hash_is_drawn_too():
  config = golden.configure('vp/cifar10_ddpmpp_continuous', {'model.name': 'without_hash'})
  module, _, params = utils.init_model(jax.random.PRNGKey(0), config)
  with pytest.raises(TypeError, match='unhashable'):
    hash(module)
  assert params['Dense_0']['kernel'].shape == (3, 4)
