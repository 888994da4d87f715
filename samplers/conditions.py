"""Conditions of controllable generation (section 5 and appendix I), for every sampler.

A condition wraps the score or the update of a sampler, so that each works with each:

- `Imputation`: some coordinates in an orthonormal basis are known. Inpainting, colorization and
  super-resolution differ in the basis only (appendix I.2, I.3).
- `ClassGuidance`: the gradient of a noise-conditional classifier is added to the score (Eq. 14).
- `PosteriorGuidance`: y = A(x) + noise for any function A, by the gradient of an estimate of
  log p(y | x_t).
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from runtime.errors import UserError
from samplers.base import Condition
from sde_lib import SDE, batch_mul

Transform = Callable[[jax.Array], jax.Array]
ClassScore = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _identity(x: jax.Array) -> jax.Array:
  return x


class Imputation(Condition):
  """Some coordinates of the image in an orthonormal basis are known.

  Methods with updates (predictors and correctors) are projected: after each update the known
  coordinates are drawn anew from p(x_t | x_0). Methods that follow the flow get for these
  coordinates the score of p(x_t | x_0), which leads them to where they are known to end. Both are
  approximations: the other coordinates see the known ones at the noise of time t, not as they are.
  At the end every method puts the known coordinates back as they are.

  Attributes:
    sde: the forward SDE; its marginals must be linear in x_0.
    known: coordinates of the images, (B, ...); where `mask` is zero they are never used.
    mask: nonzero where a coordinate is known; shaped as `known`.
    transform: from images (B, H, W, C) to coordinates, linear and orthonormal.
    inverse: back.
    exact: put the known coordinates back at the end. Without it they keep the noise that the
      sampler's last update leaves, as in the reference without denoising.
  """

  sde: SDE = flax.struct.field(pytree_node=False)
  known: jax.Array
  mask: jax.Array
  transform: Transform = flax.struct.field(pytree_node=False, default=_identity)
  inverse: Transform = flax.struct.field(pytree_node=False, default=_identity)
  exact: bool = flax.struct.field(pytree_node=False, default=True)

  def _fill(self, x: jax.Array, coordinates: jax.Array) -> jax.Array:
    """`x` with these coordinates where they are known."""
    return self.inverse(jnp.where(self.mask != 0, coordinates, self.transform(x)))

  def _marginal(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self.sde.marginal_prob(jnp.where(self.mask != 0, self.known, 0.0), t)

  def start(self, x):
    return self._fill(x, self.known)

  def update(self, update_fn):
    def projected(rng, x, t):
      rng, step_rng = jax.random.split(rng)
      x, x_mean = update_fn(step_rng, x, t)
      mean, std = self._marginal(t)
      noisy = mean + batch_mul(std, jax.random.normal(rng, mean.shape))
      return self._fill(x, noisy), self._fill(x_mean, mean)

    return projected

  def flow_score(self, score_fn):
    def conditional_score(x, t):
      mean, std = self._marginal(t)
      to_known = batch_mul(1 / std**2, mean - self.transform(x))
      return self._fill(score_fn(x, t), to_known)

    return conditional_score

  def finish(self, x):
    return self._fill(x, self.known) if self.exact else x


def inpainting(sde: SDE, images: jax.Array, mask: jax.Array) -> Imputation:
  """The pixels where `mask` is nonzero are known.

  Args:
    sde: the forward SDE.
    images: (B, H, W, C), in the network's range.
    mask: broadcasts to the shape of `images`.
  """
  return Imputation(sde, images, jnp.broadcast_to(mask, images.shape))


def constant_first_basis(size: int) -> np.ndarray:
  """An orthonormal matrix whose first row is constant (the cosine transform), (size, size)."""
  return scipy.fft.dct(np.eye(size), axis=0, norm='ortho').astype(np.float32)


def _to_basis(x: jax.Array) -> jax.Array:
  """The last axis in the constant-first basis: its first entry is the mean times sqrt(size)."""
  basis = constant_first_basis(x.shape[-1])
  return jnp.einsum('...c,kc->...k', x, basis, precision='highest')


def _from_basis(u: jax.Array) -> jax.Array:
  basis = constant_first_basis(u.shape[-1])
  return jnp.einsum('...k,kc->...c', u, basis, precision='highest')


@dataclasses.dataclass(frozen=True)
class ToBlocks:
  """Images (B, H, W, C) to the basis of each block, (B, H / factor, W / factor, C, factor^2).

  Attributes:
    factor: side of a block.
  """

  factor: int

  def __call__(self, x: jax.Array) -> jax.Array:
    _, height, width, channels = x.shape
    side = self.factor
    x = x.reshape(-1, height // side, side, width // side, side, channels)
    blocks = x.transpose(0, 1, 3, 5, 2, 4)
    return _to_basis(blocks.reshape(*blocks.shape[:4], side**2))


@dataclasses.dataclass(frozen=True)
class FromBlocks:
  """The inverse of `ToBlocks`."""

  factor: int

  def __call__(self, u: jax.Array) -> jax.Array:
    _, rows, columns, channels, _ = u.shape
    side = self.factor
    blocks = _from_basis(u).reshape(-1, rows, columns, channels, side, side)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(-1, rows * side, columns * side, channels)


def _first_known(coordinates: jax.Array) -> jax.Array:
  """The mask that knows the first entry of the last axis."""
  return jnp.zeros(coordinates.shape).at[..., 0].set(1.0)


def colorization(sde: SDE, gray: jax.Array) -> Imputation:
  """The mean over the channels is known (appendix I.3).

  Args:
    sde: the forward SDE.
    gray: (B, H, W, C), in the network's range; only the mean of the channels is used.
  """
  known = _to_basis(gray)
  return Imputation(sde, known, _first_known(known), _to_basis, _from_basis)


def super_resolution(sde: SDE, images: jax.Array, factor: int) -> Imputation:
  """The mean over each block of `factor` x `factor` pixels is known.

  Args:
    sde: the forward SDE.
    images: (B, H, W, C), in the network's range; only the means of the blocks are used.
    factor: side of a block.

  Raises:
    UserError: if blocks do not fit.
  """
  _, height, width, _ = images.shape
  if factor < 2 or height % factor or width % factor:
    raise UserError(
      f'sampling.superres_factor={factor} must be at least 2 and divide the image, '
      f'{height}x{width}.'
    )
  known = ToBlocks(factor)(images)
  return Imputation(sde, known, _first_known(known), ToBlocks(factor), FromBlocks(factor))


class ClassGuidance(Condition):
  """score(x_t) + scale grad log p(label | x_t) (Eq. 14).

  Attributes:
    labels: (B,).
    class_score: (x_t, t (B,), labels (B,)) -> the gradient.
    scale: 1 samples p(x | label); more favours what the classifier is sure of.
  """

  labels: jax.Array
  class_score: ClassScore = flax.struct.field(pytree_node=False)
  scale: float = flax.struct.field(pytree_node=False, default=1.0)

  def score(self, score_fn):
    def guided(x, t):
      return score_fn(x, t) + self.scale * self.class_score(x, t, self.labels)

    return guided


class PosteriorGuidance(Condition):
  """y = A(x) + noise, by the gradient of an estimate of log p(y | x_t).

  With the denoised image D = E[x_0 | x_t] = (x_t + sigma_t^2 score) / alpha_t,

    log p(y | x_t) ~ -|y - A(D)|^2 / (2 (noise_std^2 + r_t^2)),  r_t^2 = s^2 d^2 / (s^2 + d^2),

  where s = sigma_t / alpha_t and d is the deviation of the data. This is diffusion posterior
  sampling (Chung et al. 2023) with the spread r_t of x_0 given x_t in the likelihood (Song et al.
  2023, Eq. 8; Rozet and Louppe 2023). It is exact for a linear A with orthonormal rows and data
  N(mean, d^2 I).

  Attributes:
    sde: the forward SDE; its marginals must be linear in x_0.
    y: measurements, (B, ...).
    A: from images (B, H, W, C) in the network's range to measurements; any JAX function.
    noise_std: deviation of the measurement noise.
    data_std: deviation of the data, d; 0 leaves the spread out.
    scale: a factor on the gradient.
  """

  sde: SDE = flax.struct.field(pytree_node=False)
  y: jax.Array
  A: Transform = flax.struct.field(pytree_node=False)
  noise_std: float = flax.struct.field(pytree_node=False, default=0.01)
  data_std: float = flax.struct.field(pytree_node=False, default=0.5)
  scale: float = flax.struct.field(pytree_node=False, default=1.0)

  def score(self, score_fn):
    def log_likelihood(x, t):
      alpha, sigma = self.sde.alpha_sigma(t)
      score = score_fn(x, t)
      denoised = self.sde.denoise(x, t, score)
      s2, d2 = (sigma / alpha) ** 2, self.data_std**2
      variance = self.noise_std**2 + s2 * d2 / (s2 + d2)
      errors = (self.y - self.A(denoised)).reshape(x.shape[0], -1)
      return jnp.sum(-jnp.sum(errors**2, axis=-1) / (2 * variance)), score

    def guided(x, t):
      gradient, score = jax.grad(log_likelihood, has_aux=True)(x, t)
      return score + self.scale * gradient

    return guided
