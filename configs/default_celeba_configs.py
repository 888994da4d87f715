"""Defaults of the CelebA experiments at 64 pixels."""

import ml_collections

from configs.default_cifar10_configs import get_default_configs as get_cifar10_configs


def get_default_configs() -> ml_collections.ConfigDict:
  """The configuration that all CelebA experiments start from."""
  config = get_cifar10_configs()

  config.sampling.snr = 0.17

  evaluate = config.eval
  evaluate.begin_ckpt = 1
  evaluate.end_ckpt = 26
  evaluate.enable_sampling = True

  data = config.data
  data.dataset = 'CELEBA'
  data.image_size = 64

  model = config.model
  model.sigma_max = 90.0
  return config
