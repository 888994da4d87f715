"""DDPM++ (cont.) under the sub-VP SDE on 5,000 MNIST digits.

python main.py --mode=train --config=configs/subvp/mnist_ddpmpp_continuous.py --workdir=<workdir>
"""

import ml_collections

from configs import recipes
from configs.default_mnist_configs import get_default_configs


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.subvp(config)
  recipes.ddpmpp(config)
  recipes.laptop(config)
  return config
