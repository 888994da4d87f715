"""The NCSN++ and DDPM++ networks (Song et al. 2021, section 4 and appendix H).

Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations",
https://arxiv.org/abs/2011.13456.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from models import layerspp
from models.layers import (
  Activation,
  GaussianFourierProjection,
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
from runtime.array_types import Embedding, Images, PerExample, TimeLabels
from runtime.errors import UserError

_CHOICES = {
  'resblock_type': ('ddpm', 'biggan'),
  'embedding_type': ('fourier', 'positional'),
  'progressive': ('none', 'output_skip', 'residual'),
  'progressive_input': ('none', 'input_skip', 'residual'),
  'progressive_combine': ('sum', 'cat'),
  'normalization': ('GroupNorm',),
}


@register_model(name='ncsnpp')
class NCSNpp(nn.Module):
  """A U-Net of residual blocks; DDPM++ is this network without FIR and progressive growing.

  Names are accepted in any case; the constructor raises `UserError` for one that is unknown.

  Attributes:
    image_size: height and width.
    num_channels: image channels.
    centered: whether images are scaled to [-1, 1]; if not, x in [0, 1] enters as 2 x - 1.
    sigma_min: smallest noise level of the VE SDE, in units of the scaled data; it and the next two
      are used by the positional embedding with `scale_by_sigma`.
    sigma_max: largest noise level.
    num_scales: number of noise levels.
    nf: channels at full resolution.
    ch_mult: multiples of `nf` at each resolution; each resolution is half the one before.
    num_res_blocks: residual blocks at each resolution.
    attn_resolutions: resolutions with self-attention.
    dropout: dropout rate.
    resamp_with_conv: convolve when resampling between 'ddpm' blocks.
    conditional: condition on the time or noise level.
    fir: resample with the FIR filter.
    fir_kernel: its taps.
    skip_rescale: divide sums of two branches by sqrt(2).
    resblock_type: 'biggan' or 'ddpm'.
    progressive: how the output is assembled over resolutions: 'none', 'output_skip', 'residual'.
    progressive_input: how the input enters each resolution: 'none', 'input_skip', 'residual'.
    progressive_combine: 'sum' or 'cat' for 'input_skip'.
    embedding_type: 'fourier' (of the logarithm of a noise level) or 'positional' (of a time label).
    fourier_scale: standard deviation of the Fourier frequencies.
    init_scale: scale of the initializer that ends each residual branch.
    nonlinearity: activation.
    normalization: 'GroupNorm'.
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
  num_res_blocks: int = 4
  attn_resolutions: Sequence[int] = (16,)
  dropout: float = 0.1
  resamp_with_conv: bool = True
  conditional: bool = True
  fir: bool = True
  fir_kernel: Sequence[float] = (1, 3, 3, 1)
  skip_rescale: bool = True
  resblock_type: str = 'biggan'
  progressive: str = 'none'
  progressive_input: str = 'none'
  progressive_combine: str = 'sum'
  embedding_type: str = 'positional'
  fourier_scale: float = 16.0
  init_scale: float = 0.0
  nonlinearity: str = 'swish'
  normalization: str = 'GroupNorm'
  scale_by_sigma: bool = False
  dtype: str = 'float32'
  remat: bool = False
  remat_policy: str = 'nothing'

  def __post_init__(self) -> None:
    # These names may come in any case; from here on they are spelled as in _CHOICES.
    for field, choices in _CHOICES.items():
      value = getattr(self, field)
      spelled = {choice.lower(): choice for choice in choices}.get(str(value).lower())
      if spelled is None:
        raise UserError(f'model.{field}={value!r} is unknown: choose one of {", ".join(choices)}.')
      setattr(self, field, spelled)
    super().__post_init__()

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
  def __call__(self, x: Images, time_cond: TimeLabels, train: bool = True) -> Images:
    """Predicts the score at x_t if `scale_by_sigma` is set, otherwise the noise in x_t.

    Args:
      x: x_t, (B, H, W, C), in the range of the scaled data.
      time_cond: what it is conditioned on, (B,): sigma > 0, in units of the scaled data, for the
        Fourier embedding, else a time label in 0...999 or 0...num_scales-1.
      train: whether dropout is on.

    Returns:
      An array shaped as `x`, in float32.
    """
    act = get_act(self.nonlinearity)
    remat = functools.partial(rematerialized, remat=self.remat, policy=self.remat_policy)
    rescale = functools.partial(layerspp.add_skip, rescale=self.skip_rescale)
    fir = {'fir': self.fir, 'fir_kernel': tuple(self.fir_kernel)}
    common = {
      'act': act,
      'dropout': self.dropout,
      'skip_rescale': self.skip_rescale,
      'init_scale': self.init_scale,
    }
    if self.resblock_type == 'ddpm':
      block = functools.partial(remat(layerspp.ResnetBlockDDPMpp), **common)
      conv = {'with_conv': self.resamp_with_conv}
      halve = lambda h, temb, train: layerspp.Downsample(**fir, **conv)(h)
      double = lambda h, temb, train: layerspp.Upsample(**fir, **conv)(h)
    else:
      block = functools.partial(remat(layerspp.ResnetBlockBigGANpp), **common, **fir)
      halve = lambda *args: block(down=True)(*args)
      double = lambda *args: block(up=True)(*args)
    attention = functools.partial(
      remat(layerspp.AttnBlockpp), skip_rescale=self.skip_rescale, init_scale=self.init_scale
    )
    levels = range(len(self.ch_mult))
    last = levels[-1]

    temb = self._embed(act, time_cond)
    if not self.centered:
      x = 2 * x - 1
    x = x.astype(compute_dtype(self.dtype))
    if temb is not None:
      temb = temb.astype(x.dtype)

    # Down: every feature map is kept for the way up.
    input_pyramid = x
    hs = [conv3x3(self.nf)(x)]
    for level in levels:
      for _ in range(self.num_res_blocks):
        h = block(features=self.nf * self.ch_mult[level])(hs[-1], temb, train)
        if h.shape[1] in self.attn_resolutions:
          h = attention()(h)
        hs.append(h)
      if level != last:
        h = halve(hs[-1], temb, train)
        if self.progressive_input == 'input_skip':
          input_pyramid = layerspp.Downsample(**fir)(input_pyramid)
          h = layerspp.Combine(self.progressive_combine)(input_pyramid, h)
        elif self.progressive_input == 'residual':
          shrink = layerspp.Downsample(features=h.shape[-1], with_conv=True, **fir)
          h = input_pyramid = rescale(shrink(input_pyramid), h)
        hs.append(h)

    h = block()(hs[-1], temb, train)
    h = attention()(h)
    h = block()(h, temb, train)

    # Up: the output pyramid, if the network has one, grows with the features.
    pyramid = None
    for level in reversed(levels):
      for _ in range(self.num_res_blocks + 1):
        h = jnp.concatenate([h, hs.pop()], axis=-1)
        h = block(features=self.nf * self.ch_mult[level])(h, temb, train)
      if h.shape[1] in self.attn_resolutions:
        h = attention()(h)
      if self.progressive == 'output_skip':
        image = conv3x3(self.num_channels, self.init_scale)(act(GroupNorm()(h)))
        pyramid = image if level == last else layerspp.Upsample(**fir)(pyramid) + image
      elif self.progressive == 'residual' and level == last:
        pyramid = conv3x3(h.shape[-1])(act(GroupNorm()(h)))
      elif self.progressive == 'residual':
        grow = layerspp.Upsample(features=h.shape[-1], with_conv=True, **fir)
        h = pyramid = rescale(grow(pyramid), h)
      if level != 0:
        h = double(h, temb, train)

    if self.progressive == 'output_skip':
      h = pyramid
    else:
      h = conv3x3(self.num_channels, self.init_scale)(act(GroupNorm()(h)))
    h = h.astype(jnp.float32)
    if self.scale_by_sigma:
      h = h / self._noise_level(time_cond)[:, None, None, None]
    return h

  def _embed(self, act: Activation, time_cond: TimeLabels) -> Embedding | None:
    """The time embedding, (B, 4 nf); None for an unconditional network."""
    if self.embedding_type == 'fourier':
      temb = GaussianFourierProjection(self.nf, self.fourier_scale)(jnp.log(time_cond))
    else:
      temb = get_timestep_embedding(time_cond, self.nf)
    if not self.conditional:
      return None
    temb = dense(self.nf * 4)(temb)
    return dense(self.nf * 4)(act(temb))

  def _noise_level(self, time_cond: TimeLabels) -> PerExample:
    """sigma, (B,): what it is conditioned on, or the discrete noise level of that number."""
    if self.embedding_type == 'fourier':
      return time_cond
    return sigma_of_label(
      time_cond, sigma_min=self.sigma_min, sigma_max=self.sigma_max, num_scales=self.num_scales
    )
