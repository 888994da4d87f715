"""DDPM++ (cont.) under the VP SDE on your own pictures.

python main.py --mode=train --config=configs/vp/pictures_ddpmpp_continuous.py \
    --config.data.path=<folder> --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_pictures_configs import get_default_configs, sized


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.vp(config)
  recipes.ddpmpp(config)
  return sized(config, size)
