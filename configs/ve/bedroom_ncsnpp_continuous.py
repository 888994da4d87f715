"""NCSN++ (cont.) under the VE SDE on LSUN bedrooms at 256px.

python main.py --mode=train --config=configs/ve/bedroom_ncsnpp_continuous.py --workdir=<workdir>

The images are made ready by `tfds build lsun/bedroom --file_format=array_record`.
"""

import ml_collections

from configs import recipes
from configs.default_lsun_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ve(config)
  recipes.ncsnpp_256(config)
  config.data.category = 'bedroom'
  return config
