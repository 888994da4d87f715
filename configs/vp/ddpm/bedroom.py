"""DDPM on LSUN bedrooms at 256px.

python main.py --mode=train --config=configs/vp/ddpm/bedroom.py --workdir=<workdir>

The images are made ready by `tfds build lsun/bedroom --file_format=array_record`.
"""

import ml_collections

from configs import recipes
from configs.default_lsun_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.vp(config)
  recipes.ddpm_256(config)
  recipes.discrete(config)
  config.sampling.predictor = 'ancestral_sampling'
  config.data.category = 'bedroom'
  return config
