"""Building blocks of NCSN++ and DDPM++ (Song et al., appendix H)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import up_or_down_sampling as resampling
from models.layers import (
  NIN,
  Activation,
  GroupNorm,
  conv1x1,
  conv3x3,
  default_init,
  dense,
  spatial_attention,
)
from models.up_or_down_sampling import Conv2d, FirKernel


def add_skip(x: jax.Array, h: jax.Array, rescale: bool) -> jax.Array:
  """x + h, divided by sqrt(2) when `rescale`, which keeps the variance of the sum."""
  return (x + h) / np.sqrt(2).astype(x.dtype) if rescale else x + h


class Combine(nn.Module):
  """Merges a pyramid image into the features: 1x1 convolution, then 'sum' or 'cat'."""

  method: str = 'sum'

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    h = conv1x1(y.shape[-1])(x)
    return jnp.concatenate([h, y], axis=-1) if self.method == 'cat' else h + y


class AttnBlockpp(nn.Module):
  """Residual self-attention over the pixels.

  Attributes:
    skip_rescale: divide the sum by sqrt(2).
    init_scale: scale of the last linear map's initializer.
    num_groups: of the group normalization; see `GroupNorm`.
  """

  skip_rescale: bool = False
  init_scale: float = 0.0
  num_groups: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    h = GroupNorm(self.num_groups)(x)
    q, k, v = (NIN(channels)(h) for _ in range(3))
    h = NIN(channels, self.init_scale)(spatial_attention(q, k, v))
    return add_skip(x, h, self.skip_rescale)


class Upsample(nn.Module):
  """Doubles the resolution.

  Attributes:
    features: output channels; None keeps them.
    with_conv: apply a 3x3 convolution.
    fir: use the FIR filter instead of repetition.
    fir_kernel: its taps.
  """

  features: int | None = None
  with_conv: bool = False
  fir: bool = False
  fir_kernel: FirKernel = (1, 3, 3, 1)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features = self.features or x.shape[-1]
    if self.fir and self.with_conv:
      return Conv2d(features, up=True, fir_kernel=self.fir_kernel, kernel_init=default_init())(x)
    if self.fir:
      return resampling.upsample_2d(x, self.fir_kernel)
    x = resampling.naive_upsample_2d(x)
    return conv3x3(features)(x) if self.with_conv else x


class Downsample(nn.Module):
  """Halves the resolution; attributes as in `Upsample`."""

  features: int | None = None
  with_conv: bool = False
  fir: bool = False
  fir_kernel: FirKernel = (1, 3, 3, 1)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features = self.features or x.shape[-1]
    if self.fir and self.with_conv:
      return Conv2d(features, down=True, fir_kernel=self.fir_kernel, kernel_init=default_init())(x)
    if self.fir:
      return resampling.downsample_2d(x, self.fir_kernel)
    if self.with_conv:
      return conv3x3(features, stride=2)(x)
    return resampling.naive_downsample_2d(x)


class ResnetBlockDDPMpp(nn.Module):
  """DDPM's residual block with optional skip rescaling.

  Attributes:
    act: activation.
    features: output channels; None keeps them.
    conv_shortcut: 3x3 convolution instead of a linear map where the channels change.
    dropout: dropout rate.
    skip_rescale: divide the sum by sqrt(2).
    init_scale: scale of the last convolution's initializer.
    num_groups: of the group normalizations; see `GroupNorm`.
  """

  act: Activation
  features: int | None = None
  conv_shortcut: bool = False
  dropout: float = 0.1
  skip_rescale: bool = False
  init_scale: float = 0.0
  num_groups: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array | None, train: bool) -> jax.Array:
    features = self.features or x.shape[-1]
    h = conv3x3(features)(self.act(GroupNorm(self.num_groups)(x)))
    h = _finish(self, h, temb, train, self.num_groups)
    if x.shape[-1] != features:
      x = conv3x3(features)(x) if self.conv_shortcut else NIN(features)(x)
    return add_skip(x, h, self.skip_rescale)


class ResnetBlockBigGANpp(nn.Module):
  """BigGAN's residual block, which resamples inside.

  Attributes:
    act: activation.
    features: output channels; None keeps them.
    up: double the resolution.
    down: halve the resolution.
    fir: resample with the FIR filter instead of repetition and averaging.
    fir_kernel: its taps.
    dropout: dropout rate.
    skip_rescale: divide the sum by sqrt(2).
    init_scale: scale of the last convolution's initializer.
  """

  act: Activation
  features: int | None = None
  up: bool = False
  down: bool = False
  fir: bool = False
  fir_kernel: FirKernel = (1, 3, 3, 1)
  dropout: float = 0.1
  skip_rescale: bool = True
  init_scale: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array | None, train: bool) -> jax.Array:
    channels = x.shape[-1]
    features = self.features or channels
    h = self.act(GroupNorm()(x))
    if self.up:
      h, x = (Upsample(fir=self.fir, fir_kernel=self.fir_kernel)(a) for a in (h, x))
    elif self.down:
      h, x = (Downsample(fir=self.fir, fir_kernel=self.fir_kernel)(a) for a in (h, x))
    h = _finish(self, conv3x3(features)(h), temb, train)
    if channels != features or self.up or self.down:
      x = conv1x1(features)(x)
    return add_skip(x, h, self.skip_rescale)


def _finish(
  block: nn.Module,
  h: jax.Array,
  temb: jax.Array | None,
  train: bool,
  num_groups: int | None = None,
) -> jax.Array:
  """The second half of both blocks: time embedding, normalization, dropout, convolution."""
  features = h.shape[-1]
  if temb is not None:
    h = h + dense(features)(block.act(temb))[:, None, None, :]
  h = block.act(GroupNorm(num_groups)(h))
  h = nn.Dropout(block.dropout, deterministic=not train)(h)
  return conv3x3(features, block.init_scale)(h)
