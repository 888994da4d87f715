"""The Inception network of the FID: "inception-2015-12-05".

These are the first published weights of Inception-v3. The network differs a little from that of the
paper: it has 1008 classes, its mean pooling leaves the padding out of the mean, and its last block
uses max pooling. Normalizations are folded into the convolutions before them, since nothing is
trained here.

References:
  Heusel et al. 2017 (FID), "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium", https://arxiv.org/abs/1706.08500.
  Szegedy et al. 2015 (Inception-v3), "Rethinking the Inception Architecture for Computer Vision",
    https://arxiv.org/abs/1512.00567.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree, Real, Shaped

from runtime.array_types import Array, FeatureMaps, Images

IMAGE_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
_BN_EPSILON = 1e-3

# From grey levels to the network's input: as in the evaluation of Song et al. 2021, and as in the
# graph that the authors of the FID published.
SCALINGS = {
  'tfgan': lambda x: (x - 127.5) / 127.5,
  'ttur': lambda x: (x - 128.0) / 128.0,
}


@functools.cache
def _bilinear_matrix(size: int, new_size: int) -> Float[np.ndarray, '{new_size} {size}']:
  """Bilinear interpolation as TensorFlow 1 did it, with output pixel i at i size / new_size.

  It uses neither half-pixel centers nor antialiasing, and repeats the last pixel beyond the end.
  """
  position = np.arange(new_size) * (size / new_size)
  low = np.floor(position).astype(int)
  high = np.minimum(low + 1, size - 1)
  matrix = np.zeros((new_size, size))
  np.add.at(matrix, (np.arange(new_size), low), 1 - (position - low))
  np.add.at(matrix, (np.arange(new_size), high), position - low)
  return matrix.astype(np.float32)


def resize(images: Images, size: int = IMAGE_SIZE) -> Float[Array, 'B {size} {size} C']:
  """Resizes images (B, H, W, C) to (B, size, size, C), interpolating as TensorFlow 1 did."""
  rows = _bilinear_matrix(images.shape[1], size)
  columns = _bilinear_matrix(images.shape[2], size)
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  return product('iw,bhwc->bhic', columns, product('ih,bhwc->biwc', rows, images))


class _Conv(nn.Module):
  """Convolution, bias and ReLU, in single precision on every device.

  Attributes:
    features: output channels.
    kernel_size: (height, width).
    stride: in both directions.
    padding: 'SAME' or 'VALID'.
  """

  features: int
  kernel_size: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B height width {self.features}']:
    x = nn.Conv(
      self.features,
      self.kernel_size,
      (self.stride, self.stride),
      self.padding,
      precision=jax.lax.Precision.HIGHEST,
      name='conv',
    )(x)
    return nn.relu(x)


def _max_pool(x: FeatureMaps) -> Float[Array, 'B height width C']:
  return nn.max_pool(x, (3, 3), (2, 2))


def _mean_pool(x: FeatureMaps) -> FeatureMaps:
  return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _max_pool_same(x: FeatureMaps) -> FeatureMaps:
  return nn.max_pool(x, (3, 3), (1, 1), 'SAME')


def _chain(
  x: FeatureMaps, name: str, *convs: tuple[int, tuple[int, int]]
) -> Float[Array, 'B H W D']:
  """Convolutions `<name>_1`, `<name>_2`, ... of the given channels and kernel sizes."""
  for i, (features, kernel_size) in enumerate(convs, 1):
    x = _Conv(features, kernel_size, name=f'{name}_{i}')(x)
  return x


class _Block35(nn.Module):
  """Inception block at 35x35: 1x1, 5x5, double 3x3 and a pooled branch."""

  pool_features: int

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B height width D']:
    branches = [
      _Conv(64, name='branch1x1')(x),
      _chain(x, 'branch5x5', (48, (1, 1)), (64, (5, 5))),
      _chain(x, 'branch3x3dbl', (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
      _Conv(self.pool_features, name='branch_pool')(_mean_pool(x)),
    ]
    return jnp.concatenate(branches, -1)


class _Reduction17(nn.Module):
  """From 35x35 to 17x17."""

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B height width D']:
    double = _chain(x, 'branch3x3dbl', (64, (1, 1)), (96, (3, 3)))
    branches = [
      _Conv(384, (3, 3), 2, 'VALID', name='branch3x3')(x),
      _Conv(96, (3, 3), 2, 'VALID', name='branch3x3dbl_3')(double),
      _max_pool(x),
    ]
    return jnp.concatenate(branches, -1)


class _Block17(nn.Module):
  """Inception block at 17x17: 7x7 convolutions as products of 1x7 and 7x1."""

  width: int

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B height width D']:
    c, row, column = self.width, (1, 7), (7, 1)
    branches = [
      _Conv(192, name='branch1x1')(x),
      _chain(x, 'branch7x7', (c, (1, 1)), (c, row), (192, column)),
      _chain(x, 'branch7x7dbl', (c, (1, 1)), (c, column), (c, row), (c, column), (192, row)),
      _Conv(192, name='branch_pool')(_mean_pool(x)),
    ]
    return jnp.concatenate(branches, -1)


class _Reduction8(nn.Module):
  """From 17x17 to 8x8."""

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B height width D']:
    narrow = _chain(x, 'branch3x3', (192, (1, 1)))
    wide = _chain(x, 'branch7x7x3', (192, (1, 1)), (192, (1, 7)), (192, (7, 1)))
    branches = [
      _Conv(320, (3, 3), 2, 'VALID', name='branch3x3_2')(narrow),
      _Conv(192, (3, 3), 2, 'VALID', name='branch7x7x3_4')(wide),
      _max_pool(x),
    ]
    return jnp.concatenate(branches, -1)


class _Block8(nn.Module):
  """Inception block at 8x8: 3x3 convolutions that end side by side as 1x3 and 3x1."""

  pool: Callable[[FeatureMaps], FeatureMaps]

  @nn.compact
  def __call__(self, x: FeatureMaps) -> Float[Array, 'B height width D']:
    short = _chain(x, 'branch3x3', (384, (1, 1)))
    long = _chain(x, 'branch3x3dbl', (448, (1, 1)), (384, (3, 3)))
    branches = [
      _Conv(320, name='branch1x1')(x),
      _Conv(384, (1, 3), name='branch3x3_2a')(short),
      _Conv(384, (3, 1), name='branch3x3_2b')(short),
      _Conv(384, (1, 3), name='branch3x3dbl_3a')(long),
      _Conv(384, (3, 1), name='branch3x3dbl_3b')(long),
      _Conv(192, name='branch_pool')(self.pool(x)),
    ]
    return jnp.concatenate(branches, -1)


class FIDInception(nn.Module):
  """Inception-v3 with the outputs that FID, KID and the Inception score are computed from."""

  @nn.compact
  def __call__(self, x: Float[Array, 'B 299 299 3']) -> dict[str, Float[Array, 'B _']]:
    """The features and logits of scaled images, (B, 299, 299, 3).

    Returns:
      '64', '192' and '768', (B, 64), (B, 192) and (B, 768): means over the pixels after the first
      and the second maximum pooling and before the last reduction. 'pool_3', (B, 2048): the
      features of the FID. 'logits', (B, 1008), and 'logits_unbiased': those without the bias of the
      last layer, which the Inception score uses.
    """
    outputs = {}

    def mean(x: FeatureMaps) -> Float[Array, 'B C']:
      return jnp.mean(x, (1, 2))

    x = _Conv(32, (3, 3), 2, 'VALID', name='Conv2d_1a_3x3')(x)
    x = _Conv(32, (3, 3), padding='VALID', name='Conv2d_2a_3x3')(x)
    x = _max_pool(_Conv(64, (3, 3), name='Conv2d_2b_3x3')(x))
    outputs['64'] = mean(x)
    x = _Conv(80, name='Conv2d_3b_1x1')(x)
    x = _max_pool(_Conv(192, (3, 3), padding='VALID', name='Conv2d_4a_3x3')(x))
    outputs['192'] = mean(x)
    for name, pool_features in (('Mixed_5b', 32), ('Mixed_5c', 64), ('Mixed_5d', 64)):
      x = _Block35(pool_features, name=name)(x)
    x = _Reduction17(name='Mixed_6a')(x)
    for name, width in (('Mixed_6b', 128), ('Mixed_6c', 160), ('Mixed_6d', 160), ('Mixed_6e', 192)):
      x = _Block17(width, name=name)(x)
    outputs['768'] = mean(x)
    x = _Reduction8(name='Mixed_7a')(x)
    x = _Block8(_mean_pool, name='Mixed_7b')(x)
    x = _Block8(_max_pool_same, name='Mixed_7c')(x)
    outputs['pool_3'] = mean(x)
    shape = (x.shape[-1], NUM_CLASSES)
    kernel = self.param('fc_kernel', nn.initializers.lecun_normal(), shape)
    bias = self.param('fc_bias', nn.initializers.zeros, shape[1:])
    logits = jnp.matmul(outputs['pool_3'], kernel, precision=jax.lax.Precision.HIGHEST)
    return outputs | {'logits_unbiased': logits, 'logits': logits + bias}


def forward(
  params: PyTree, images: Real[Array, 'B H W C'], scaling: str = 'tfgan'
) -> dict[str, Float[Array, 'B _']]:
  """Returns the outputs of `FIDInception` for images of grey levels.

  Args:
    params: as `params_from_torch` returns them.
    images: (B, H, W, 1 or 3), in [0, 255], of any size; a single channel is repeated three times.
    scaling: a name in `SCALINGS`.
  """
  x = SCALINGS[scaling](resize(images.astype(jnp.float32)))
  x = jnp.broadcast_to(x, (*x.shape[:3], 3))
  return FIDInception().apply({'params': params}, x)


def abstract_params() -> PyTree:
  """The tree of parameters of `FIDInception`, with shapes in place of arrays."""
  image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
  return jax.eval_shape(FIDInception().init, jax.random.PRNGKey(0), image)['params']


def params_from_torch(state_dict: Mapping[str, Shaped[np.ndarray, '...']]) -> PyTree:
  """Returns the parameters in a PyTorch state dict, with the normalizations folded in.

  y = gamma (w x - m) / sqrt(v + epsilon) + beta is one convolution by f w with the bias beta - f m,
  where f = gamma / sqrt(v + epsilon).

  Args:
    state_dict: arrays by name. Each `<block>.<branch>` has `.conv.weight`, (O, I, H, W), and the
      arrays `.bn.weight`, `.bn.bias`, `.bn.running_mean` and `.bn.running_var`, (O,).

  Raises:
    KeyError: if a name is missing.
    ValueError: if an array has the wrong shape.
  """

  def unit(
    path: Sequence[str],
  ) -> tuple[Float[np.ndarray, 'H W I O'], Float[np.ndarray, ' O']]:
    name = '.'.join(path)
    weight = np.asarray(state_dict[f'{name}.conv.weight'], np.float64)
    scale, bias, mean, variance = (
      np.asarray(state_dict[f'{name}.bn.{key}'], np.float64)
      for key in ('weight', 'bias', 'running_mean', 'running_var')
    )
    factor = scale / np.sqrt(variance + _BN_EPSILON)
    return weight.transpose(2, 3, 1, 0) * factor, bias - mean * factor

  flat = {('fc_kernel',): np.asarray(state_dict['fc.weight']).T}
  flat['fc_bias',] = np.asarray(state_dict['fc.bias'])
  like = flax.traverse_util.flatten_dict(abstract_params())
  for path in like:
    if path[-1] == 'kernel':
      flat[path], flat[*path[:-1], 'bias'] = unit(path[:-2])
  for path, leaf in like.items():
    if flat[path].shape != leaf.shape:
      raise ValueError(f'{"/".join(path)} is of shape {flat[path].shape}, not {leaf.shape}')
  return flax.traverse_util.unflatten_dict(
    {path: leaf.astype(np.float32) for path, leaf in flat.items()}
  )
