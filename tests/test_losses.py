"""Objectives with a known value, and the optimizer's schedule."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import losses
from configs.vp import mnist_ddpmpp_continuous
from models import utils as mutils
from modes.preparation import prepare
from runtime.errors import UserError
from sde_lib import VESDE, VPSDE, get_sde, subVPSDE
from tests import tiny_config

DATA_STD = 0.5


class Zero(nn.Module):
  """A network that predicts nothing."""

  @nn.compact
  def __call__(self, x, labels, train=True):
    return jnp.zeros_like(x)


class ExactNoise(nn.Module):
  """The best noise prediction under the VP chain for N(0, DATA_STD^2) data."""

  @nn.compact
  def __call__(self, x, labels, train=True):
    abar = jnp.asarray(VPSDE().alphas_cumprod)[labels][:, None, None, None]
    return x * jnp.sqrt(1 - abar) / (abar * DATA_STD**2 + 1 - abar)


@pytest.fixture
def batch():
  return {'image': DATA_STD * jax.random.normal(jax.random.PRNGKey(3), (512, 8, 8, 1))}


def _value(loss_fn, batch):
  loss, _ = jax.jit(loss_fn)(jax.random.PRNGKey(0), {}, {}, batch)
  return float(loss)


@pytest.mark.parametrize('sde', [VPSDE(), subVPSDE(), VESDE()], ids=type)
def test_continuous_loss_of_no_prediction_is_the_variance_of_the_noise(sde, batch):
  mean = losses.get_sde_loss_fn(sde, Zero(), True, likelihood_weighting=False)
  half_sum = losses.get_sde_loss_fn(
    sde, Zero(), True, reduce_mean=False, likelihood_weighting=False
  )
  np.testing.assert_allclose(_value(mean, batch), 1, rtol=0.02)
  np.testing.assert_allclose(_value(half_sum, batch), 32, rtol=0.02)


def test_discrete_losses_of_no_prediction_are_the_variance_of_the_noise(batch):
  ddpm = losses.get_ddpm_loss_fn(VPSDE(), Zero(), True)
  smld = losses.get_smld_loss_fn(VESDE(), Zero(), True)
  np.testing.assert_allclose(_value(ddpm, batch), 1, rtol=0.02)
  np.testing.assert_allclose(_value(smld, batch), 32, rtol=0.02)


def test_ddpm_loss_of_the_best_prediction_is_the_posterior_variance(batch):
  abar = VPSDE().alphas_cumprod.astype(np.float64)
  expected = np.mean(abar * DATA_STD**2 / (abar * DATA_STD**2 + 1 - abar))
  ddpm = losses.get_ddpm_loss_fn(VPSDE(), ExactNoise(), True)
  np.testing.assert_allclose(_value(ddpm, batch), expected, rtol=0.2)  # 512 time steps drawn


def test_discrete_levels_and_labels_agree_with_the_continuous_marginals():
  """Label i of a discretely trained VE network is the i-th largest level, and t leads to it."""
  sde = VESDE(N=50)
  t = jnp.linspace(1, 0, 50)
  labels = sde.time_label(t, continuous=False)
  assert labels.tolist() == list(range(50))
  x = jnp.zeros((50, 1))
  perturbed, target, weight = sde.perturb_discrete(x, jnp.ones((50, 1)), labels)
  sigma = sde.marginal_prob(x, t)[1]
  np.testing.assert_allclose(perturbed[:, 0], sigma, rtol=1e-4)
  np.testing.assert_allclose(target[:, 0] * sigma, -1, rtol=1e-4)
  np.testing.assert_allclose(weight, sigma**2, rtol=1e-4)


def test_sub_vp_has_no_discrete_objective(batch):
  step_fn = losses.get_step_fn(subVPSDE(), Zero(), train=False, continuous=False)
  state = losses.State(0, {}, {}, None, {})
  with pytest.raises(UserError, match='subVPSDE has no discrete training objective'):
    step_fn((jax.random.PRNGKey(0), state), batch)


@pytest.mark.parametrize('warmup', [0, 4])
def test_learning_rate_warms_up_linearly_and_the_gradient_is_clipped(warmup):
  """With a constant gradient Adam moves by the learning rate, whatever the gradient's size."""
  config = mnist_ddpmpp_continuous.get_config()
  config.optim.warmup = warmup
  config.optim.lr = 0.1
  config.optim.grad_clip = 1.0
  optimizer = losses.get_optimizer(config)
  params = {'w': jnp.zeros(2)}
  state = optimizer.init(params)
  for step in range(6):
    updates, state = optimizer.update({'w': jnp.asarray([300.0, -400.0])}, state, params)
    rate = 0.1 * min(step / warmup, 1) if warmup else 0.1
    # Adam divides by 1 - 0.999^k, which single precision knows to 1e-7 / 1e-3.
    np.testing.assert_allclose(updates['w'], [-rate, rate], rtol=1e-4, atol=1e-9)
  moments = jax.tree.leaves(state)
  assert any(np.allclose(leaf, [0.6 * (1 - 0.9**6), -0.8 * (1 - 0.9**6)]) for leaf in moments)


@pytest.mark.parametrize('continuous', [True, False])
def test_gradient_of_parts_of_a_batch_is_that_of_the_whole(continuous):
  config = tiny_config.get_config()
  config.model.dropout = 0.0
  config.training.continuous = continuous
  config.model.num_scales = 100
  sde = get_sde(config)
  model, states, params = mutils.init_model(jax.random.PRNGKey(0), config)
  if continuous:
    objective = losses.get_sde_loss_fn(sde, model, True)
  else:
    objective = losses.get_ddpm_loss_fn(sde, model, True)
  batch = {'image': DATA_STD * jax.random.normal(jax.random.PRNGKey(3), (16, 28, 28, 1))}

  def gradient(num_parts):
    step = lambda params: objective.value_and_grad(
      jax.random.PRNGKey(1), params, states, batch, num_parts
    )
    compiled = jax.jit(step).lower(params).compile()
    (loss, _), grad = compiled(params)
    return loss, grad, compiled.memory_analysis().temp_size_in_bytes

  whole_loss, whole, whole_bytes = gradient(1)
  for num_parts in (2, 8):
    loss, grad, part_bytes = gradient(num_parts)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), grad, whole)
  assert part_bytes < 0.5 * whole_bytes


def test_batch_that_cannot_be_cut_into_parts_is_refused():
  config = mnist_ddpmpp_continuous.get_config()
  config.training.grad_accum_steps = 5
  with pytest.raises(UserError, match='grad_accum_steps=5 does not divide the 32 images that each'):
    prepare(config)
