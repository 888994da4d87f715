"""Normalizations of NCSN and NCSNv2: of each channel over the pixels of one image.

NCSN: Song and Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution",
https://arxiv.org/abs/1907.05600.

Statistics are computed in single precision, whatever the dtype of the input. In the formulas mu and
sigma are the mean and the standard deviation of each channel of each image over its pixels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from models.layers import GroupNorm
from runtime.array_types import Array, FeatureMaps, RandomKey
from runtime.errors import UserError

_EPSILON = 1e-5


def _standardize(x: FeatureMaps, axes: tuple[int, ...]) -> FeatureMaps:
  mean = jnp.mean(x, axes, keepdims=True)
  variance = jnp.var(x, axes, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(variance + _EPSILON)


def _near_one(
  rng: RandomKey, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Float[Array, '...']:
  return 1 + 0.02 * jax.random.normal(rng, shape, dtype)


def _scales_and_shifts(
  rng: RandomKey, shape: tuple[int, int], dtype: Any = jnp.float32
) -> Float[Array, 'levels scales_and_shifts']:
  """Two thirds of the columns near one, for gamma and alpha, and zeros for beta."""
  levels, channels = shape[0], shape[1] // 3
  scales = _near_one(rng, (levels, 2 * channels), dtype)
  return jnp.concatenate([scales, jnp.zeros((levels, channels), dtype)], axis=-1)


class InstanceNorm2d(nn.Module):
  """gamma (x - mu) / sigma + beta."""

  @nn.compact
  def __call__(self, x: FeatureMaps) -> FeatureMaps:
    """Normalizes `x`, (B, H, W, C); the result has its shape and dtype."""
    shape = (1, 1, 1, x.shape[-1])
    gamma = self.param('scale', nn.initializers.ones, shape)
    beta = self.param('bias', nn.initializers.zeros, shape)
    h = _standardize(x.astype(jnp.float32), (1, 2))
    return (gamma * h + beta).astype(x.dtype)


class VarianceNorm2d(nn.Module):
  """alpha x / sigma, which keeps the mean of each channel that instance normalization removes."""

  @nn.compact
  def __call__(self, x: FeatureMaps) -> FeatureMaps:
    """Normalizes `x`, (B, H, W, C); the result has its shape and dtype."""
    alpha = self.param('scale', _near_one, (1, 1, 1, x.shape[-1]))
    h = x.astype(jnp.float32)
    variance = jnp.var(h, (1, 2), keepdims=True)
    return (alpha * h * jax.lax.rsqrt(variance + _EPSILON)).astype(x.dtype)


def _instance_norm_plus(x: FeatureMaps) -> tuple[FeatureMaps, Float[Array, 'B 1 1 C']]:
  """(x - mu) / sigma, and the means mu standardized over the channels, (B, 1, 1, C)."""
  h = x.astype(jnp.float32)
  means = jnp.mean(h, (1, 2), keepdims=True)
  return _standardize(h, (1, 2)), _standardize(means, (3,))


class InstanceNorm2dPlus(nn.Module):
  """Instance normalization++ (Song and Ermon 2019, appendix A).

  gamma ((x - mu) / sigma + alpha (mu - m) / v) + beta, where m and v are the mean and the standard
  deviation of mu over the channels of an image.
  """

  @nn.compact
  def __call__(self, x: FeatureMaps) -> FeatureMaps:
    """Normalizes `x`, (B, H, W, C); the result has its shape and dtype."""
    shape = (1, 1, 1, x.shape[-1])
    alpha = self.param('alpha', _near_one, shape)
    gamma = self.param('gamma', _near_one, shape)
    beta = self.param('beta', nn.initializers.zeros, shape)
    h, means = _instance_norm_plus(x)
    return (gamma * (h + alpha * means) + beta).astype(x.dtype)


class ConditionalInstanceNorm2dPlus(nn.Module):
  """Instance normalization++ with alpha, beta and gamma looked up by noise level.

  Attributes:
    num_classes: number of noise levels.
  """

  num_classes: int

  @nn.compact
  def __call__(self, x: FeatureMaps, y: Int[Array, ' B']) -> FeatureMaps:
    """Normalizes `x`, (B, H, W, C), by the number of its noise level, `y`, (B,)."""
    channels = x.shape[-1]
    embedding = nn.Embed(self.num_classes, 3 * channels, embedding_init=_scales_and_shifts)(y)
    gamma, alpha, beta = jnp.split(embedding[:, None, None], 3, axis=-1)
    h, means = _instance_norm_plus(x)
    return (gamma * (h + alpha * means) + beta).astype(x.dtype)


_NORMALIZATIONS: dict[str, type[nn.Module]] = {
  'InstanceNorm': InstanceNorm2d,
  'InstanceNorm++': InstanceNorm2dPlus,
  'VarianceNorm': VarianceNorm2d,
  'GroupNorm': GroupNorm,
}


def get_normalization(name: str) -> type[nn.Module]:
  """The unconditional normalization that `model.normalization` names.

  Raises:
    UserError: if no normalization has this name.
  """
  if name not in _NORMALIZATIONS:
    raise UserError(
      f'Unknown model.normalization {name!r}: choose one of {", ".join(_NORMALIZATIONS)}.'
    )
  return _NORMALIZATIONS[name]
