"""Defaults of the LSUN experiments and of the others at 256 pixels."""

import ml_collections

from configs.default_cifar10_configs import get_default_configs as get_cifar10_configs


def get_default_configs() -> ml_collections.ConfigDict:
  """The configuration that all 256px experiments start from."""
  config = get_cifar10_configs()

  training = config.training
  training.batch_size = 64
  training.n_iters = 2400001
  training.snapshot_freq_for_preemption = 5000

  config.sampling.snr = 0.075

  evaluate = config.eval
  evaluate.begin_ckpt = 1
  evaluate.end_ckpt = 48
  evaluate.batch_size = 512
  evaluate.enable_sampling = True

  data = config.data
  data.dataset = 'LSUN'  # data.category names the category
  data.image_size = 256

  model = config.model
  model.sigma_max = 378.0
  model.num_scales = 2000
  model.dropout = 0.0
  return config
