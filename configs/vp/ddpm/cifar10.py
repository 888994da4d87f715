"""DDPM: FID 3.24; ODE FID 3.37, 3.28 bits/dim.

python main.py --mode=train --config=configs/vp/ddpm/cifar10.py --workdir=<workdir>

The first FID is the best checkpoint's, one being saved every 50,000 steps; the FID of the ODE and
the bits/dim are the last one's, checkpoint_26.
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.vp(config)
  recipes.ddpm(config)
  recipes.discrete(config)
  config.sampling.predictor = 'ancestral_sampling'
  return config
