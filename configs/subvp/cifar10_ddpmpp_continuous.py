"""DDPM++ (cont.) under the sub-VP SDE: FID 2.61, IS 9.56; ODE FID 3.16, 3.02 bits/dim.

python main.py --mode=train --config=configs/subvp/cifar10_ddpmpp_continuous.py --workdir=<workdir>

The first FID is the best checkpoint's, one being saved every 50,000 steps; the FID of the ODE and
the bits/dim are the last one's, checkpoint_26.
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.subvp(config)
  recipes.ddpmpp(config)
  return config
