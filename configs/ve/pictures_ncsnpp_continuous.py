"""NCSN++ (cont.) under the VE SDE on your own pictures.

python main.py --mode=train --config=configs/ve/pictures_ncsnpp_continuous.py \
    --config.data.path=<folder> --workdir=<workdir>

Set model.sigma_max to what --mode=inspect_data prints.
"""

import ml_collections

from configs import recipes
from configs.default_pictures_configs import get_default_configs, sized


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ve(config)
  recipes.ncsnpp(config)
  return sized(config, size)
