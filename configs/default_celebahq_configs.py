"""Defaults of the experiments at 1024 pixels."""

import ml_collections

from configs.default_cifar10_configs import get_default_configs as get_cifar10_configs


def get_default_configs() -> ml_collections.ConfigDict:
  """The configuration that all 1024px experiments start from."""
  config = get_cifar10_configs()

  training = config.training
  training.batch_size = 8
  training.n_iters = 2400001
  training.snapshot_freq_for_preemption = 5000

  sampling = config.sampling
  sampling.snr = 0.15

  evaluate = config.eval
  evaluate.begin_ckpt = 1
  evaluate.end_ckpt = 48
  evaluate.batch_size = 8

  data = config.data
  data.dataset = 'CelebAHQ'
  data.image_size = 1024

  model = config.model
  model.sigma_max = 1348.0
  model.num_scales = 2000
  model.dropout = 0.0
  return config
