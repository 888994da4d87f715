"""A user's configuration file that brings its own network, classifier and features: small and fast.

It does what docs/extending describes, and is what the fault tests run.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import recipes
from configs.default_mnist_configs import get_default_configs
from evaluation import Extractor, register_extractor
from models import layers
from models.utils import register_classifier, register_model


@register_model(name='tiny')
class Tiny(nn.Module):
  """Two convolutions and a time embedding.

  Attributes:
    num_channels: image channels.
    width: hidden channels.
    dropout: dropout rate.
  """

  num_channels: int = 1
  width: int = 8
  dropout: float = 0.1

  @nn.compact
  def __call__(self, x: jax.Array, labels: jax.Array, train: bool = True) -> jax.Array:
    temb = layers.dense(self.width)(layers.get_timestep_embedding(labels, 16))
    h = nn.swish(layers.conv3x3(self.width)(x) + temb[:, None, None])
    h = nn.Dropout(self.dropout, deterministic=not train)(layers.GroupNorm()(h))
    return layers.conv3x3(self.num_channels, 0.1)(h)


@register_classifier(name='tiny')
class TinyClassifier(nn.Module):
  """A convolution, told the noise level: a user's own classifier."""

  num_classes: int = 2
  width: int = 16  # so that its kernel is large enough to be split over devices

  @nn.compact
  def __call__(self, x, sigmas, train=True, pooled=False):
    del train
    h = nn.Conv(self.width, (x.shape[1] // 2, x.shape[2]), (x.shape[1] // 2, 1))(x)
    h = nn.swish(h / (1 + sigmas[:, None, None, None])).reshape(len(x), -1)
    return h if pooled else nn.Dense(self.num_classes)(h)

  def features(self, x, sigmas):
    return self(x, sigmas, pooled=True)


@register_extractor(name='tiny')
def tiny_extractor(config) -> Extractor:
  """Eight random features of an image, and four logits."""
  size = config.data.image_size**2 * config.data.num_channels
  weights = np.random.RandomState(0).randn(size, 12).astype(np.float32) / size**0.5

  def forward(params, images):
    x = images.reshape(len(images), -1) / 255.0
    outputs = jnp.tanh(jnp.matmul(x, params, precision='highest'))
    return {'pool_3': outputs[:, :8], 'logits': outputs[:, 8:]}

  return Extractor('tiny', 'unit', '0', 8, weights, forward, batch_size=4)


def get_config() -> ml_collections.ConfigDict:
  config = get_default_configs()
  recipes.vp(config)
  config.model.name = 'tiny'
  config.model.width = 8
  config.model.num_scales = 5
  config.model.ema_rate = 0.9
  config.optim.warmup = 4
  training = config.training
  training.batch_size = 16
  training.n_iters = 40
  training.n_jitted_steps = 1
  training.log_freq = 1
  training.eval_freq = 5
  training.snapshot_freq = 10
  training.snapshot_freq_for_preemption = 5
  config.eval.begin_ckpt = 1
  config.eval.end_ckpt = 4
  config.eval.batch_size = 64
  config.eval.extractor = 'tiny'
  config.likelihood.eps = 0.3  # low NFE
  config.likelihood.rtol = config.likelihood.atol = 0.1
  return config
