"""NCSN on CIFAR-10: FID 25.32, IS 8.87 as published.

python main.py --mode=train --config=configs/ve/ncsn/cifar10.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ncsn(config)
  return config
