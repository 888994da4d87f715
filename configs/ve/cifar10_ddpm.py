"""DDPM's network under SMLD, the discrete VE chain: where the ablation of appendix H starts.

python main.py --mode=train --config=configs/ve/cifar10_ddpm.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ve(config)
  recipes.ddpm(config)
  recipes.discrete(config)
  return config
