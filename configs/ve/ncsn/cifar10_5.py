"""NCSN with technique 5 of NCSNv2, the average of the parameters, on CIFAR-10.

python main.py --mode=train --config=configs/ve/ncsn/cifar10_5.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ncsn(config)
  config.model.ema_rate = 0.999
  return config
