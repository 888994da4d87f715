"""DDPM on CelebA-HQ at 256px.

python main.py --mode=train --config=configs/vp/ddpm/celebahq.py --workdir=<workdir>

The images are a folder of files: --config.data.path=<folder>.
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
  config.data.dataset = 'CelebAHQ'
  return config
