"""The network of DDPM (Ho et al. 2020, appendix B), the ancestor of DDPM++.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from models import layerspp
from models.layers import (
  GroupNorm,
  check_halvings,
  compute_dtype,
  conv3x3,
  dense,
  get_act,
  get_timestep_embedding,
  remat_policy,
  rematerialized,
  sigma_of_label,
)
from models.utils import register_model
from runtime.array_types import Images, TimeLabels


class ResnetBlockDDPM(layerspp.ResnetBlockDDPMpp):
  """The residual block with 32 groups, under the name that it has in checkpoints of DDPM."""

  num_groups: int | None = 32


class AttnBlock(layerspp.AttnBlockpp):
  """Residual self-attention with 32 groups, under the name that it has in checkpoints of DDPM."""

  num_groups: int | None = 32


@register_model(name='ddpm')
class DDPM(nn.Module):
  """A U-Net of residual blocks with self-attention.

  Attributes:
    image_size: height and width.
    num_channels: image channels.
    centered: whether images are scaled to [-1, 1]; if not, x in [0, 1] enters as 2 x - 1.
    sigma_min: smallest noise level of the VE SDE, in units of the scaled data; it and the next two
      are used with `scale_by_sigma`.
    sigma_max: largest noise level.
    num_scales: number of noise levels.
    nf: channels at full resolution.
    ch_mult: multiples of `nf` at each resolution; each resolution is half the one before.
    num_res_blocks: residual blocks at each resolution.
    attn_resolutions: resolutions with self-attention.
    dropout: dropout rate.
    resamp_with_conv: convolve when resampling.
    conditional: condition on the time step or noise level.
    nonlinearity: activation.
    scale_by_sigma: divide the output by the noise level.
    dtype: type of its activations, 'float32' or 'bfloat16'; parameters and output are float32.
    remat: recompute the activations of a block for the gradient instead of keeping them.
    remat_policy: what is kept all the same: 'nothing', or 'products', the results of
      convolutions and attention.
  """

  image_size: int
  num_channels: int = 3
  centered: bool = False
  sigma_min: float = 0.01
  sigma_max: float = 50.0
  num_scales: int = 1000
  nf: int = 128
  ch_mult: Sequence[int] = (1, 2, 2, 2)
  num_res_blocks: int = 2
  attn_resolutions: Sequence[int] = (16,)
  dropout: float = 0.1
  resamp_with_conv: bool = True
  conditional: bool = True
  nonlinearity: str = 'swish'
  scale_by_sigma: bool = False
  dtype: str = 'float32'
  remat: bool = False
  remat_policy: str = 'nothing'

  def check(self) -> None:
    """Checks the fields before the network is used.

    Raises:
      UserError: if a name is unknown, or `image_size` cannot be halved as often as `ch_mult` asks.
    """
    get_act(self.nonlinearity)
    compute_dtype(self.dtype)
    remat_policy(self.remat_policy)
    check_halvings(self.image_size, self.ch_mult)

  @nn.compact
  def __call__(self, x: Images, labels: TimeLabels, train: bool = True) -> Images:
    """Predicts the score at x_t if `scale_by_sigma` is set, otherwise the noise in x_t.

    Args:
      x: x_t, (B, H, W, C), in the range of the scaled data.
      labels: time labels in 0...999, or indices in 0...num_scales-1 of noise levels, (B,).
      train: whether dropout is on.

    Returns:
      An array shaped as `x`, in float32.
    """
    act = get_act(self.nonlinearity)
    remat = functools.partial(rematerialized, remat=self.remat, policy=self.remat_policy)
    block = functools.partial(remat(ResnetBlockDDPM), act=act, dropout=self.dropout)
    attention = remat(AttnBlock)
    conv = {'with_conv': self.resamp_with_conv}
    widths = [self.nf * multiple for multiple in self.ch_mult]

    temb = None
    if self.conditional:
      temb = dense(self.nf * 4)(get_timestep_embedding(labels, self.nf))
      temb = dense(self.nf * 4)(act(temb))
    if not self.centered:
      x = 2 * x - 1
    x = x.astype(compute_dtype(self.dtype))
    if temb is not None:
      temb = temb.astype(x.dtype)

    # Down: every feature map is kept for the way up.
    hs = [conv3x3(self.nf)(x)]
    for level, width in enumerate(widths):
      if level != 0:
        hs.append(layerspp.Downsample(**conv)(hs[-1]))
      for _ in range(self.num_res_blocks):
        h = block(features=width)(hs[-1], temb, train)
        if h.shape[1] in self.attn_resolutions:
          h = attention()(h)
        hs.append(h)

    h = block()(hs[-1], temb, train)
    h = attention()(h)
    h = block()(h, temb, train)

    for width in reversed(widths):
      if h.shape[1] != hs[-1].shape[1]:
        h = layerspp.Upsample(**conv)(h)
      for _ in range(self.num_res_blocks + 1):
        h = jnp.concatenate([h, hs.pop()], axis=-1)
        h = block(features=width)(h, temb, train)
      if h.shape[1] in self.attn_resolutions:
        h = attention()(h)

    h = conv3x3(self.num_channels, init_scale=0.0)(act(GroupNorm(32)(h)))
    h = h.astype(jnp.float32)
    if self.scale_by_sigma:
      sigma = sigma_of_label(
        labels, sigma_min=self.sigma_min, sigma_max=self.sigma_max, num_scales=self.num_scales
      )
      h = h / sigma[:, None, None, None]
    return h
