"""Convolutions (NHWC, HWIO) whose gradients are fast on every backend, also inside loops.

XLA on CPU computes the weight gradient of a small convolution at a tenth of the speed of a matrix
product, and inside a compiled loop both gradients are many times slower still
(https://github.com/jax-ml/jax/issues/12868). Here the weight gradient on CPU is written as matrix
products over the patches of a few images at a time, which stay in cache. Other backends keep XLA's
gradient. Forward-mode derivatives work too, and cost two convolutions.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, linear_call
from jaxtyping import Float

from runtime import parallelism
from runtime.array_types import Array, FeatureMaps

Kernel = Float[Array, 'h w I O']
Dilation = tuple[int, int]

PRODUCT = 'product'  # the name of a result that is costly to recompute, for rematerialization
_DIMENSION_NUMBERS = ('NHWC', 'HWIO', 'NHWC')
# Of one group of images in the weight gradient: more bytes would leave the cache, and fewer rows
# would make too short a matrix product.
_PATCH_BYTES = 2**19
_PATCH_ROWS = 128


def conv_general_dilated(
  x: FeatureMaps,
  kernel: Kernel,
  window_strides: Sequence[int] = (1, 1),
  padding: str | Sequence[tuple[int, int]] = 'SAME',
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  **kwargs: Any,
) -> Float[Array, 'B height width O']:
  """Convolves as `jax.lax.conv_general_dilated` does for NHWC and HWIO; made for `flax.linen.Conv`.

  Odd kernels at stride 1 with padding 'SAME' get the gradients of this module; everything else goes
  to XLA unchanged.

  Args:
    x: (B, H, W, C).
    kernel: (h, w, I, O), I being C over the number of feature groups.
    window_strides: along height and width.
    padding: as XLA's.
    lhs_dilation: of `x`.
    rhs_dilation: of the kernel.
    **kwargs: further arguments of `jax.lax.conv_general_dilated`.

  Returns:
    (B, height, width, O).
  """
  plain = (
    padding == 'SAME'
    and all(n % 2 for n in kernel.shape[:2])
    and set(window_strides) == {1}
    and set(lhs_dilation or (1,)) == {1}
    and kwargs.get('feature_group_count', 1) == 1
  )
  if plain:
    return checkpoint_name(_conv(x, kernel, tuple(rhs_dilation or (1, 1))), PRODUCT)
  kwargs.setdefault('dimension_numbers', _DIMENSION_NUMBERS)
  y = lax.conv_general_dilated(
    x, kernel, window_strides, padding, lhs_dilation, rhs_dilation, **kwargs
  )
  return checkpoint_name(y, PRODUCT)


def _forward(x: FeatureMaps, kernel: Kernel, dilation: Dilation) -> Float[Array, 'B H W O']:
  """Convolution at stride 1 with an odd kernel and 'SAME' padding."""
  return lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', rhs_dilation=dilation, dimension_numbers=_DIMENSION_NUMBERS
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _conv(x: FeatureMaps, kernel: Kernel, dilation: Dilation) -> Float[Array, 'B H W O']:
  return _forward(x, kernel, dilation)


@functools.partial(_conv.defjvp, symbolic_zeros=True)
def _conv_jvp(
  dilation: Dilation, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
  """The sum of a part linear in the tangent of `x` and a part linear in that of the kernel.

  The second brings its own transpose along, which is how reverse mode gets the weight gradient of
  this module.
  """
  x, kernel = primals
  parts = []
  if type(tangents[0]) is not SymbolicZero:
    parts.append(_conv(tangents[0], kernel, dilation))
  if type(tangents[1]) is not SymbolicZero:
    parts.append(
      linear_call(
        lambda x, kernel: _forward(x, kernel, dilation),
        lambda x, dy: _weight_grad(x, dy, kernel=kernel, dilation=dilation),
        x,
        tangents[1],
      )
    )
  y = _conv(x, kernel, dilation)
  return y, sum(parts) if parts else jnp.zeros_like(y)


def _weight_grad(
  x: FeatureMaps, dy: Float[Array, 'B H W O'], *, kernel: Kernel, dilation: Dilation
) -> Float[Array, 'h w I O']:
  """The gradient with respect to the kernel, of which only the shape and type matter here."""
  return lax.platform_dependent(
    x,
    dy,
    cpu=functools.partial(_weight_grad_cpu, kernel=kernel, dilation=dilation),
    default=functools.partial(_weight_grad_xla, kernel=kernel, dilation=dilation),
  )


def _weight_grad_xla(
  x: FeatureMaps, dy: Float[Array, 'B H W O'], *, kernel: Kernel, dilation: Dilation
) -> Float[Array, 'h w I O']:
  return jax.linear_transpose(lambda kernel: _forward(x, kernel, dilation), kernel)(dy)[0]


def _weight_grad_cpu(
  x: FeatureMaps, dy: Float[Array, 'B H W O'], *, kernel: Kernel, dilation: Dilation
) -> Float[Array, 'h w I O']:
  """Each device sums over its own images, and the sums are added once."""
  mesh = parallelism.mesh()
  local = functools.partial(_weight_grad_local, kernel_shape=kernel.shape, dilation=dilation)
  if mesh.size == 1 or x.shape[0] % parallelism.batch_parts():
    return local(x, dy).astype(kernel.dtype)
  batch = parallelism.batch_sharding().spec
  total = jax.shard_map(
    lambda x, dy: lax.psum(local(x, dy), parallelism.BATCH_AXES),
    mesh=mesh,
    in_specs=(batch, batch),
    out_specs=parallelism.replicated().spec,
    check_vma=False,  # the sum starts from zeros, which are the same on all devices
  )
  return total(x, dy).astype(kernel.dtype)


def _weight_grad_local(
  x: FeatureMaps,
  dy: Float[Array, 'B H W O'],
  *,
  kernel_shape: tuple[int, ...],
  dilation: Dilation,
) -> Float[Array, 'h w I O']:
  """Sum of dy^T patches in single precision, over the patches of one group of images at a time.

  The patches are the second factor, and dy, which is smaller, is the one that is transposed: with
  patches^T dy every patch would be copied once more.
  """
  batch, height, width, channels = x.shape
  kernel_h, kernel_w, _, features = kernel_shape
  pads = tuple((d * (n // 2),) * 2 for d, n in zip(dilation, (kernel_h, kernel_w), strict=True))
  bytes_per_image = height * width * kernel_h * kernel_w * channels * x.dtype.itemsize
  images = max(_PATCH_BYTES // bytes_per_image, -(-_PATCH_ROWS // (height * width)))
  size = _group_size(batch, images)

  def patches_of(x):  # (g, H, W, C) -> (g H W, kh kw C)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    taps = [
      x[:, i * dilation[0] :, j * dilation[1] :][:, :height, :width]
      for i in range(kernel_h)
      for j in range(kernel_w)
    ]
    return jnp.concatenate(taps, -1).reshape(-1, kernel_h * kernel_w * channels)

  def accumulate(i, total):
    # Sliced here, since an array regrouped before the loop would be one more copy in memory.
    x_group, dy_group = (lax.dynamic_slice_in_dim(a, i * size, size) for a in (x, dy))
    dy_columns = dy_group.reshape(-1, features).T
    return total + jnp.matmul(dy_columns, patches_of(x_group), preferred_element_type=total.dtype)

  zero = jnp.zeros((features, kernel_h * kernel_w * channels), jnp.float32)
  return lax.fori_loop(0, batch // size, accumulate, zero).T.reshape(kernel_shape)


def _group_size(batch: int, limit: int) -> int:
  """The largest divisor of `batch` that is at most `limit`."""
  return max(n for n in range(1, min(batch, limit) + 1) if batch % n == 0)
