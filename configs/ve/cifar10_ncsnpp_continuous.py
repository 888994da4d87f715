"""NCSN++ (cont.) under the VE SDE: FID 2.38, IS 9.83 (Table 3).

python main.py --mode=train --config=configs/ve/cifar10_ncsnpp_continuous.py --workdir=<workdir>

The FID is the best checkpoint's, one being saved every 50,000 steps: the published checkpoint_24.
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ve(config)
  recipes.ncsnpp(config)
  return config
