"""Compute dtype and rematerialization of the networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datasets
import losses
import sde_lib
from configs.vp import mnist_ddpmpp_continuous
from models import utils
from modes import train as train_mode
from modes.preparation import prepare
from runtime import parallelism
from runtime.errors import UserError
from runtime.rng import stream
from tests import golden_values as golden
from train_state import init_state

pytestmark = pytest.mark.usefixtures('quickly_compiled')

NETWORKS = [
  'vp_ddpmpp_continuous',
  'vp_ddpm',
  've_ncsnv2',
  've_ncsn',
]


def gradient_of(recorded, **fields):
  """The functions params -> output and params -> (gradient, output), and recorded parameters."""
  config = golden.config_of(recorded)
  config.model.update(fields)
  model = utils.create_model(config)
  x, labels, probe = (jnp.asarray(recorded[key]) for key in ('x', 'labels', 'probe'))
  shapes = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), x, labels, train=False))
  params = golden.filled_like(shapes['params'])

  def output(params):
    return model.apply({'params': params}, x, labels, train=False)

  def objective(params):
    y = output(params)
    return jnp.mean(y * probe), y

  return output, jax.grad(objective, has_aux=True), params


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_bfloat16_is_close_to_single_precision_and_parameters_stay_in_it(name):
  recorded = golden.load(f'net_{name}')
  output, gradient, params = gradient_of(recorded, dtype='bfloat16')
  grad, _ = jax.eval_shape(gradient, params)
  assert {leaf.dtype for leaf in jax.tree.leaves(grad)} == {jnp.dtype('float32')}
  y = jax.jit(output)(params)
  assert y.dtype == jnp.float32
  error = np.linalg.norm(y - recorded['y']) / np.linalg.norm(recorded['y'])
  assert 1e-4 < error < 2e-2  # above the lower bound, or nothing was in bfloat16


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_rematerialization_keeps_parameter_names_and_changes_no_number(name):
  recorded = golden.load(f'net_{name}')
  _, gradient, params = gradient_of(recorded, remat=True, remat_policy='products')
  assert list(golden.flatten(params)) == recorded['param_names'].tolist()
  grad, y = jax.jit(gradient)(params)
  golden.assert_close(y, recorded['y'], 2e-5)
  norms = [np.linalg.norm(leaf) for leaf in golden.flatten(grad).values()]
  golden.assert_close(norms, recorded['grad_norms'], 1e-4)


def test_rematerialization_keeps_less_for_the_gradient():
  """What is handed from the forward to the backward pass, in bytes."""

  def residual_bytes(remat, policy='nothing'):
    config = mnist_ddpmpp_continuous.get_config()
    config.model.remat = remat
    config.model.remat_policy = policy
    model, _, params = utils.abstract_model(config)
    x = jax.ShapeDtypeStruct((8, 28, 28, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((8,), jnp.float32)

    def forward(params, x, labels):
      apply = lambda params: model.apply({'params': params}, x, labels, train=False)
      return jax.vjp(apply, params)[1]

    backward = jax.eval_shape(forward, params, x, labels)
    kept = jax.tree.leaves(backward)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

  everything, products, nothing = (
    residual_bytes(False),
    residual_bytes(True, 'products'),
    residual_bytes(True),
  )
  assert 1.2 * nothing < products < 0.8 * everything


def test_unknown_names_are_refused():
  config = mnist_ddpmpp_continuous.get_config()
  config.model.dtype = 'float8'
  with pytest.raises(UserError, match=r"model.dtype 'float8': choose one of float32, bfloat16"):
    prepare(config)
  config.model.dtype = 'float32'
  config.model.remat_policy = 'dots'
  with pytest.raises(UserError, match="model.remat_policy 'dots': choose one of nothing, products"):
    prepare(config)


@pytest.mark.slow
def test_training_in_bfloat16_is_stable_for_200_steps():
  """A narrow network, attention in its middle, on every second pixel: all of it is in bfloat16."""
  config = mnist_ddpmpp_continuous.get_config()
  train_ds, _, _ = datasets.get_dataset(config)
  images = datasets.get_source(config, 'train').images[: 200 * 8, ::2, ::2]
  config.model.update(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dtype='bfloat16')
  config.data.image_size = 14
  config.training.batch_size = 8
  config = prepare(config)
  model, state = init_state(jax.random.PRNGKey(0), config)
  train_step = train_mode.compile_train_step(
    losses.build_step_fn(config, sde_lib.get_sde(config), model, train=True),
    train_ds.preprocess,
    stream(config.seed, 'train'),
  )
  state = parallelism.replicate(state)  # as every later state is: one compilation
  found = []
  for batch in np.split(images, 200):
    state, step_losses = train_step(state, [{'image': batch}])
    found.extend(step_losses)
  assert np.isfinite(found).all()
  assert np.mean(found[-20:]) < 0.15 * np.mean(found[:5])


def test_the_precision_of_products_reaches_the_compiler():
  config = mnist_ddpmpp_continuous.get_config()

  def precisions(name):
    config.model.matmul_precision = name
    model, states, params = utils.abstract_model(prepare(config))
    forward = jax.jit(lambda p, x, t: utils.get_model_fn(model, p, states)(x, t)[0])
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    text = forward.lower(params, image, jax.ShapeDtypeStruct((1,), jnp.float32)).as_text()
    return text.count('HIGHEST')

  try:
    assert precisions('float32') > 60  # two operands of every convolution and product
    with pytest.raises(UserError, match="model.matmul_precision 'single': choose one of default, "):
      precisions('single')
  finally:
    assert precisions('default') == 0
