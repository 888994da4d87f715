"""DDPM++ under DDPM, the discrete VP chain: FID 2.78, IS 9.64 (Table 3).

python main.py --mode=train --config=configs/vp/cifar10_ddpmpp.py --workdir=<workdir>

The FID is the best checkpoint's, one being saved every 50,000 steps.
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.vp(config)
  recipes.ddpmpp(config)
  recipes.discrete(config)
  config.sampling.predictor = 'ancestral_sampling'
  return config
