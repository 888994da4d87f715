"""Resampling by two, with or without an anti-aliasing FIR filter.

The filters are those of StyleGAN2 (Karras et al. 2020). All of them are separable, so each axis is
filtered in turn as a sum of shifted slices: memory bound at worst, and fast forward and backward on
every backend, where a depthwise convolution is not.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models import convolution

FirKernel = Sequence[float]


def _upfirdn_axis(
  x: jax.Array, taps: np.ndarray, axis: int, up: int, down: int, pad: tuple[int, int]
) -> jax.Array:
  """Up-samples by zero insertion, pads, filters and keeps every `down`-th sample along one axis.

  y[n] = sum_k taps[-1 - k] z[n down + k], where z is the padded, zero-stuffed x. Only `up` or
  `down` may differ from 1.
  """
  length = x.shape[axis]
  size = (length * up + sum(pad) - len(taps)) // down + 1
  # A tap meets a sample only where its position in z is a multiple of `up`: one phase of the output
  # at a time, each a plain filter of x.
  count = -(-size // up)
  phases = []
  for phase in range(up):
    reach = [(phase + k - pad[0], tap) for k, tap in enumerate(taps[::-1])]
    shifts = [(offset // up, tap) for offset, tap in reach if offset % up == 0]
    low = max(0, -min(shift for shift, _ in shifts))
    high = max(0, max(shift for shift, _ in shifts) + (count - 1) * down + 1 - length)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (low, high)
    padded = jnp.pad(x, widths)
    phases.append(
      sum(
        tap.astype(x.dtype)
        * lax.slice_in_dim(padded, low + s, low + s + (count - 1) * down + 1, down, axis)
        for s, tap in shifts
      )
    )
  if up == 1:
    return phases[0]
  shape = (*x.shape[:axis], count * up, *x.shape[axis + 1 :])
  interleaved = jnp.stack(phases, axis=axis + 1).reshape(shape)
  return lax.slice_in_dim(interleaved, 0, size, axis=axis)


def upfirdn_2d(
  x: jax.Array,
  kernel: FirKernel,
  up: int = 1,
  down: int = 1,
  pad: tuple[int, int] = (0, 0),
  gain: float = 1.0,
) -> jax.Array:
  """Zero insertion by `up`, padding, FIR filtering, decimation by `down`, along both image axes.

  Args:
    x: (B, H, W, C).
    kernel: the taps of one axis, normalized here.
    up: up-sampling factor.
    down: down-sampling factor.
    pad: zeros before and after, in samples of the up-sampled grid.
    gain: sum of the taps; 2 makes up for the zeros of an up-sampled grid.
  """
  taps = np.asarray(kernel, np.float32)
  taps = taps / taps.sum() * np.float32(gain)
  for axis in (1, 2):
    x = _upfirdn_axis(x, taps, axis, up, down, pad)
  return x


def upsample_2d(x: jax.Array, kernel: FirKernel) -> jax.Array:
  """Doubles height and width, filtering the zero-stuffed image with `kernel`."""
  p = len(kernel) - 2
  return upfirdn_2d(x, kernel, up=2, pad=((p + 1) // 2 + 1, p // 2), gain=2)


def downsample_2d(x: jax.Array, kernel: FirKernel) -> jax.Array:
  """Halves height and width after filtering with `kernel`."""
  p = len(kernel) - 2
  return upfirdn_2d(x, kernel, down=2, pad=((p + 1) // 2, p // 2))


def naive_upsample_2d(x: jax.Array) -> jax.Array:
  """Doubles height and width by repetition."""
  batch, height, width, channels = x.shape
  repeated = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
  return repeated.reshape(batch, 2 * height, 2 * width, channels)


def naive_downsample_2d(x: jax.Array) -> jax.Array:
  """Halves height and width by averaging 2x2 blocks."""
  batch, height, width, channels = x.shape
  return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


class Conv2d(nn.Module):
  """A 3x3 convolution fused with FIR resampling by two, as in StyleGAN2.

  Attributes:
    features: output channels.
    up: up-sample: transposed convolution of stride 2, then the filter.
    down: down-sample: the filter, then a convolution of stride 2.
    fir_kernel: taps of the filter.
    kernel_init: initializer of `weight`, (3, 3, C_in, C_out).
  """

  features: int
  up: bool = False
  down: bool = False
  fir_kernel: FirKernel = (1, 3, 3, 1)
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    weight = self.param('weight', self.kernel_init, (3, 3, x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    weight, bias = weight.astype(x.dtype), bias.astype(x.dtype)
    taps = len(self.fir_kernel)
    if self.up:
      x = convolution.conv_general_dilated(x, weight, padding=((2, 2), (2, 2)), lhs_dilation=(2, 2))
      p = taps - 4
      x = upfirdn_2d(x, self.fir_kernel, pad=((p + 1) // 2 + 1, p // 2 + 1), gain=2)
    elif self.down:
      p = taps
      x = upfirdn_2d(x, self.fir_kernel, pad=((p + 1) // 2, p // 2))
      x = convolution.conv_general_dilated(x, weight, (2, 2), 'VALID')
    else:
      x = convolution.conv_general_dilated(x, weight)
    return x + bias
