"""Layers that the networks share: initializers, embeddings, convolutions, attention.

Every layer computes in the dtype of its input. Parameters stay in single precision and are cast
where they are used; statistics of normalizations and the softmax are computed in single precision.
So a network is in bfloat16 as soon as its image is.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import convolution
from runtime.errors import UserError

Activation = Callable[[jax.Array], jax.Array]

_ACTIVATIONS: dict[str, Activation] = {
  'elu': nn.elu,
  'relu': nn.relu,
  'lrelu': functools.partial(nn.leaky_relu, negative_slope=0.2),
  'swish': nn.swish,
}


def get_act(name: str) -> Activation:
  """The activation that `model.nonlinearity` names.

  Raises:
    UserError: for an unknown name.
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
    UserError: for an unknown name.
  """
  if name not in _DTYPES:
    raise UserError(f'Unknown model.dtype {name!r}: choose one of {", ".join(_DTYPES)}.')
  return jnp.dtype(_DTYPES[name])


def in_dtype_of_input(x: jax.Array, *params: jax.Array | None, **kwargs) -> tuple:
  """Casts parameters to the dtype of `x`; as `promote_dtype` of Flax's layers."""
  del kwargs
  return x, *(None if param is None else param.astype(x.dtype) for param in params)


def rematerialized(block: type[nn.Module], remat: bool) -> type[nn.Module]:
  """The class `block` with or without rematerialization.

  With it, what a block computes inside is not kept for the gradient but computed again. The class
  keeps its name, which parameters are named after; an argument `train` must be a Python bool.
  """
  if not remat:
    return block
  arguments = list(inspect.signature(block.__call__).parameters)
  static = tuple(i for i, name in enumerate(arguments) if name == 'train')
  wrapped = nn.remat(block, static_argnums=static)
  wrapped.__name__ = block.__name__
  return wrapped


def check_halvings(image_size: int, ch_mult: Sequence[int]) -> None:
  """Raises `UserError` unless images can be halved between the resolutions of a U-Net."""
  halvings = len(ch_mult) - 1
  if image_size % 2**halvings:
    raise UserError(
      f'data.image_size={image_size} cannot be halved {halvings} times, as the '
      f'{halvings + 1} entries of model.ch_mult={tuple(ch_mult)} ask: '
      f'use a multiple of {2**halvings} or fewer entries.'
    )


def default_init(scale: float = 1.0) -> nn.initializers.Initializer:
  """DDPM's initializer: uniform, variance `scale` / mean of fan in and out; 0 means almost zero."""
  return nn.initializers.variance_scaling(scale or 1e-10, 'fan_avg', 'uniform')


def conv3x3(features: int, init_scale: float = 1.0, stride: int = 1, **kwargs) -> nn.Conv:
  """A 3x3 convolution with DDPM's initialization."""
  return _conv(features, 3, init_scale, strides=(stride, stride), **kwargs)


def conv1x1(features: int, init_scale: float = 1.0, **kwargs) -> nn.Conv:
  """A 1x1 convolution with DDPM's initialization."""
  return _conv(features, 1, init_scale, **kwargs)


def _conv(features: int, size: int, init_scale: float, **kwargs) -> nn.Conv:
  return nn.Conv(
    features,
    (size, size),
    kernel_init=default_init(init_scale),
    conv_general_dilated=convolution.conv_general_dilated,
    promote_dtype=in_dtype_of_input,
    **kwargs,
  )


def dense(features: int) -> nn.Dense:
  """A dense layer with DDPM's initialization."""
  return nn.Dense(features, kernel_init=default_init(), promote_dtype=in_dtype_of_input)


class GroupNorm(nn.Module):
  """Group normalization (Wu and He 2018).

  Sums over pixels come first and sums over the channels of a group second, and the result is one
  multiply-add per pixel: several times faster on CPU than normalizing a regrouped array.

  Attributes:
    num_groups: None makes at most 32 groups of at least 4 channels.
    epsilon: added to the variance.
  """

  num_groups: int | None = None
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, channels = x.shape[0], x.shape[-1]
    groups = self.num_groups or min(channels // 4, 32)
    if groups == 0 or channels % groups:
      raise UserError(
        f'Group normalization cannot split {channels} channels into {groups or 1} groups: choose '
        f'model.nf (and model.ch_mult) so that all widths up to 128 are multiples of 4 and larger '
        f'ones multiples of 32; a multiple of 32 for model.nf always works.'
      )
    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))

    def group_mean(per_pixel):  # (B, H, W, C) -> (B, C), equal within a group
      per_group = jnp.mean(per_pixel, axis=(1, 2)).reshape(batch, groups, -1)
      mean = jnp.mean(per_group, axis=-1, keepdims=True)
      return jnp.broadcast_to(mean, per_group.shape).reshape(batch, channels)

    pixels = x.astype(jnp.float32)
    mean = group_mean(pixels)
    variance = jnp.maximum(group_mean(pixels**2) - mean**2, 0.0)
    factor = scale * jax.lax.rsqrt(variance + self.epsilon)
    offset = bias - mean * factor
    return (pixels * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)


class NIN(nn.Module):
  """A linear map of the channels ("network in network").

  Attributes:
    features: output channels.
    init_scale: scale of the initializer.
  """

  features: int
  init_scale: float = 0.1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self.features)
    W = self.param('W', default_init(self.init_scale), shape)
    b = self.param('b', nn.initializers.zeros, (self.features,))
    x, W, b = in_dtype_of_input(x, W, b)
    return convolution.conv_general_dilated(x, W[None, None]) + b


def get_timestep_embedding(
  timesteps: jax.Array, embedding_dim: int, max_positions: int = 10000
) -> jax.Array:
  """The sinusoidal embedding of Transformers: (B,) to (B, embedding_dim), sines first."""
  half = embedding_dim // 2
  frequencies = np.exp(-np.log(max_positions) / (half - 1) * np.arange(half)).astype(np.float32)
  angles = timesteps[:, None].astype(jnp.float32) * frequencies[None]
  embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  return jnp.pad(embedding, ((0, 0), (0, embedding_dim % 2)))


def sigma_of_label(
  labels: jax.Array, sigma_min: float, sigma_max: float, num_scales: int
) -> jax.Array:
  """sigma, (B,): of `num_scales` in geometric progression, of which label 0 is the largest."""
  sigmas = np.geomspace(sigma_max, sigma_min, num_scales, dtype=np.float32)
  return jnp.asarray(sigmas)[labels.astype(jnp.int32)]


class GaussianFourierProjection(nn.Module):
  """Random Fourier features of the noise level: (B,) to (B, 2 embedding_size).

  The frequencies are drawn once, stored among the parameters, and never trained.

  Attributes:
    embedding_size: number of frequencies.
    scale: their standard deviation.
  """

  embedding_size: int
  scale: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    W = self.param('W', nn.initializers.normal(self.scale), (self.embedding_size,))
    angles = x[:, None] * jax.lax.stop_gradient(W)[None] * 2 * np.pi
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def is_frequency(path: tuple[Any, ...], x: jax.Array) -> bool:
  """Whether a parameter holds Fourier frequencies: a vector `W`; that of `NIN` is a matrix."""
  return getattr(path[-1], 'key', None) == 'W' and x.ndim == 1


def spatial_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Single-head softmax attention over all pixels; each argument is (B, H, W, C).

  Written as two batched matrix products, which is what every backend does best.
  """
  shape = v.shape
  q, k, v = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in (q, k, v))
  logits = jnp.matmul(q, k.swapaxes(1, 2), preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits * shape[-1] ** -0.5, axis=-1).astype(v.dtype)
  return jnp.matmul(weights, v).reshape(shape)
