"""Convolutions (NHWC, HWIO) whose gradients are fast on every backend, also inside loops.

XLA on CPU computes the weight gradient of a small convolution at a tenth of the speed of a matrix
product, and both gradients many times slower still inside a compiled loop
(https://github.com/jax-ml/jax/issues/12868). Here the input gradient is written as the forward
convolution that it is, and on CPU the weight gradient as matrix products over the patches of a few
images at a time, which stay in cache. Other backends keep their own weight gradient.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSION_NUMBERS = ('NHWC', 'HWIO', 'NHWC')
_PATCH_BYTES = 2**21  # of one group of images in the weight gradient; larger falls out of cache


def conv_general_dilated(
  x: jax.Array,
  kernel: jax.Array,
  window_strides: Sequence[int] = (1, 1),
  padding: str | Sequence[tuple[int, int]] = 'SAME',
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  **kwargs: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated` for NHWC and HWIO; give it to `flax.linen.Conv`.

  Odd kernels at stride 1 get the gradients of this module, 1x1 kernels as matrix products in both
  directions; everything else goes to XLA unchanged.
  """
  plain = (
    padding == 'SAME'
    and all(n % 2 for n in kernel.shape[:2])
    and set(window_strides) == {1}
    and set(lhs_dilation or (1,)) == {1}
    and kwargs.get('feature_group_count', 1) == 1
  )
  if plain:
    return _conv(x, kernel, tuple(rhs_dilation or (1, 1)))
  kwargs.setdefault('dimension_numbers', _DIMENSION_NUMBERS)
  return lax.conv_general_dilated(
    x, kernel, window_strides, padding, lhs_dilation, rhs_dilation, **kwargs
  )


def _forward(x: jax.Array, kernel: jax.Array, dilation: tuple[int, int]) -> jax.Array:
  """Convolution at stride 1 with an odd kernel and 'SAME' padding."""
  if kernel.shape[:2] == (1, 1):
    return jnp.matmul(x, kernel[0, 0])
  return lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', rhs_dilation=dilation, dimension_numbers=_DIMENSION_NUMBERS
  )


def _conv_fwd(x, kernel, dilation):
  return _forward(x, kernel, dilation), (x, kernel)


def _conv_bwd(dilation, residuals, dy):
  x, kernel = residuals
  dx = _conv(dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), dilation)
  dkernel = lax.platform_dependent(
    x,
    dy,
    cpu=functools.partial(_weight_grad_cpu, kernel=kernel, dilation=dilation),
    default=functools.partial(_weight_grad_xla, kernel=kernel, dilation=dilation),
  )
  return dx, dkernel


_conv = jax.custom_vjp(_forward, nondiff_argnums=(2,))
_conv.defvjp(_conv_fwd, _conv_bwd)


def _weight_grad_xla(x, dy, kernel, dilation):
  return jax.linear_transpose(lambda kernel: _forward(x, kernel, dilation), kernel)(dy)[0]


def _weight_grad_cpu(x, dy, kernel, dilation):
  """Sum over groups of images of patches^T dy, the patches of one group made at a time."""
  batch, height, width, channels = x.shape
  kernel_h, kernel_w = kernel.shape[:2]
  pads = tuple((d * (n // 2),) * 2 for d, n in zip(dilation, (kernel_h, kernel_w), strict=True))

  def patches_of(x):  # (g, H, W, C) -> (g H W, kh kw C)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    taps = [
      x[:, i * dilation[0] :][:, :height, j * dilation[1] :][:, :, :width]
      for i in range(kernel_h)
      for j in range(kernel_w)
    ]
    return jnp.concatenate(taps, axis=-1).reshape(-1, kernel_h * kernel_w * channels)

  def accumulate(total, group):
    x, dy = group
    dy = dy.reshape(-1, dy.shape[-1])
    return total + jnp.matmul(patches_of(x).T, dy, preferred_element_type=total.dtype), None

  bytes_per_image = height * width * kernel_h * kernel_w * channels * x.dtype.itemsize
  devices = jax.device_count()
  size = _group_size(batch, max(1, _PATCH_BYTES // bytes_per_image, devices))

  def group(a):
    if devices == 1:
      return a.reshape(batch // size, size, *a.shape[1:])
    # A batch that is split over devices in contiguous blocks: a group takes every (batch / size)-th
    # image, so that each device has its share of each group.
    return jnp.moveaxis(a.reshape(size, batch // size, *a.shape[1:]), 1, 0)

  zero = jnp.zeros((kernel_h * kernel_w * channels, dy.shape[-1]), jnp.float32)
  total, _ = lax.scan(accumulate, zero, (group(x), group(dy)))
  return total.reshape(kernel.shape).astype(kernel.dtype)


def _group_size(batch: int, limit: int) -> int:
  """The largest divisor of `batch` that is at most `limit`."""
  return max(n for n in range(1, min(batch, limit) + 1) if batch % n == 0)
