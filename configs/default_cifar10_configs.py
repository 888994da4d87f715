"""Defaults of the CIFAR-10 experiments."""

import ml_collections

from configs import defaults


def get_default_configs() -> ml_collections.ConfigDict:
  """The configuration that all CIFAR-10 experiments start from."""
  config = defaults.get_default_configs()

  data = config.data
  data.dataset = 'CIFAR10'
  data.image_size = 32
  data.num_channels = 3
  data.random_flip = True
  return config
