"""NCSN++ under SMLD, the discrete VE chain: FID 2.45, IS 9.73 (Table 3).

python main.py --mode=train --config=configs/ve/cifar10_ncsnpp.py --workdir=<workdir>

The FID is the best checkpoint's, one being saved every 50,000 steps.
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ve(config)
  recipes.ncsnpp(config)
  recipes.discrete(config)
  return config
