"""NCSN++ (cont.) under the VE SDE on FFHQ at 256px.

python main.py --mode=train --config=configs/ve/ffhq_256_ncsnpp_continuous.py --workdir=<workdir>

The images are a folder of files: --config.data.path=<folder>.
"""

import ml_collections

from configs import recipes
from configs.default_lsun_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ve(config)
  recipes.ncsnpp_256(config)
  config.data.dataset = 'FFHQ'
  config.model.sigma_max = 348.0
  return config
