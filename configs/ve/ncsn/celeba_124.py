"""NCSN with techniques 1, 2 and 4 of NCSNv2, on CelebA at 64px.

python main.py --mode=train --config=configs/ve/ncsn/celeba_124.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_celeba_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ncsn(config)
  recipes.more_levels(config, sigma_max=90.0, num_scales=500, snr=0.128)
  config.model.num_classes = 500
  return config
