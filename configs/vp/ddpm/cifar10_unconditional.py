"""DDPM with a network that is not told the time.

python main.py --mode=train --config=configs/vp/ddpm/cifar10_unconditional.py --workdir=<workdir>
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
  config.model.conditional = False
  return config
