"""Layers that the networks share: initializers, embeddings, convolutions, attention.

Every layer computes in the dtype of its input. Parameters stay in single precision and are cast
where they are used; statistics of normalizations and the softmax are computed in single precision.
So a network computes in bfloat16 as soon as its image is in bfloat16.

References:
  Ho et al. 2020 (DDPM), "Denoising Diffusion Probabilistic Models",
    https://arxiv.org/abs/2006.11239.
  Lin et al. 2013, "Network In Network", https://arxiv.org/abs/1312.4400.
  Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency Functions in Low
    Dimensional Domains", https://arxiv.org/abs/2006.10739.
  Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762.
  Wu and He 2018, "Group Normalization", https://arxiv.org/abs/1803.08494.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from models import convolution
from runtime.array_types import Array, Embedding, FeatureMaps, PerExample, TimeLabels
from runtime.errors import UserError

AnyFloats = Float[Array, '...']
Activation = Callable[[AnyFloats], AnyFloats]

_ACTIVATIONS: dict[str, Activation] = {
  'elu': nn.elu,
  'relu': nn.relu,
  'lrelu': functools.partial(nn.leaky_relu, negative_slope=0.2),
  'swish': nn.swish,
}


def get_act(name: str) -> Activation:
  """The activation that `model.nonlinearity` names; the case does not matter.

  Raises:
    UserError: if no activation has this name.
  """
  if name.lower() not in _ACTIVATIONS:
    raise UserError(
      f'Unknown model.nonlinearity {name!r}: choose one of {", ".join(_ACTIVATIONS)}.'
    )
  return _ACTIVATIONS[name.lower()]


_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def compute_dtype(name: str) -> jnp.dtype:
  """The floating point type that `model.dtype` names.

  Raises:
    UserError: if the name is neither 'float32' nor 'bfloat16'.
  """
  if name not in _DTYPES:
    raise UserError(f'Unknown model.dtype {name!r}: choose one of {", ".join(_DTYPES)}.')
  return jnp.dtype(_DTYPES[name])


def in_dtype_of_input(
  x: AnyFloats, *params: AnyFloats | None, **kwargs: Any
) -> tuple[AnyFloats | None, ...]:
  """Casts parameters to the dtype of `x`; made for the argument `promote_dtype` of Flax's layers.

  Args:
    x: the input of the layer, of any shape.
    *params: its parameters; None for one that it does not have.
    **kwargs: ignored.

  Returns:
    `x` unchanged and the parameters.
  """
  del kwargs
  return x, *(None if param is None else param.astype(x.dtype) for param in params)


# What a rematerialized block keeps for the gradient.
_REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  'nothing': jax.checkpoint_policies.nothing_saveable,
  'products': jax.checkpoint_policies.save_only_these_names(convolution.PRODUCT),
}


def remat_policy(name: str) -> Callable[..., bool]:
  """The policy that `model.remat_policy` names.

  Raises:
    UserError: if the name is neither 'nothing' nor 'products'.
  """
  if name not in _REMAT_POLICIES:
    raise UserError(
      f'Unknown model.remat_policy {name!r}: choose one of {", ".join(_REMAT_POLICIES)}.'
    )
  return _REMAT_POLICIES[name]


def rematerialized(block: type[nn.Module], remat: bool, policy: str = 'nothing') -> type[nn.Module]:
  """Returns the class `block`, rematerialized if `remat` is set.

  A rematerialized block recomputes its intermediate values for the gradient instead of keeping
  them; with the policy 'products' it keeps the results of convolutions and attention, and
  recomputes only the cheap operations between them. The class keeps its name, since parameters
  are named after it. An argument `train` must be a Python bool.
  """
  if not remat:
    return block
  arguments = list(inspect.signature(block.__call__).parameters)
  static = tuple(i for i, name in enumerate(arguments) if name == 'train')
  wrapped = nn.remat(block, static_argnums=static, policy=remat_policy(policy))
  wrapped.__name__ = block.__name__
  return wrapped


def check_halvings(image_size: int, ch_mult: Sequence[int]) -> None:
  """Refuses images that cannot be halved between the resolutions of a U-Net.

  Raises:
    UserError: if `image_size` is not a multiple of 2^(len(ch_mult) - 1).
  """
  halvings = len(ch_mult) - 1
  if image_size % 2**halvings:
    raise UserError(
      f'data.image_size={image_size} cannot be halved {halvings} times, as the '
      f'{halvings + 1} entries of model.ch_mult={tuple(ch_mult)} require: '
      f'use a multiple of {2**halvings} or fewer entries.'
    )


def default_init(scale: float = 1.0) -> nn.initializers.Initializer:
  """DDPM's initializer: uniform with variance `scale` / (mean of fan in and fan out).

  A scale of 0 stands for 1e-10, which is almost zero.
  """
  return nn.initializers.variance_scaling(scale or 1e-10, 'fan_avg', 'uniform')


def conv3x3(features: int, init_scale: float = 1.0, stride: int = 1, **kwargs: Any) -> nn.Conv:
  """A 3x3 convolution with DDPM's initialization, from (B, H, W, C) to (B, H', W', features).

  Args:
    features: output channels.
    init_scale: see `default_init`.
    stride: H' is H / stride, rounded up, and W' likewise.
    **kwargs: further fields of `nn.Conv`.
  """
  return _conv(features, 3, init_scale, strides=(stride, stride), **kwargs)


def conv1x1(features: int, init_scale: float = 1.0, **kwargs: Any) -> nn.Conv:
  """A 1x1 convolution with DDPM's initialization; the arguments are those of `conv3x3`."""
  return _conv(features, 1, init_scale, **kwargs)


def _conv(features: int, size: int, init_scale: float, **kwargs: Any) -> nn.Conv:
  return nn.Conv(
    features,
    (size, size),
    kernel_init=default_init(init_scale),
    conv_general_dilated=convolution.conv_general_dilated,
    promote_dtype=in_dtype_of_input,
    **kwargs,
  )


def dense(features: int) -> nn.Dense:
  """A dense layer with DDPM's initialization, from (..., C) to (..., features)."""
  return nn.Dense(features, kernel_init=default_init(), promote_dtype=in_dtype_of_input)


class GroupNorm(nn.Module):
  """Group normalization (Wu and He 2018): (x - mean) / sqrt(variance + epsilon) scale + bias.

  Mean and variance are those of a group of channels over the pixels of one image; scale and bias
  are learned, one of each per channel. The sums over pixels come first and those over the channels
  of a group second, and the result is one multiply-add per pixel: several times faster on CPU than
  normalizing a regrouped array.

  Attributes:
    num_groups: number of groups; None makes at most 32 groups of at least 4 channels.
    epsilon: added to the variance.
  """

  num_groups: int | None = None
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: FeatureMaps) -> FeatureMaps:
    """Normalizes `x`, (B, H, W, C); the result has its shape and dtype.

    Raises:
      UserError: if the channels cannot be split into groups of one size.
    """
    channels = x.shape[-1]
    groups = self.num_groups or min(channels // 4, 32)
    if groups == 0 or channels % groups:
      raise UserError(
        f'Group normalization cannot split {channels} channels into {groups or 1} equal groups: '
        f'choose model.nf (and model.ch_mult) so that all widths up to 128 are multiples of 4 and '
        f'larger ones multiples of 32; a multiple of 32 for model.nf always works.'
      )
    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))

    pixels = x.astype(jnp.float32)
    mean = _group_means(pixels, groups)
    variance = jnp.maximum(_group_means(pixels**2, groups) - mean**2, 0.0)
    factor = scale[None] * jax.lax.rsqrt(variance + self.epsilon)
    offset = bias[None] - mean * factor
    return (pixels * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)


def _group_means(x: FeatureMaps, groups: int) -> Float[Array, 'B C']:
  """The means over the pixels of each group of channels, repeated for the channels of the group."""
  per_group = jnp.mean(x, axis=(1, 2)).reshape(x.shape[0], groups, -1)
  means = jnp.mean(per_group, axis=-1, keepdims=True)
  return jnp.broadcast_to(means, per_group.shape).reshape(x.shape[0], x.shape[-1])


class NIN(nn.Module):
  """A linear map of the channels, the same at every pixel ("network in network").

  Attributes:
    features: output channels.
    init_scale: scale of the initializer of the matrix; see `default_init`.
  """

  features: int
  init_scale: float = 0.1

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B H W {self.features}']:
    """Maps (B, H, W, C) to (B, H, W, features)."""
    shape = (x.shape[-1], self.features)
    W = self.param('W', default_init(self.init_scale), shape)
    b = self.param('b', nn.initializers.zeros, (self.features,))
    x, W, b = in_dtype_of_input(x, W, b)
    return convolution.conv_general_dilated(x, W[None, None]) + b[None, None, None]


def get_timestep_embedding(
  timesteps: TimeLabels, embedding_dim: int, max_positions: int = 10000
) -> Float[Array, 'B {embedding_dim}']:
  """The sinusoidal embedding of Transformers (Vaswani et al. 2017), sines first.

  With n = embedding_dim // 2 the frequencies are max_positions^(-i / (n - 1)), i = 0...n-1.

  Args:
    timesteps: (B,), typically in 0...999.
    embedding_dim: length of an embedding; if it is odd, the last entry is zero.
    max_positions: the inverse of the lowest frequency.

  Returns:
    The embeddings, (B, embedding_dim).
  """
  half = embedding_dim // 2
  frequencies = np.exp(-np.log(max_positions) / (half - 1) * np.arange(half)).astype(np.float32)
  angles = timesteps[:, None].astype(jnp.float32) * frequencies[None]
  embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  return jnp.pad(embedding, ((0, 0), (0, embedding_dim % 2)))


def sigma_of_label(
  labels: TimeLabels, *, sigma_min: float, sigma_max: float, num_scales: int
) -> PerExample:
  """The noise level sigma of a given number, out of a geometric progression.

  sigma_i = sigma_max (sigma_min / sigma_max)^(i / (num_scales - 1)) for i = 0...num_scales-1.

  Args:
    labels: i, (B,); fractions are cut off.
    sigma_min: the last noise level, in units of the scaled data.
    sigma_max: the first one.
    num_scales: number of noise levels.

  Returns:
    sigma, (B,), in units of the scaled data.
  """
  sigmas = np.geomspace(sigma_max, sigma_min, num_scales, dtype=np.float32)
  return jnp.asarray(sigmas)[labels.astype(jnp.int32)]


class GaussianFourierProjection(nn.Module):
  """Random Fourier features (Tancik et al. 2020): sin(2 pi W x) and cos(2 pi W x).

  The frequencies W are drawn once, stored among the parameters, and never trained.

  Attributes:
    embedding_size: number of frequencies.
    scale: their standard deviation.
  """

  embedding_size: int
  scale: float

  @nn.compact
  def __call__(self, x: PerExample) -> Embedding:
    """Embeds `x`, (B,), typically log(sigma), as (B, 2 embedding_size), sines first."""
    W = self.param('W', nn.initializers.normal(self.scale), (self.embedding_size,))
    angles = x[:, None] * jax.lax.stop_gradient(W)[None] * 2 * np.pi
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def is_frequency(path: tuple[Any, ...], x: AnyFloats | jax.ShapeDtypeStruct) -> bool:
  """Whether a parameter holds Fourier frequencies: a vector named `W`; that of `NIN` is a matrix.

  Args:
    path: of the parameter in its tree, as `jax.tree_util.tree_map_with_path` gives it.
    x: the parameter, of any shape.
  """
  return getattr(path[-1], 'key', None) == 'W' and x.ndim == 1


def spatial_attention(q: FeatureMaps, k: FeatureMaps, v: FeatureMaps) -> FeatureMaps:
  """Single-head attention over all pixels, softmax(q k^T / sqrt(C)) v.

  The pixels are the rows of the three matrices. Two batched matrix products are what every backend
  does best.

  Args:
    q: queries, (B, H, W, C).
    k: keys, shaped as `q`.
    v: values, shaped as `q`.

  Returns:
    An array shaped as `v`, and of its dtype.
  """
  shape = v.shape
  q, k, v = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in (q, k, v))
  logits = jnp.matmul(q, k.swapaxes(1, 2), preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits * shape[-1] ** -0.5, axis=-1).astype(v.dtype)
  return checkpoint_name(jnp.matmul(weights, v), convolution.PRODUCT).reshape(shape)
