"""A configuration whose `get_config` takes an argument, and that computes as it is loaded."""

import jax.numpy as jnp
import ml_collections

from tests import tiny_config

WIDTHS = jnp.asarray([4, 8])


def get_config(which: str) -> ml_collections.ConfigDict:
  config = tiny_config.get_config()
  config.model.width = int(WIDTHS[{'thin': 0, 'wide': 1}[which]])
  return config
