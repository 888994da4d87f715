"""NCSN++ (cont.) under the VE SDE on FFHQ at 1024px.

python main.py --mode=train --config=configs/ve/ffhq_ncsnpp_continuous.py --workdir=<workdir>

The images are a folder of files: --config.data.path=<folder>.
"""

import ml_collections

from configs import recipes
from configs.default_celebahq_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ve(config)
  recipes.ncsnpp_1024(config)
  config.data.dataset = 'FFHQ'
  config.training.reduce_mean = True
  return config
