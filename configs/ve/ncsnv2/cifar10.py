"""NCSNv2 on CIFAR-10: FID 10.87, IS 8.40 as published.

python main.py --mode=train --config=configs/ve/ncsnv2/cifar10.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ncsnv2(config)
  return config
