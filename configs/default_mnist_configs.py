"""Defaults of the MNIST5K experiments: 28x28 digits, sized for a laptop CPU."""

import pathlib

import ml_collections

from configs.default_cifar10_configs import get_default_configs as get_cifar10_configs

ASSETS = pathlib.Path(__file__).parent.parent / 'assets'


def get_default_configs() -> ml_collections.ConfigDict:
  """The configuration that all MNIST5K experiments start from."""
  config = get_cifar10_configs()

  data = config.data
  data.dataset = 'MNIST5K'
  data.image_size = 28
  data.num_channels = 1
  data.random_flip = False  # most mirrored digits are not digits

  config.eval.extractor = 'mnist5k'

  classifier = config.classifier
  classifier.checkpoint = str(ASSETS / 'mnist5k_classifier.safetensors')
  classifier.blocks_per_group = 2
  classifier.channel_multiplier = 1
  classifier.embedding_size = 16
  classifier.fourier_scale = 1.0
  classifier.batch_size = 64
  classifier.n_iters = 2000
  classifier.lr = 2e-3
  classifier.warmup = 50
  classifier.weight_decay = 0.01
  classifier.ema_rate = 0.998
  return config
