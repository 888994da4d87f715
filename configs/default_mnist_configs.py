"""Defaults of the MNIST5K experiments: 28x28 digits, sized for a laptop CPU."""

import ml_collections

from configs.default_cifar10_configs import get_default_configs as get_cifar10_configs


def get_default_configs() -> ml_collections.ConfigDict:
  config = get_cifar10_configs()

  data = config.data
  data.dataset = 'MNIST5K'
  data.image_size = 28
  data.num_channels = 1
  data.random_flip = False  # a mirrored digit is no digit

  config.eval.extractor = 'none'
  return config
