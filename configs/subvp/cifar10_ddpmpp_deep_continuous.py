"""DDPM++ (cont., deep) under the sub-VP SDE: FID 2.41, IS 9.57; ODE FID 2.92, 2.99 bits/dim.

python main.py --mode=train --config=configs/subvp/cifar10_ddpmpp_deep_continuous.py \
    --workdir=<workdir>

The first FID is the best checkpoint's, one being saved every 50,000 steps; the FID of the ODE and
the bits/dim are the last one's, checkpoint_19.
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.subvp(config)
  recipes.ddpmpp(config)
  recipes.deep(config)
  return config
