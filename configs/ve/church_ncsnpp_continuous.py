"""NCSN++ (cont.) under the VE SDE on LSUN churches at 256px.

python main.py --mode=train --config=configs/ve/church_ncsnpp_continuous.py --workdir=<workdir>

The images are made ready by `tfds build lsun/church_outdoor --file_format=array_record`.
"""

import ml_collections

from configs import recipes
from configs.default_lsun_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ve(config)
  recipes.ncsnpp_256(config)
  config.data.category = 'church_outdoor'
  config.model.sigma_max = 380.0
  return config
