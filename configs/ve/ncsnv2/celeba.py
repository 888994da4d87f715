"""NCSNv2 on CelebA at 64px: FID 10.23 as published.

python main.py --mode=train --config=configs/ve/ncsnv2/celeba.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_celeba_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ncsnv2(config)
  recipes.more_levels(config, sigma_max=90.0, num_scales=500, snr=0.128)
  return config
