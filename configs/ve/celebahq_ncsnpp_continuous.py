"""NCSN++ (cont.) under the VE SDE on CelebA-HQ at 1024x1024.

python main.py --mode=train --config=configs/ve/celebahq_ncsnpp_continuous.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_celebahq_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ve(config)
  recipes.ncsnpp(config)
  config.training.reduce_mean = True

  model = config.model
  model.ema_rate = 0.9999
  model.nf = 16
  model.ch_mult = (1, 2, 4, 8, 16, 32, 32, 32)
  model.num_res_blocks = 1
  model.progressive = 'output_skip'
  model.progressive_input = 'input_skip'
  return config
