"""DDPM on LSUN churches at 256px.

python main.py --mode=train --config=configs/vp/ddpm/church.py --workdir=<workdir>

The images are made ready by `tfds build lsun/church_outdoor --file_format=array_record`.
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
  config.data.category = 'church_outdoor'
  return config
