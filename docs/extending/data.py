"""A data source of your own: discs of random place, size and brightness.

python main.py --mode=train --config=docs/extending/data.py --workdir=runs/discs
"""

import ml_collections
import numpy as np

import datasets
from configs.vp import mnist_ddpmpp_continuous


@datasets.register_dataset(name='discs')
class Discs:
  """Examples by number, {'image': uint8 (H, W, C), 'label': int}, drawn when they are asked for.

  Args:
    config: the configuration, of which `data.image_size` is read.
    split: 'train' or 'test'.
    length: how many discs; keyword-only parameters are keys of `config.data`.
  """

  class_names = ('dark', 'bright')

  def __init__(self, config, split, *, length=10_000):
    self.size = config.data.image_size
    self.length = length
    self.seed = {'train': 0, 'test': 1}[split]
    # A run refuses to resume with data of another fingerprint.
    self.fingerprint = f'discs 1 {split} {self.size} {length}'

  def __len__(self):
    return self.length

  def __getitem__(self, i):
    rng = np.random.default_rng((self.seed, int(i)))
    row, column = rng.uniform(0.3, 0.7, 2) * self.size
    radius, brightness = rng.uniform(0.1, 0.3) * self.size, rng.uniform(80, 255)
    y, x = np.mgrid[: self.size, : self.size]
    disc = (y - row) ** 2 + (x - column) ** 2 < radius**2
    image = (brightness * disc).astype(np.uint8)[:, :, None]
    return {'image': image, 'label': int(brightness > 167)}


def get_config() -> ml_collections.ConfigDict:
  config = mnist_ddpmpp_continuous.get_config()
  config.data.dataset = 'discs'
  config.data.length = 10_000
  return config
