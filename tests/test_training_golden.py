"""Losses and training steps against recorded values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import losses
import sde_lib
from models import utils
from tests import golden_values as golden

NETWORKS = [
  'vp_ddpmpp_continuous',
  've_ncsnv2',
  've_ncsn',
  'vp_ddpm',
  've_ncsnpp_continuous',
  'subvp_ddpmpp_continuous',
]


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_losses_and_three_training_steps_agree_with_recorded_values(name, recorded_random_bits):
  recorded = {
    key.removeprefix(f'{name}/'): value
    for key, value in golden.load('training').items()
    if key.startswith(f'{name}/')
  }
  network = golden.load(f'net_{name}')
  config = golden.config_of(network)
  config.optim.warmup = 2
  sde = sde_lib.get_sde(config)
  model = utils.create_model(config)
  batches = jnp.asarray(recorded['batches'])
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.PRNGKey(0), batches[0], jnp.ones(4), train=False)
  )
  params = golden.filled_like(shapes['params'])
  state = losses.State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    params_ema=params,
    opt_state=losses.get_optimizer(config).init(params),
    model_state={},
    ema_rate=config.model.ema_rate,
  )

  def step_fn(train, reduce_mean, likelihood_weighting):
    return losses.get_step_fn(
      sde,
      model,
      train,
      losses.optimization_manager(config),
      reduce_mean,
      config.training.continuous,
      likelihood_weighting,
    )

  pairs = [(weighting, mean) for weighting in (False, True) for mean in (False, True)]
  # Only the objective over continuous time can be weighted.
  options = [pair for pair in pairs if f'eval_loss_lw{pair[0]:d}_rm{pair[1]:d}' in recorded]
  assert len(options) == (4 if config.training.continuous else 2)

  @jax.jit
  def eval_losses(batch):
    carry = (jax.random.PRNGKey(21), state)
    return [step_fn(False, mean, weighting)(carry, batch)[1] for weighting, mean in options]

  for (weighting, mean), loss in zip(options, eval_losses({'image': batches[0]}), strict=True):
    expected = recorded[f'eval_loss_lw{weighting:d}_rm{mean:d}']
    np.testing.assert_allclose(loss, expected, rtol=1e-4)

  train_step = jax.jit(
    step_fn(True, config.training.reduce_mean, config.training.likelihood_weighting)
  )
  carry = (jax.random.PRNGKey(22), state)
  history = []
  for batch in batches:
    carry, loss = train_step(carry, {'image': batch})
    history.append(loss)
  state = carry[1]
  np.testing.assert_allclose(history, recorded['train_losses'], rtol=1e-4)
  assert int(state.step) == int(recorded['step'])

  # The output does not depend on the bias of attention's keys (the softmax removes it), nor on what
  # adds a constant to a channel that is a normalization group of its own. Such gradients are
  # rounding error, which Adam scales up to an update of any size.
  names = recorded['param_names'].tolist()
  grad_norms = network['grad_norms']
  defined = (grad_norms == 0) | (grad_norms > 1e-6 * grad_norms.max())

  def check(tree, base, key):
    tree, base = golden.flatten(tree), golden.flatten(base)
    norms = np.asarray([np.linalg.norm(tree[name] - base[name]) for name in names])
    golden.assert_close(norms[defined], recorded[key][defined], 1e-4)

  check(state.params, jax.tree.map(jnp.zeros_like, params), 'param_norms')
  check(state.params, params, 'update_norms')
  check(state.params_ema, params, 'ema_update_norms')
