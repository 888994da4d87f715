"""Blocks of the RefineNets behind NCSN and NCSNv2.

RefineNet: Lin et al. 2017, "RefineNet: Multi-Path Refinement Networks for High-Resolution Semantic
Segmentation", https://arxiv.org/abs/1611.06612.

Each block comes in two kinds: NCSNv2's, and NCSN's, which normalizes by noise level before every
convolution. Parameters in checkpoints are named after the classes, so their names stay.

Below, `y` is the number of each example's noise level, (B,), or None for a block of NCSNv2.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from models import convolution
from models.layers import Activation, in_dtype_of_input
from models.normalization import ConditionalInstanceNorm2dPlus, InstanceNorm2dPlus
from models.up_or_down_sampling import naive_downsample_2d
from runtime.array_types import Array, FeatureMaps

NoiseLevels = Int[Array, ' B']  # by number


def _conv(x: FeatureMaps, features: int, size: int, **kwargs: Any) -> Float[Array, 'B H W D']:
  """A convolution with Flax's initialization, unless `kwargs` give another."""
  conv = nn.Conv(
    features,
    (size, size),
    conv_general_dilated=convolution.conv_general_dilated,
    promote_dtype=in_dtype_of_input,
    **kwargs,
  )
  return conv(x)


def ncsn_conv(
  x: FeatureMaps, features: int, *, size: int = 3, dilation: int = 1, bias: bool = True
) -> Float[Array, 'B H W {features}']:
  """A convolution with NCSN's initialization: kernel and bias uniform in +-1 / sqrt(fan in).

  Args:
    x: (B, H, W, C).
    features: output channels.
    size: height and width of the kernel.
    dilation: of the kernel.
    bias: whether to add one.

  Returns:
    (B, H, W, features).
  """
  bound = (size**2 * x.shape[-1]) ** -0.5

  init = lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)
  dilated = (dilation, dilation)
  return _conv(
    x, features, size, kernel_dilation=dilated, use_bias=bias, kernel_init=init, bias_init=init
  )


class _ByNoiseLevel:
  """Makes a block normalize by noise level, for networks that are conditioned on it."""

  def normalize(self, x: FeatureMaps, y: NoiseLevels) -> FeatureMaps:
    """Normalizes `x`, (B, H, W, C), with the parameters of its noise levels `y`, (B,)."""
    return ConditionalInstanceNorm2dPlus(self.num_classes)(x, y)


class ConvMeanPool(nn.Module):
  """A convolution followed by the mean of 2x2 blocks.

  Its kernel starts as in Flax, normal with variance 1 / fan in, and its bias at zero: recorded for
  NCSNv2, and a guess for NCSN, which the reference could not run.

  Attributes:
    features: output channels.
    size: height and width of the kernel.
  """

  features: int
  size: int = 3

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B H//2 W//2 {self.features}']:
    """Maps (B, H, W, C) to (B, H/2, W/2, features)."""
    return naive_downsample_2d(_conv(x, self.features, self.size))


class ResidualBlock(nn.Module):
  """Two normalized convolutions and a shortcut.

  Attributes:
    act: activation.
    features: output channels.
    down: halve the resolution by averaging; with `dilation` > 1 only the receptive field grows.
    dilation: of the convolutions.
    norm: normalization, where it is not by noise level.
    num_classes: number of noise levels, where it normalizes by noise level.
  """

  act: Activation
  features: int
  down: bool = False
  dilation: int = 1
  norm: type[nn.Module] = InstanceNorm2dPlus
  num_classes: int = 0

  def normalize(self, x: FeatureMaps, y: NoiseLevels | None) -> FeatureMaps:
    """Normalizes `x`, (B, H, W, C)."""
    del y
    return self.norm()(x)

  @nn.compact
  def __call__(
    self, x: FeatureMaps, y: NoiseLevels | None = None
  ) -> Float[Array, 'B height width {self.features}']:
    """Maps (B, H, W, C) to (B, H', W', features), H' and W' being H and W or half of them."""
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
  """Two normalized convolutions and a shortcut, normalized by noise level."""


class RCUBlock(nn.Module):
  """Residual convolution units.

  Attributes:
    act: activation.
    n_blocks: number of units.
    n_stages: number of convolutions in each unit.
    num_classes: number of noise levels, where it normalizes by noise level.
  """

  act: Activation
  n_blocks: int
  n_stages: int = 2
  num_classes: int = 0

  def normalize(self, x: FeatureMaps, y: NoiseLevels | None) -> FeatureMaps:
    """Returns `x`, (B, H, W, C), unchanged: only NCSN's block normalizes."""
    del y
    return x

  @nn.compact
  def __call__(self, x: FeatureMaps, y: NoiseLevels | None) -> FeatureMaps:
    """Maps (B, H, W, C) to an array of the same shape."""
    for _ in range(self.n_blocks):
      h = x
      for _ in range(self.n_stages):
        h = ncsn_conv(self.act(self.normalize(h, y)), x.shape[-1], bias=False)
      x = x + h
    return x


class CondRCUBlock(_ByNoiseLevel, RCUBlock):
  """Residual convolution units, normalized by noise level."""


class MSFBlock(nn.Module):
  """Multi-resolution fusion: each input is convolved and resized to the first, and all are added.

  Attributes:
    features: output channels.
    num_classes: number of noise levels, where it normalizes by noise level.
  """

  features: int
  num_classes: int = 0

  def normalize(self, x: FeatureMaps, y: NoiseLevels | None) -> FeatureMaps:
    """Returns `x`, (B, H, W, C), unchanged: only NCSN's block normalizes."""
    del y
    return x

  @nn.compact
  def __call__(
    self, xs: Sequence[Float[Array, 'B _ _ _']], y: NoiseLevels | None
  ) -> Float[Array, 'B height width {self.features}']:
    """Maps arrays (B, H_i, W_i, C_i) to one of (B, H_0, W_0, features)."""
    shape = (*xs[0].shape[:3], self.features)
    maps = [ncsn_conv(self.normalize(x, y), self.features) for x in xs]
    return sum(h if h.shape == shape else jax.image.resize(h, shape, 'bilinear') for h in maps)


class CondMSFBlock(_ByNoiseLevel, MSFBlock):
  """Multi-resolution fusion, normalized by noise level."""


class CRPBlock(nn.Module):
  """Chained residual pooling.

  Attributes:
    act: activation.
    n_stages: number of poolings in the chain.
    num_classes: number of noise levels, where it normalizes by noise level.
  """

  act: Activation
  n_stages: int = 2
  num_classes: int = 0

  def pool(self, x: FeatureMaps) -> FeatureMaps:
    """Takes the maximum over 5x5 pixels at stride 1, which keeps the shape (B, H, W, C)."""
    return nn.max_pool(x, (5, 5), padding='SAME')

  def normalize(self, x: FeatureMaps, y: NoiseLevels | None) -> FeatureMaps:
    """Returns `x`, (B, H, W, C), unchanged: only NCSN's block normalizes."""
    del y
    return x

  @nn.compact
  def __call__(self, x: FeatureMaps, y: NoiseLevels | None) -> FeatureMaps:
    """Maps (B, H, W, C) to an array of the same shape."""
    x = path = self.act(x)
    for _ in range(self.n_stages):
      path = ncsn_conv(self.pool(self.normalize(path, y)), x.shape[-1], bias=False)
      x = x + path
    return x


class CondCRPBlock(_ByNoiseLevel, CRPBlock):
  """Chained residual pooling with averages, normalized by noise level."""

  def pool(self, x: FeatureMaps) -> FeatureMaps:
    """Takes the mean over 5x5 pixels at stride 1, which keeps the shape (B, H, W, C)."""
    return nn.avg_pool(x, (5, 5), padding='SAME')


class RefineBlock(nn.Module):
  """Refines features with those of a lower resolution.

  Attributes:
    act: activation.
    features: output channels.
    end: whether it is the last block of the network, which has more units.
    num_classes: number of noise levels, where it normalizes by noise level.
  """

  act: Activation
  features: int
  end: bool = False
  num_classes: int = 0

  RCU = RCUBlock
  MSF = MSFBlock
  CRP = CRPBlock

  @nn.compact
  def __call__(
    self, xs: Sequence[Float[Array, 'B _ _ _']], y: NoiseLevels | None = None
  ) -> Float[Array, 'B height width D']:
    """Maps (B, H, W, C_0), and perhaps features of a lower resolution, to (B, H, W, features)."""
    levels = {'num_classes': self.num_classes}
    hs = [self.RCU(self.act, n_blocks=2, **levels)(x, y) for x in xs]
    h = self.MSF(self.features, **levels)(hs, y) if len(hs) > 1 else hs[0]
    h = self.CRP(self.act, **levels)(h, y)
    return self.RCU(self.act, n_blocks=3 if self.end else 1, **levels)(h, y)


class CondRefineBlock(RefineBlock):
  """Refines features with those of a lower resolution, normalized by noise level."""

  RCU = CondRCUBlock
  MSF = CondMSFBlock
  CRP = CondCRPBlock
