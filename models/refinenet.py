"""Blocks of the RefineNets (Lin et al. 2017) behind NCSN and NCSNv2.

Each comes in two kinds: NCSNv2's, and NCSN's, which normalizes by noise level before every
convolution. The class names are those that parameters in checkpoints are named after.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import convolution
from models.layers import Activation, in_dtype_of_input
from models.normalization import ConditionalInstanceNorm2dPlus, InstanceNorm2dPlus
from models.up_or_down_sampling import naive_downsample_2d


def _conv(x: jax.Array, features: int, size: int, **kwargs) -> jax.Array:
  """A convolution with Flax's initialization, where `kwargs` do not give another."""
  conv = nn.Conv(
    features,
    (size, size),
    conv_general_dilated=convolution.conv_general_dilated,
    promote_dtype=in_dtype_of_input,
    **kwargs,
  )
  return conv(x)


def ncsn_conv(
  x: jax.Array, features: int, size: int = 3, dilation: int = 1, bias: bool = True
) -> jax.Array:
  """A convolution with NCSN's initialization: everything uniform in +-1 / sqrt(fan in)."""
  bound = (size**2 * x.shape[-1]) ** -0.5

  def init(rng, shape, dtype=jnp.float32):
    return jax.random.uniform(rng, shape, dtype, -bound, bound)

  dilated = (dilation, dilation)
  return _conv(
    x, features, size, kernel_dilation=dilated, use_bias=bias, kernel_init=init, bias_init=init
  )


class _ByNoiseLevel:
  """Makes a block normalize by noise level, for networks that are told it."""

  def normalize(self, x: jax.Array, y: jax.Array) -> jax.Array:
    return ConditionalInstanceNorm2dPlus(self.num_classes)(x, y)


class ConvMeanPool(nn.Module):
  """A convolution followed by the mean of 2x2 blocks.

  Its weights start as Flax's do, normal with variance 1 / fan in and biases of zero: recorded for
  NCSNv2, and a guess for NCSN, which the reference could not run.
  """

  features: int
  size: int = 3

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return naive_downsample_2d(_conv(x, self.features, self.size))


class ResidualBlock(nn.Module):
  """Two normalized convolutions and a shortcut.

  Attributes:
    act: activation.
    features: output channels.
    down: lower the resolution: by averaging, or by widening the reach where `dilation` > 1.
    dilation: of the convolutions.
    norm: normalization.
    num_classes: number of noise levels, where it is conditional.
  """

  act: Activation
  features: int
  down: bool = False
  dilation: int = 1
  norm: type[nn.Module] = InstanceNorm2dPlus
  num_classes: int = 0

  def normalize(self, x: jax.Array, y: jax.Array | None) -> jax.Array:
    del y
    return self.norm()(x)

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array | None = None) -> jax.Array:
    channels = x.shape[-1]
    conv = functools.partial(ncsn_conv, dilation=self.dilation)
    pooled = self.down and self.dilation == 1
    h = self.act(self.normalize(x, y))
    h = conv(h, channels if self.down else self.features)
    h = self.act(self.normalize(h, y))
    h = ConvMeanPool(self.features)(h) if pooled else conv(h, self.features)
    if pooled:
      x = ConvMeanPool(self.features, size=1)(x)
    elif self.down:
      x = conv(x, self.features)
    elif channels != self.features:
      x = ncsn_conv(x, self.features, size=1)
    return x + h


class ConditionalResidualBlock(_ByNoiseLevel, ResidualBlock):
  """The same, normalized by noise level."""


class RCUBlock(nn.Module):
  """Residual convolution units.

  Attributes:
    act: activation.
    n_blocks: number of units.
    n_stages: convolutions in each.
    num_classes: number of noise levels, where it is conditional.
  """

  act: Activation
  n_blocks: int
  n_stages: int = 2
  num_classes: int = 0

  def normalize(self, x: jax.Array, y: jax.Array | None) -> jax.Array:
    del y
    return x

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array | None) -> jax.Array:
    for _ in range(self.n_blocks):
      h = x
      for _ in range(self.n_stages):
        h = ncsn_conv(self.act(self.normalize(h, y)), x.shape[-1], bias=False)
      x = x + h
    return x


class CondRCUBlock(_ByNoiseLevel, RCUBlock):
  """The same, normalized by noise level."""


class MSFBlock(nn.Module):
  """Multi-resolution fusion: convolutions, brought to the size of the first, and summed.

  Attributes:
    features: output channels.
    num_classes: number of noise levels, where it is conditional.
  """

  features: int
  num_classes: int = 0

  def normalize(self, x: jax.Array, y: jax.Array | None) -> jax.Array:
    del y
    return x

  @nn.compact
  def __call__(self, xs: Sequence[jax.Array], y: jax.Array | None) -> jax.Array:
    shape = (*xs[0].shape[:3], self.features)
    maps = [ncsn_conv(self.normalize(x, y), self.features) for x in xs]
    return sum(h if h.shape == shape else jax.image.resize(h, shape, 'bilinear') for h in maps)


class CondMSFBlock(_ByNoiseLevel, MSFBlock):
  """The same, normalized by noise level."""


class CRPBlock(nn.Module):
  """Chained residual pooling.

  Attributes:
    act: activation.
    n_stages: length of the chain.
    num_classes: number of noise levels, where it is conditional.
  """

  act: Activation
  n_stages: int = 2
  num_classes: int = 0

  def pool(self, x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (5, 5), padding='SAME')

  def normalize(self, x: jax.Array, y: jax.Array | None) -> jax.Array:
    del y
    return x

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array | None) -> jax.Array:
    x = path = self.act(x)
    for _ in range(self.n_stages):
      path = ncsn_conv(self.pool(self.normalize(path, y)), x.shape[-1], bias=False)
      x = x + path
    return x


class CondCRPBlock(_ByNoiseLevel, CRPBlock):
  """The same with averages, normalized by noise level."""

  def pool(self, x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (5, 5), padding='SAME')


class RefineBlock(nn.Module):
  """Refines features with those of a higher resolution.

  Attributes:
    act: activation.
    features: output channels.
    end: whether it is the last of the network, which has more units.
    num_classes: number of noise levels, where it is conditional.
  """

  act: Activation
  features: int
  end: bool = False
  num_classes: int = 0

  RCU = RCUBlock
  MSF = MSFBlock
  CRP = CRPBlock

  @nn.compact
  def __call__(self, xs: Sequence[jax.Array], y: jax.Array | None = None) -> jax.Array:
    levels = {'num_classes': self.num_classes}
    hs = [self.RCU(self.act, n_blocks=2, **levels)(x, y) for x in xs]
    h = self.MSF(self.features, **levels)(hs, y) if len(hs) > 1 else hs[0]
    h = self.CRP(self.act, **levels)(h, y)
    return self.RCU(self.act, n_blocks=3 if self.end else 1, **levels)(h, y)


class CondRefineBlock(RefineBlock):
  """The same, normalized by noise level."""

  RCU = CondRCUBlock
  MSF = CondMSFBlock
  CRP = CondCRPBlock
