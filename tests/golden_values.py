"""Recorded values of the reference implementation, and the configurations they belong to."""

import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import losses
import sde_lib
from models import utils
from tests.golden.fill import fill

# Networks with recorded samplers, likelihoods and conditional samples.
CONTINUOUS = (
  've_ncsnpp_continuous',
  pytest.param('vp_ddpmpp_continuous', marks=pytest.mark.slow),
  pytest.param('subvp_ddpmpp_continuous', marks=pytest.mark.slow),
)

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def load(name: str) -> dict[str, np.ndarray]:
  with np.load(GOLDEN / f'{name}.npz') as file:
    return dict(file)


def config_of(recorded: dict[str, np.ndarray]) -> ml_collections.ConfigDict:
  """The configuration that a network's values were recorded with."""
  entry = json.loads(str(recorded['config']))
  return configure(entry['config'], entry['overrides'])


def configure(name: str, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The configuration file of a name such as 'vp/ddpm/cifar10', with overrides put on it."""
  config = importlib.import_module('configs.' + name.replace('/', '.')).get_config()
  for key, value in overrides.items():
    section, field = key.split('.')
    config[section][field] = tuple(value) if isinstance(value, list) else value
  return config


def filled_like(params):
  """The recorded weights, shaped as `params` (arrays or shapes)."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  filled = {path: jnp.asarray(fill(path, leaf.shape)) for path, leaf in flat.items()}
  return flax.traverse_util.unflatten_dict(filled, sep='/')


def sampling_setup(name: str):
  """Recorded values, settings, configuration, SDE, network and state of a recorded sampler."""
  prefix = f'{name}/'
  entries = load('samplers')
  recorded = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
  settings = json.loads(str(recorded['config']))
  config = config_of(load(f'net_{name}'))
  config.model.num_scales = settings['N']
  model = utils.create_model(config)
  x = jnp.zeros(recorded['pc_denoise0'].shape)
  shapes = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), x, jnp.ones(2), train=False))
  params = filled_like(shapes['params'])
  state = losses.State(0, params, params, None, {})
  return recorded, settings, config, sde_lib.get_sde(config), model, state


def flatten(tree) -> dict[str, jax.Array]:
  """Leaves by their path, in the order in which the norms were recorded."""
  return dict(sorted(flax.traverse_util.flatten_dict(tree, sep='/').items()))


def assert_close(actual, expected, relative: float) -> None:
  """Largest difference at most `relative` times the largest recorded entry."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())
