"""Building blocks of NCSN++ and DDPM++ (Song et al. 2021, appendix H).

References:
  Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations",
    https://arxiv.org/abs/2011.13456.
  Brock et al. 2019 (BigGAN), "Large Scale GAN Training for High Fidelity Natural Image Synthesis",
    https://arxiv.org/abs/1809.11096.
  Ho et al. 2020 (DDPM), "Denoising Diffusion Probabilistic Models",
    https://arxiv.org/abs/2006.11239.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

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
from runtime.array_types import Array, Embedding, FeatureMaps


def add_skip(x: FeatureMaps, h: FeatureMaps, rescale: bool) -> FeatureMaps:
  """x + h, divided by sqrt(2) if `rescale`; all are (B, H, W, C).

  The division gives the sum of two independent branches the variance of one of them.
  """
  return (x + h) / np.sqrt(2).astype(x.dtype) if rescale else x + h


class Combine(nn.Module):
  """Merges an image of the input pyramid into the features.

  Attributes:
    method: 'sum' adds the image after a 1x1 convolution, 'cat' puts its channels first.
  """

  method: str = 'sum'

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W I'], y: FeatureMaps) -> Float[Array, 'B H W D']:
    """Merges the image `x`, (B, H, W, I), into the features `y`, (B, H, W, C).

    Returns:
      (B, H, W, C), or (B, H, W, 2 C) for 'cat'.
    """
    h = conv1x1(y.shape[-1])(x)
    return jnp.concatenate([h, y], axis=-1) if self.method == 'cat' else h + y


class AttnBlockpp(nn.Module):
  """Residual self-attention over the pixels, of the normalized features.

  Attributes:
    skip_rescale: divide the sum by sqrt(2).
    init_scale: scale of the last linear map's initializer.
    num_groups: of the group normalization; see `GroupNorm`.
  """

  skip_rescale: bool = False
  init_scale: float = 0.0
  num_groups: int | None = None

  @nn.compact
  def __call__(self, x: FeatureMaps) -> FeatureMaps:
    """Maps (B, H, W, C) to an array of the same shape."""
    channels = x.shape[-1]
    h = GroupNorm(self.num_groups)(x)
    q, k, v = (NIN(channels)(h) for _ in range(3))
    h = NIN(channels, self.init_scale)(spatial_attention(q, k, v))
    return add_skip(x, h, self.skip_rescale)


class Upsample(nn.Module):
  """Doubles the resolution.

  Attributes:
    features: output channels; None keeps them.
    with_conv: apply a 3x3 convolution; without it the channels are kept.
    fir: use the FIR filter instead of repetition.
    fir_kernel: its taps.
  """

  features: int | None = None
  with_conv: bool = False
  fir: bool = False
  fir_kernel: FirKernel = (1, 3, 3, 1)

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B 2*H 2*W D']:
    """Maps (B, H, W, C) to (B, 2 H, 2 W, features)."""
    features = self.features or x.shape[-1]
    if self.fir and self.with_conv:
      return Conv2d(features, up=True, fir_kernel=self.fir_kernel, kernel_init=default_init())(x)
    if self.fir:
      return resampling.upsample_2d(x, self.fir_kernel)
    x = resampling.naive_upsample_2d(x)
    return conv3x3(features)(x) if self.with_conv else x


class Downsample(nn.Module):
  """Halves the resolution.

  Attributes:
    features: output channels; None keeps them.
    with_conv: apply a 3x3 convolution; without it the channels are kept.
    fir: apply the FIR filter first; else average, or leave it to the stride of the convolution.
    fir_kernel: its taps.
  """

  features: int | None = None
  with_conv: bool = False
  fir: bool = False
  fir_kernel: FirKernel = (1, 3, 3, 1)

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B height width D']:
    """Maps (B, H, W, C) to (B, H/2, W/2, features)."""
    features = self.features or x.shape[-1]
    if self.fir and self.with_conv:
      return Conv2d(features, down=True, fir_kernel=self.fir_kernel, kernel_init=default_init())(x)
    if self.fir:
      return resampling.downsample_2d(x, self.fir_kernel)
    if self.with_conv:
      return conv3x3(features, stride=2)(x)
    return resampling.naive_downsample_2d(x)


class ResnetBlockDDPMpp(nn.Module):
  """The residual block of DDPM (Ho et al. 2020) with optional rescaling of the skip connection.

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
  def __call__(
    self, x: FeatureMaps, temb: Embedding | None, train: bool
  ) -> Float[Array, 'B H W D']:
    """Maps (B, H, W, C) to (B, H, W, features).

    Args:
      x: features, (B, H, W, C).
      temb: the time embedding, (B, E); None for an unconditional network.
      train: whether dropout is on.
    """
    features = self.features or x.shape[-1]
    h = conv3x3(features)(self.act(GroupNorm(self.num_groups)(x)))
    h = _finish(self, h, temb, train=train, num_groups=self.num_groups)
    if x.shape[-1] != features:
      x = conv3x3(features)(x) if self.conv_shortcut else NIN(features)(x)
    return add_skip(x, h, self.skip_rescale)


class ResnetBlockBigGANpp(nn.Module):
  """The residual block of BigGAN (Brock et al. 2019), which resamples both of its branches.

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
  def __call__(
    self, x: FeatureMaps, temb: Embedding | None, train: bool
  ) -> Float[Array, 'B height width D']:
    """Maps (B, H, W, C) to (B, H', W', features), H' and W' being H and W, doubled or halved.

    Args:
      x: features, (B, H, W, C).
      temb: the time embedding, (B, E); None for an unconditional network.
      train: whether dropout is on.
    """
    channels = x.shape[-1]
    features = self.features or channels
    h = self.act(GroupNorm()(x))
    if self.up:
      h, x = (Upsample(fir=self.fir, fir_kernel=self.fir_kernel)(a) for a in (h, x))
    elif self.down:
      h, x = (Downsample(fir=self.fir, fir_kernel=self.fir_kernel)(a) for a in (h, x))
    h = _finish(self, conv3x3(features)(h), temb, train=train)
    if channels != features or self.up or self.down:
      x = conv1x1(features)(x)
    return add_skip(x, h, self.skip_rescale)


def _finish(
  block: nn.Module,
  h: FeatureMaps,
  temb: Embedding | None,
  *,
  train: bool,
  num_groups: int | None = None,
) -> FeatureMaps:
  """The second half of both blocks: time embedding, normalization, dropout, convolution."""
  features = h.shape[-1]
  if temb is not None:
    h = h + dense(features)(block.act(temb))[:, None, None, :]
  h = block.act(GroupNorm(num_groups)(h))
  h = nn.Dropout(block.dropout, deterministic=not train)(h)
  return conv3x3(features, block.init_scale)(h)
