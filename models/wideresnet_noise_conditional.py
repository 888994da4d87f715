"""The noise-conditional classifier behind class-conditional sampling.

It is a Wide ResNet with group normalization that is conditioned on the noise level, so that it
estimates p(y | x_t) at every t (Song et al. 2021, appendix I.1).

References:
  Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations",
    https://arxiv.org/abs/2011.13456.
  Zagoruyko and Komodakis 2016, "Wide Residual Networks", https://arxiv.org/abs/1605.07146.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from models import convolution
from models.classifier import register_classifier
from models.layers import GaussianFourierProjection, GroupNorm
from runtime.array_types import Array, Embedding, FeatureMaps, Images, PerExample
from runtime.errors import UserError


def _conv(features: int, name: str, strides: Sequence[int] = (1, 1)) -> nn.Conv:
  return nn.Conv(
    features,
    (3, 3),
    strides,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    conv_general_dilated=convolution.conv_general_dilated,
    name=name,
  )


def _uniform(bound: float) -> nn.initializers.Initializer:
  """Uniform in [-bound, bound]."""
  return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)


def _activation(x: FeatureMaps, name: str) -> FeatureMaps:
  """Normalization and ReLU, named after the batch normalization that it replaces."""
  return nn.relu(GroupNorm(epsilon=1e-5, name=name)(x))


def _shortcut(x: FeatureMaps, like: Float[Array, 'B h w D']) -> Float[Array, 'B h w D']:
  """Averages pixels and pads channels with zeros to the shape of `like`; no parameters."""
  stride = x.shape[1] // like.shape[1]
  x = nn.avg_pool(x, (stride, stride), (stride, stride))
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, like.shape[-1] - x.shape[-1])))


class WideResnetBlock(nn.Module):
  """A pre-activated residual block with the noise embedding between its convolutions.

  Attributes:
    features: output channels.
    stride: of the first convolution.
    activate_before_residual: normalize and activate the input of the shortcut, too.
  """

  features: int
  stride: int = 1
  activate_before_residual: bool = False

  @nn.compact
  def __call__(
    self, x: FeatureMaps, temb: Embedding
  ) -> Float[Array, 'B height width {self.features}']:
    """Maps features (B, H, W, C) to (B, H/stride, W/stride, features); `temb` is (B, E)."""
    h = _activation(x, 'init_bn')
    if self.activate_before_residual:
      x = h
    h = _conv(self.features, 'conv1', (self.stride, self.stride))(h)
    h = h + nn.Dense(self.features)(nn.swish(temb))[:, None, None, :]
    h = _conv(self.features, 'conv2')(_activation(h, 'bn_2'))
    return h + _shortcut(x, h)


class WideResnetGroup(nn.Module):
  """Blocks of one width; the first one changes resolution and channels.

  Attributes:
    num_blocks: number of blocks.
    features: output channels.
    stride: of the first block.
    activate_before_residual: of the first block.
  """

  num_blocks: int
  features: int
  stride: int = 1
  activate_before_residual: bool = False

  @nn.compact
  def __call__(
    self, x: FeatureMaps, temb: Embedding
  ) -> Float[Array, 'B height width {self.features}']:
    """Maps features (B, H, W, C) to (B, H/stride, W/stride, features); `temb` is (B, E)."""
    x = WideResnetBlock(self.features, self.stride, self.activate_before_residual)(x, temb)
    for _ in range(self.num_blocks - 1):
      x = WideResnetBlock(self.features)(x, temb)
    return x


@register_classifier(name='wideresnet_noise_conditional')
class WideResnet(nn.Module):
  """A Wide ResNet that classifies noisy images and is conditioned on their noise level.

  Every image is first standardized to mean zero and variance one, whatever its noise.

  Attributes:
    blocks_per_group: residual blocks at each of the three resolutions.
    channel_multiplier: width, in units of 16, 32 and 64 channels.
    num_classes: number of classes.
    embedding_size: Fourier frequencies of the noise embedding.
    fourier_scale: their standard deviation.
  """

  blocks_per_group: int = 4
  channel_multiplier: int = 10
  num_classes: int = 10
  embedding_size: int = 128
  fourier_scale: float = 16.0

  @nn.compact
  def __call__(
    self, x: Images, sigmas: PerExample, train: bool = True, pooled: bool = False
  ) -> Float[Array, 'B D']:
    """Returns the logits of noisy images, or with `pooled` the features before the last layer.

    Args:
      x: images with noise, (B, H, W, C).
      sigmas: standard deviation of the noise, (B,), above zero, in the units of `x`.
      train: ignored; without dropout and batch statistics it makes no difference.
      pooled: see `features`.

    Returns:
      Logits, (B, num_classes), or features, (B, 64 channel_multiplier).

    Raises:
      UserError: for images whose sides are not multiples of 4.
    """
    del train
    height, width = x.shape[1:3]
    if height % 4 or width % 4:
      raise UserError(
        f'The classifier cannot halve images of {height}x{width} pixels twice: '
        f'set data.image_size to a multiple of 4.'
      )
    temb = GaussianFourierProjection(self.embedding_size, self.fourier_scale)(jnp.log(sigmas))
    temb = nn.Dense(self.embedding_size * 4)(temb)
    temb = nn.Dense(self.embedding_size * 4)(nn.swish(temb))

    x = _conv(16, 'init_conv')(jax.nn.standardize(x, axis=(1, 2, 3)))
    for level, width in enumerate((16, 32, 64)):
      x = WideResnetGroup(
        self.blocks_per_group,
        width * self.channel_multiplier,
        stride=1 if level == 0 else 2,
        activate_before_residual=level == 0,
      )(x, temb)
    x = jnp.mean(_activation(x, 'pre-pool-bn'), axis=(1, 2))
    if pooled:
      return x
    return nn.Dense(self.num_classes, kernel_init=_uniform(self.num_classes**-0.5))(x)

  def features(
    self, x: Images, sigmas: PerExample
  ) -> Float[Array, 'B {64*self.channel_multiplier}']:
    """Returns the pooled features before the last layer, (B, 64 channel_multiplier).

    The arguments are those of `__call__`. Call it as
    `module.apply({'params': params}, x, sigmas, method='features')`.
    """
    return self(x, sigmas, train=False, pooled=True)
