"""NCSNv2 on LSUN bedrooms at 128px.

python main.py --mode=train --config=configs/ve/ncsnv2/bedroom.py --workdir=<workdir>

The images are made ready by `tfds build lsun/bedroom --file_format=array_record`.
"""

import ml_collections

from configs import recipes
from configs.default_lsun_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.ncsnv2(config)
  recipes.more_levels(config, sigma_max=190.0, num_scales=1086, snr=0.095)
  config.data.category = 'bedroom'
  config.data.image_size = 128
  config.model.name = 'ncsnv2_128'
  config.model.ema_rate = 0.9999
  config.training.batch_size = 128
  config.sampling.n_steps_each = 3
  return config
