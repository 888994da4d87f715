"""A network of your own: residual blocks at one resolution, told the time.

python main.py --mode=train --config=docs/extending/network.py --workdir=runs/plain
"""

import flax.linen as nn
import ml_collections

from configs.vp import mnist_ddpmpp_continuous
from models import layers
from models.utils import register_model
from runtime.errors import UserError


@register_model(name='plain')
class Plain(nn.Module):
  """Predicts the noise in x, (B, H, W, C), given the time label 999 t, (B,).

  `num_channels` is read from `config.data`, the other fields from the keys of `config.model` with
  the same names.
  """

  num_channels: int
  width: int = 64
  depth: int = 6
  dropout: float = 0.1

  def check(self):
    """Refuses what cannot work, before anything is compiled."""
    if self.width % 4:
      raise UserError(f'model.width={self.width} must be a multiple of 4, for the groups.')

  @nn.compact
  def __call__(self, x, labels, train=True):
    temb = nn.swish(nn.Dense(self.width)(layers.get_timestep_embedding(labels, self.width)))
    h = nn.Conv(self.width, (3, 3))(x)
    for i in range(self.depth):
      block = nn.swish(nn.GroupNorm(num_groups=4)(h))
      block = nn.Conv(self.width, (3, 3), kernel_dilation=2 ** (i % 3))(block)
      block = nn.swish(block + nn.Dense(self.width)(temb)[:, None, None])
      block = nn.Dropout(self.dropout, deterministic=not train)(block)
      h = h + nn.Conv(self.width, (3, 3), kernel_init=nn.initializers.zeros)(block)
    return nn.Conv(self.num_channels, (3, 3))(h)


def get_config() -> ml_collections.ConfigDict:
  config = mnist_ddpmpp_continuous.get_config()
  config.model.name = 'plain'
  config.model.width = 64
  config.model.depth = 6
  return config
