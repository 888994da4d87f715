"""NCSN with techniques 1, 2, 4 and 5 of NCSNv2, on CIFAR-10.

python main.py --mode=train --config=configs/ve/ncsn/cifar10_1245.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ncsn(config)
  recipes.more_levels(config, sigma_max=50.0, num_scales=232, snr=0.176)
  config.model.num_classes = 232
  config.model.ema_rate = 0.999
  return config
