"""Networks against recorded values: parameter trees, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import utils
from tests import golden_values as golden

QUICK = ['ve_ncsnpp_continuous', 'vp_ddpmpp_continuous']
SLOW = [
  'vp_ddpm',
  've_ddpm',
  've_ncsnpp_discrete',
  've_ncsnpp_1024_style',
  'subvp_ddpmpp_continuous',
  'vp_ncsnpp_continuous',
  'vp_ncsnpp_cat_skip',
  'vp_ncsnpp_ddpmblocks_residual',
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
