"""NCSN++ under DDPM, the discrete VP chain.

python main.py --mode=train --config=configs/vp/cifar10_ncsnpp.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.vp(config)
  recipes.ncsnpp(config)
  recipes.discrete(config)
  config.sampling.predictor = 'reverse_diffusion'
  return config
