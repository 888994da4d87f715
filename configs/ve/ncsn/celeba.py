"""NCSN on CelebA at 64px.

python main.py --mode=train --config=configs/ve/ncsn/celeba.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_celeba_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ncsn(config)
  return config
