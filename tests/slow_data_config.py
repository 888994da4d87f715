"""The tiny configuration with images each of which takes `data.path` seconds to read."""

import time

import numpy as np

from sources.base import register_dataset
from tests import tiny_config


class SlowSource:
  """64 random images."""

  def __init__(self, seconds):
    self._seconds = seconds
    self._images = np.random.default_rng(0).integers(0, 256, (64, 28, 28, 1), np.uint8)

  def __len__(self):
    return len(self._images)

  def __getitem__(self, i):
    time.sleep(self._seconds)
    return {'image': self._images[i], 'label': np.int32(0)}


@register_dataset(name='SlowData')
def slow_data(config, split, *, path=''):
  del config, split
  return SlowSource(float(path or 0))


def get_config():
  config = tiny_config.get_config()
  config.data.dataset = 'SlowData'
  config.data.num_workers = 1
  return config
