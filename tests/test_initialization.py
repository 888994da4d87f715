"""Fresh parameters have the scale, the range and the centre of the recorded ones, leaf by leaf."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import utils
from tests.golden_values import GOLDEN, configure

RECORDED = json.loads((GOLDEN / 'init.json').read_text())
NETWORKS = [name for name in RECORDED if name != 'classifier']
QUICK = ('vp_ddpmpp_continuous',)

# Other bits of the same distributions, by a generator that compiles faster.
KEY = jax.random.key(0, impl='unsafe_rbg')


def fresh_leaves(module, *inputs):
  """Every parameter by its path, drawn by its own initializer, without the network around it."""
  initializers, param = {}, nn.Module.param

  def noted(self, name, init_fn, *args, **kwargs):
    initializers['/'.join((*self.scope.path, name))] = functools.partial(init_fn, *args)
    return param(self, name, init_fn, *args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(nn.Module, 'param', noted)
    jax.eval_shape(functools.partial(module.init, train=False), KEY, *inputs)
  keys = jax.random.split(KEY, len(initializers))
  return {
    path: init.func(key, *init.args)
    for (path, init), key in zip(initializers.items(), keys, strict=True)
  }


def differences(flat, leaves):
  """The leaves whose statistics are further from the recorded ones than chance makes them.

  Of n entries, the mean is uncertain by rms / sqrt(n) and the rms by at most rms / sqrt(2 n); the
  bounds are six standard deviations of the difference of two such draws. The largest of n normal
  entries varies by 1 / (2 ln n) of itself, and a uniform leaf comes closer to its bound than that;
  so a bound of 4 / (2 ln n) tells uniform (1.7 rms), truncated (2.3) and normal (above 3) leaves
  apart as soon as they have some hundred entries. Recorded values have six decimals.
  """
  assert flat.keys() == leaves.keys()
  wrong = {}
  for path, recorded in leaves.items():
    x = np.asarray(flat[path], np.float64)
    assert list(x.shape) == recorded['shape'], path
    n, rms, largest = x.size, recorded['rms'], recorded['max']
    drawn = {'mean': x.mean(), 'rms': np.sqrt((x**2).mean()), 'max': np.abs(x).max()}
    constant = largest == recorded['mean'] == rms
    bounds = {
      'mean': 0.0 if constant else 6 * np.sqrt(2 / n) * rms,
      'rms': 0.0 if constant else 6 / np.sqrt(n) * rms,
      'max': 0.0 if constant else np.expm1(2 / np.log(max(n, 3))) * largest,
    }
    if any(abs(drawn[key] - recorded[key]) > bounds[key] + 1e-6 for key in bounds):
      wrong[path] = {key: (recorded[key], drawn[key]) for key in bounds}
  return wrong


@pytest.mark.parametrize(
  'name',
  [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS],
)
def test_network_starts_as_the_recorded_one(name):
  recorded = RECORDED[name]
  config = configure(recorded['config'], recorded['overrides'])
  size, channels = config.data.image_size, config.data.num_channels
  model = utils.create_model(config)
  leaves = fresh_leaves(model, jnp.zeros((1, size, size, channels)), jnp.ones(1))
  assert not differences(leaves, recorded['leaves'])


def test_classifier_starts_as_the_recorded_one():
  fields = {'blocks_per_group': 1, 'channel_multiplier': 1, 'num_classes': 10}
  classifier = utils.get_classifier('wideresnet_noise_conditional')(**fields)
  leaves = fresh_leaves(classifier, jnp.zeros((1, 32, 32, 3)), jnp.ones(1))
  assert not differences(leaves, RECORDED['classifier']['leaves'])
