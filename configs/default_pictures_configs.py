"""Defaults for your own pictures: set `data.path`, and perhaps `data.image_size`.

The argument 'laptop', as in `--config=configs/vp/pictures_ddpmpp_continuous.py:laptop`, chooses a
network and a schedule for two CPU cores.
"""

import ml_collections

from configs import recipes
from configs.default_cifar10_configs import get_default_configs as get_cifar10_configs


def get_default_configs() -> ml_collections.ConfigDict:
  """The configuration that experiments with own pictures start from."""
  config = get_cifar10_configs()

  data = config.data
  data.dataset = 'ImageFolder'
  data.path = ''  # a folder, ZIP, NPZ, parquet or arrow file
  data.image_size = 32
  data.num_channels = 3  # 1: grey
  data.random_flip = True  # False where left and right differ in meaning, as for letters
  data.crop = 'center'  # or 'random', 'none'
  data.resize = 'bilinear'  # or 'bicubic', 'lanczos', 'box'
  data.background = 'white'  # behind transparent parts
  data.min_side = 0  # smaller pictures are skipped; 0: image_size
  data.test_fraction = 0.1  # of the pictures, where no folder or list names those for testing
  data.test_list = ''  # a file with the names of the test pictures
  data.num_classes = 0  # how many classes there must be; 0: any number
  return config


def sized(config: ml_collections.ConfigDict, size: str) -> ml_collections.ConfigDict:
  """Shrinks the configuration if `size` is 'laptop'.

  Raises:
    ValueError: if `size` is neither 'full' nor 'laptop'.
  """
  if size not in ('full', 'laptop'):
    raise ValueError(f"The argument {size!r} is unknown: use 'full' or 'laptop'.")
  if size == 'laptop':
    recipes.laptop(config)
    config.model.attn_resolutions = (8,)
    config.model.ema_rate = 0.999
    config.optim.lr = 1e-3
    config.training.n_iters = 4000  # colours take longer to learn than digits
    config.training.snapshot_freq = 2000
    config.eval.extractor = 'pixels'
    config.eval.num_samples = 1000
  return config
