"""DDPM's network (cont.) under the VP SDE: ODE FID 3.69, 3.21 bits/dim.

python main.py --mode=train --config=configs/vp/ddpm/cifar10_continuous.py --workdir=<workdir>

Both numbers are the last checkpoint's, checkpoint_26.
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.vp(config)
  recipes.ddpm(config)
  return config
