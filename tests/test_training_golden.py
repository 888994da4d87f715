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
  pytest.param('ve_ncsnpp_continuous', marks=pytest.mark.slow),
  pytest.param('subvp_ddpmpp_continuous', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('name', NETWORKS)
def test_losses_and_three_training_steps_agree_with_recorded_values(name, recorded_random_bits):
  recorded = {
    key.removeprefix(f'{name}/'): value
    for key, value in golden.load('training').items()
    if key.startswith(f'{name}/')
  }
  config = golden.config_of(golden.load(f'net_{name}'))
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

  # An evaluation step splits its key once before the loss does.
  key = jax.random.split(jax.random.PRNGKey(21))[1]
  options = [(weighting, mean) for weighting in (False, True) for mean in (False, True)]

  @jax.jit
  def eval_losses(batch):
    loss_fns = [
      losses.get_sde_loss_fn(sde, model, False, reduce_mean=mean, likelihood_weighting=weighting)
      for weighting, mean in options
    ]
    return [loss_fn(key, params, {}, batch)[0] for loss_fn in loss_fns]

  for (weighting, mean), loss in zip(options, eval_losses({'image': batches[0]}), strict=True):
    expected = recorded[f'eval_loss_lw{weighting:d}_rm{mean:d}']
    np.testing.assert_allclose(loss, expected, rtol=1e-4)

  step_fn = jax.jit(
    losses.get_step_fn(
      sde,
      model,
      train=True,
      optimize_fn=losses.optimization_manager(config),
      reduce_mean=config.training.reduce_mean,
      continuous=config.training.continuous,
      likelihood_weighting=config.training.likelihood_weighting,
    )
  )
  carry = (jax.random.PRNGKey(22), state)
  history = []
  for batch in batches:
    carry, loss = step_fn(carry, {'image': batch})
    history.append(loss)
  state = carry[1]
  np.testing.assert_allclose(history, recorded['train_losses'], rtol=1e-4)
  assert int(state.step) == int(recorded['step'])

  # The softmax over keys does not depend on their bias (the second NIN of an attention block), so
  # its gradient is rounding error, which Adam scales up to an update of any size.
  names = recorded['param_names'].tolist()
  defined = [not (name.startswith('AttnBlock') and name.endswith('NIN_1/b')) for name in names]

  def check(tree, base, key):
    tree, base = golden.flatten(tree), golden.flatten(base)
    norms = np.asarray([np.linalg.norm(tree[name] - base[name]) for name in names])
    golden.assert_close(norms[defined], recorded[key][defined], 1e-4)

  check(state.params, jax.tree.map(jnp.zeros_like, params), 'param_norms')
  check(state.params, params, 'update_norms')
  check(state.params_ema, params, 'ema_update_norms')
