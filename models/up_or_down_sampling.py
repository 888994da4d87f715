"""Resampling by two, with or without an anti-aliasing FIR filter.

The filters are those of StyleGAN2 (Karras et al. 2020, "Analyzing and Improving the Image Quality
of StyleGAN", https://arxiv.org/abs/1912.04958). All of them are separable, so each axis is filtered
in turn as a sum of shifted slices: memory bound at worst, and fast forward and backward on every
backend, where a depthwise convolution is not.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from models import convolution
from runtime.array_types import Array, FeatureMaps

FirKernel = Sequence[float] | Float[np.ndarray, ' taps']


def _upfirdn_axis(
  x: Float[Array, '...'],
  taps: Float[np.ndarray, ' taps'],
  axis: int,
  *,
  up: int,
  down: int,
  pad: tuple[int, int],
) -> Float[Array, '...']:
  """Up-samples by zero insertion, pads, filters and keeps every `down`-th sample along one axis.

  y[n] = sum_k taps[-1 - k] z[n down + k], where z is the padded, zero-stuffed x. Only `up` or
  `down` may differ from 1.
  """
  length = x.shape[axis]
  size = (length * up + sum(pad) - len(taps)) // down + 1
  # All but one in `up` samples of z are zeros, which would be stored, read and multiplied for
  # nothing. A tap meets a sample of x only where its position in z is a multiple of `up`, and which
  # taps those are depends on n only through the phase, n modulo `up`. So each phase of the output
  # is a plain filter of x with its own subset of the taps, and z is never built.
  count = -(-size // up)  # outputs of a phase; the last phases may have one too many
  phases = []
  for phase in range(up):
    # The tap k of output n = up q + phase is at up q + offset in the unpadded z, so at q + shift
    # in x. With up = 1 there is one phase, and q advances by `down` samples at a time.
    reach = [(phase + k - pad[0], tap) for k, tap in enumerate(taps[::-1])]
    shifts = [(offset // up, tap) for offset, tap in reach if offset % up == 0]
    # x is padded only as far as this phase reads beyond its ends.
    low = max(0, -min(shift for shift, _ in shifts))
    high = max(0, max(shift for shift, _ in shifts) + (count - 1) * down + 1 - length)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (low, high)
    padded = jnp.pad(x, widths)
    # The stride of the slices is the decimation: samples that are dropped are never computed.
    phases.append(
      sum(
        tap.astype(x.dtype)
        * lax.slice_in_dim(padded, low + s, low + s + (count - 1) * down + 1, down, axis)
        for s, tap in shifts
      )
    )
  if up == 1:
    return phases[0]
  # Stacked behind the axis and merged with it, the phases interleave as n = up q + phase.
  shape = (*x.shape[:axis], count * up, *x.shape[axis + 1 :])
  interleaved = jnp.stack(phases, axis=axis + 1).reshape(shape)
  return lax.slice_in_dim(interleaved, 0, size, axis=axis)


def upfirdn_2d(
  x: FeatureMaps,
  kernel: FirKernel,
  *,
  up: int = 1,
  down: int = 1,
  pad: tuple[int, int] = (0, 0),
  gain: float = 1.0,
) -> Float[Array, 'B height width C']:
  """Zero insertion by `up`, padding, FIR filtering and decimation by `down` along both image axes.

  Along each axis y[n] = sum_k taps[-1 - k] z[n down + k], where z is the padded, zero-stuffed x:
  from a length L to (L up + sum(pad) - len(kernel)) // down + 1.

  Args:
    x: (B, H, W, C).
    kernel: the taps of one axis, of any sum; they are normalized to the sum `gain`.
    up: the up-sampling factor; only one of `up` and `down` may differ from 1.
    down: the down-sampling factor.
    pad: zeros before and after, in samples of the up-sampled grid.
    gain: the sum of the taps; 2 makes up for the zeros of an up-sampled grid.
  """
  taps = np.asarray(kernel, np.float32)
  taps = taps / taps.sum() * np.float32(gain)
  for axis in (1, 2):
    x = _upfirdn_axis(x, taps, axis, up=up, down=down, pad=pad)
  return x


# Below, the padding follows from the wanted length: of L' samples K taps leave L' - K + 1. Where it
# cannot be halved, the odd zero comes first, as in StyleGAN2.


def upsample_2d(x: FeatureMaps, kernel: FirKernel) -> Float[Array, 'B 2*H 2*W C']:
  """Doubles height and width of (B, H, W, C), filtering the zero-stuffed image with `kernel`."""
  # K - 1 zeros keep the 2 L samples. For even K one more is in front, which centres output n on
  # n - 1/2 of the up-sampled grid: the two outputs of a pixel lie a quarter pixel to its two sides.
  p = len(kernel) - 2
  # Every second sample is zero, so taps of sum 1 would halve a constant image.
  return upfirdn_2d(x, kernel, up=2, pad=((p + 1) // 2 + 1, p // 2), gain=2)


def downsample_2d(x: FeatureMaps, kernel: FirKernel) -> Float[Array, 'B H//2 W//2 C']:
  """Halves height and width of (B, H, W, C), both even, after filtering with `kernel`."""
  # K - 2 zeros leave every second of L - 1 samples. For even K, half of them on each side centre an
  # output on the middle of the pair of samples that it replaces.
  p = len(kernel) - 2
  return upfirdn_2d(x, kernel, down=2, pad=((p + 1) // 2, p // 2))


def naive_upsample_2d(x: FeatureMaps) -> Float[Array, 'B 2*H 2*W C']:
  """Doubles height and width of (B, H, W, C) by repetition."""
  batch, height, width, channels = x.shape
  repeated = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
  return repeated.reshape(batch, 2 * height, 2 * width, channels)


def naive_downsample_2d(x: FeatureMaps) -> Float[Array, 'B H//2 W//2 C']:
  """Halves height and width of (B, H, W, C), both even, by averaging 2x2 blocks."""
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
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B height width {self.features}']:
    """Maps (B, H, W, C) to (B, H', W', features).

    H' and W' are H and W, doubled with `up` and halved with `down`.
    """
    weight = self.param('weight', self.kernel_init, (3, 3, x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    weight, bias = weight.astype(x.dtype), bias.astype(x.dtype)
    taps = len(self.fir_kernel)
    if self.up:
      # The stride of a transposed convolution dilates its input, from L to 2 L - 1 samples. Padded
      # by two on both sides, so that every sample meets every tap, 2 L + 1 come out. That is the
      # zero insertion of `upsample_2d`, hence the gain. With K - 2 zeros the filter leaves 2 L.
      x = convolution.conv_general_dilated(x, weight, padding=((2, 2), (2, 2)), lhs_dilation=(2, 2))
      p = taps - 4
      x = upfirdn_2d(x, self.fir_kernel, pad=((p + 1) // 2 + 1, p // 2 + 1), gain=2)
    elif self.down:
      # The filter comes first, since decimation is what aliases. K zeros leave L + 1 samples, from
      # which an unpadded 3x3 convolution of stride 2 makes L / 2.
      p = taps
      x = upfirdn_2d(x, self.fir_kernel, pad=((p + 1) // 2, p // 2))
      x = convolution.conv_general_dilated(x, weight, (2, 2), 'VALID')
    else:
      x = convolution.conv_general_dilated(x, weight)
    return x + bias[None, None, None]
