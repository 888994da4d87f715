"""Conditions of controllable generation (section 5 and appendix I), for every sampler.

A condition wraps the score or the updates of a sampler, so that every condition works with every
sampler:

- `Imputation`: some coordinates in an orthonormal basis are known. Inpainting, colorization and
  super-resolution differ only in the basis (appendix I.2, I.3).
- `ClassGuidance`: the gradient of a noise-conditional classifier is added to the score (Eq. 14).
- `PosteriorGuidance`: a measurement y = A(x) + noise is known, for any function A. The gradient of
  an estimate of log p(y | x_t) is added to the score.

Section and equation numbers without a name are those of Song et al., "Score-based generative
modeling through stochastic differential equations", ICLR 2021, https://arxiv.org/abs/2011.13456.
The others:

- Chung et al., "Diffusion posterior sampling for general noisy inverse problems", ICLR 2023,
  https://arxiv.org/abs/2209.14687.
- Song, Vahdat, Mardani and Kautz, "Pseudoinverse-guided diffusion models for inverse problems",
  ICLR 2023.
- Rozet and Louppe, "Score-based data assimilation", NeurIPS 2023,
  https://arxiv.org/abs/2306.10574.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer, Shaped

from runtime.array_types import Array, Batch, Images, Labels, PerExample, RandomKey, Scalar
from runtime.errors import UserError
from samplers.base import Condition, UpdateFn, check_floats
from sde_lib import SDE, ScoreFn, batch_mul

Transform = Callable[[Batch], Array]
ClassScore = Callable[[Batch, PerExample, Labels], Batch]
Entries = Float[Array, '*dims entries']  # coordinates, of which the last axis is a basis
Blocks = Float[Array, 'B rows columns C entries']
Mask = Shaped[Array, 'B *dims']
ClassLabels = Integer[Array, 'B ...']  # (B,), or (B, 1) where every image is a batch of its own
Basis = Float[np.ndarray, 'size size']
_Given = Shaped[Array, 'B H W C']  # from callers, and checked


def _identity(x: Batch) -> Batch:
  return x


class Imputation(Condition):
  """Some coordinates of the image in an orthonormal basis are known.

  Samplers with updates (predictors and correctors) are projected: after each update the known
  coordinates are drawn again from p(x_t | x_0). Samplers that follow the probability flow get, in
  these coordinates, the score of p(x_t | x_0), which leads them to the known values. Both are
  approximations, because the other coordinates see the known ones with the noise of time t. At the
  end every sampler sets the known coordinates to their known values.

  Attributes:
    sde: the forward SDE; the mean of its marginals must be linear in x_0.
    known: the coordinates of the images, (B, ...), in units of the scaled data; they are not used
      where `mask` is zero.
    mask: nonzero where a coordinate is known, shaped as `known`.
    transform: the linear, orthonormal map from images (B, H, W, C) to coordinates.
    inverse: the inverse of `transform`.
    exact: whether to set the known coordinates at the end. Otherwise they keep the noise of the
      sampler's last update, as in the 2021 code without denoising.
  """

  sde: SDE = flax.struct.field(pytree_node=False)
  known: Batch
  mask: Mask
  transform: Transform = flax.struct.field(pytree_node=False, default=_identity)
  inverse: Transform = flax.struct.field(pytree_node=False, default=_identity)
  exact: bool = flax.struct.field(pytree_node=False, default=True)

  def _fill(self, x: Images, coordinates: Array) -> Images:
    """`x` with these coordinates where the mask is nonzero."""
    return self.inverse(jnp.where(self.mask != 0, coordinates, self.transform(x)))

  def _marginal(self, t: PerExample) -> tuple[Batch, PerExample]:
    """Mean and standard deviation of the known coordinates of x_t."""
    # Zero where nothing is known, so that a NaN there cannot spread.
    return self.sde.marginal_prob(jnp.where(self.mask != 0, self.known, 0.0), t)

  def start(self, x: Images) -> Images:
    """`x`, (B, H, W, C), with the known coordinates in place of the prior's."""
    return self._fill(x, self.known)

  def update(self, update_fn: UpdateFn) -> UpdateFn:
    """`update_fn`, after which the known coordinates are drawn from p(x_t | x_0)."""

    def projected(rng: RandomKey, x: Images, t: PerExample) -> tuple[Images, Images]:
      rng, step_rng = jax.random.split(rng)
      x, x_mean = update_fn(step_rng, x, t)
      mean, std = self._marginal(t)
      noisy = mean + batch_mul(std, jax.random.normal(rng, mean.shape))
      return self._fill(x, noisy), self._fill(x_mean, mean)

    return projected

  def flow_score(self, score_fn: ScoreFn) -> ScoreFn:
    """`score_fn`, with (alpha_t x_0 - x_t) / sigma_t^2 in the known coordinates."""

    def conditional_score(x: Images, t: PerExample) -> Images:
      mean, std = self._marginal(t)
      to_known = batch_mul(1 / std**2, mean - self.transform(x))
      return self._fill(score_fn(x, t), to_known)

    return conditional_score

  def finish(self, x: Images) -> Images:
    """`x`, (B, H, W, C), with the known coordinates set to their known values, if `exact`."""
    return self._fill(x, self.known) if self.exact else x


def inpainting(sde: SDE, images: _Given, mask: Array) -> Imputation:
  """The condition that the pixels of `images` where `mask` is nonzero are known.

  Args:
    sde: the forward SDE.
    images: (B, H, W, C), in the network's range.
    mask: an array that broadcasts to the shape of `images`.

  Raises:
    UserError: if the images are whole numbers, such as grey levels.
  """
  check_floats(images, 'The known images are')
  return Imputation(sde, images, jnp.broadcast_to(mask, images.shape))


def constant_first_basis(size: int) -> Basis:
  """The orthonormal matrix of the cosine transform, (size, size), whose first row is constant."""
  import scipy.fft  # here, since most runs have no observations and importing takes a while

  return scipy.fft.dct(np.eye(size), axis=0, norm='ortho').astype(np.float32)


def _to_basis(x: Entries) -> Entries:
  """The last axis in the constant-first basis: its first entry is the mean times sqrt(size)."""
  basis = constant_first_basis(x.shape[-1])
  return jnp.einsum('...c,kc->...k', x, basis, precision='highest')


def _from_basis(u: Entries) -> Entries:
  """The inverse of `_to_basis`."""
  basis = constant_first_basis(u.shape[-1])
  return jnp.einsum('...k,kc->...c', u, basis, precision='highest')


@dataclasses.dataclass(frozen=True)
class ToBlocks:
  """The map from images (B, H, W, C) to blocks of pixels, each in the constant-first basis.

  Attributes:
    factor: the side of a block, in pixels.
  """

  factor: int

  def __call__(self, x: Images) -> Blocks:
    """The coordinates, (B, H / factor, W / factor, C, factor^2), of `x`, (B, H, W, C)."""
    _, height, width, channels = x.shape
    side = self.factor
    x = x.reshape(-1, height // side, side, width // side, side, channels)
    blocks = x.transpose(0, 1, 3, 5, 2, 4)
    return _to_basis(blocks.reshape(*blocks.shape[:4], side**2))


@dataclasses.dataclass(frozen=True)
class FromBlocks:
  """The inverse of `ToBlocks`.

  Attributes:
    factor: the side of a block, in pixels.
  """

  factor: int

  def __call__(self, u: Blocks) -> Images:
    """The images, (B, H, W, C), that have the coordinates `u`, shaped as `ToBlocks` returns."""
    _, rows, columns, channels, _ = u.shape
    side = self.factor
    blocks = _from_basis(u).reshape(-1, rows, columns, channels, side, side)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(-1, rows * side, columns * side, channels)


def _first_known(coordinates: Entries) -> Entries:
  """The mask under which only the first entry of the last axis is known."""
  return jnp.zeros(coordinates.shape).at[..., 0].set(1.0)


def colorization(sde: SDE, gray: _Given) -> Imputation:
  """The condition that the mean over the channels of `gray` is known (appendix I.3).

  Args:
    sde: the forward SDE.
    gray: (B, H, W, C), in the network's range; only the mean over the channels is used.

  Raises:
    UserError: if the images are whole numbers, such as grey levels, or have one channel.
  """
  check_floats(gray, 'The known images are')
  if gray.shape[-1] == 1:
    raise UserError(
      f'Images of shape {gray.shape} have one channel, whose mean is the image itself: pass images '
      f'of several channels, such as jnp.repeat(gray, 3, -1) for a network in colour.'
    )
  known = _to_basis(gray)
  return Imputation(sde, known, _first_known(known), _to_basis, _from_basis)


def super_resolution(sde: SDE, images: _Given, factor: int) -> Imputation:
  """The condition that the mean over each block of `factor` x `factor` pixels is known.

  Args:
    sde: the forward SDE.
    images: (B, H, W, C), in the network's range; only the means of the blocks are used.
    factor: the side of a block, in pixels.

  Raises:
    UserError: if `factor` is below 2 or does not divide the height and the width, or the images
      are whole numbers, such as grey levels.
  """
  check_floats(images, 'The known images are')
  _, height, width, _ = images.shape
  if factor < 2 or height % factor or width % factor:
    raise UserError(
      f'sampling.superres_factor={factor} must be at least 2 and divide both sides of the images, '
      f'{height}x{width}: choose another factor.'
    )
  known = ToBlocks(factor)(images)
  return Imputation(sde, known, _first_known(known), ToBlocks(factor), FromBlocks(factor))


class ClassGuidance(Condition):
  """The condition that images are of given classes: score(x_t) + scale grad log p(label | x_t).

  This is Eq. 14 for scale = 1.

  Attributes:
    labels: the classes, (B,).
    class_score: (x_t, t (B,), labels (B,)) -> grad log p(label | x_t), shaped as x_t.
    scale: the factor of the gradient; values above 1 favour images of which the classifier is sure.
  """

  labels: ClassLabels
  class_score: ClassScore = flax.struct.field(pytree_node=False)
  scale: float = flax.struct.field(pytree_node=False, default=1.0)

  def score(self, score_fn: ScoreFn) -> ScoreFn:
    """score(x_t) + scale grad log p(label | x_t), from `score_fn`, the score of p(x_t)."""

    def guided(x: Batch, t: PerExample) -> Batch:
      return score_fn(x, t) + self.scale * self.class_score(x, t, self.labels)

    return guided


class PosteriorGuidance(Condition):
  """The condition that y = A(x) + noise is measured: score(x_t) + scale grad log p(y | x_t).

  With the denoised image D = E[x_0 | x_t] = (x_t + sigma_t^2 score) / alpha_t,

    log p(y | x_t) ~ -|y - A(D)|^2 / (2 (noise_std^2 + r_t^2)),  r_t^2 = s^2 d^2 / (s^2 + d^2),

  where s = sigma_t / alpha_t and d is the standard deviation of the data. This is diffusion
  posterior sampling (Chung et al. 2023) with the spread r_t of x_0 given x_t in the likelihood
  (Song, Vahdat et al. 2023, Eq. 8; Rozet and Louppe 2023). It is exact for a linear A with
  orthonormal rows and data N(mean, d^2 I).

  Attributes:
    sde: the forward SDE; the mean of its marginals must be linear in x_0.
    y: the measurements, (B, ...).
    A: from images (B, H, W, C) in the network's range to measurements; any JAX function.
    noise_std: the standard deviation of the measurement noise, in the units of `y`.
    data_std: the standard deviation d of the data, in units of the scaled data; 0 leaves r_t out.
    scale: the factor of the gradient.
    bounds: the range of the data, which D is clipped to before it is measured; None leaves D as it
      is. An imperfect network predicts values far outside at high noise, whose gradients can grow
      without bound; those of clipped values vanish.
  """

  sde: SDE = flax.struct.field(pytree_node=False)
  y: Batch
  A: Transform = flax.struct.field(pytree_node=False)
  noise_std: float = flax.struct.field(pytree_node=False, default=0.01)
  data_std: float = flax.struct.field(pytree_node=False, default=0.5)
  scale: float = flax.struct.field(pytree_node=False, default=1.0)
  bounds: tuple[float, float] | None = flax.struct.field(pytree_node=False, default=None)

  def score(self, score_fn: ScoreFn) -> ScoreFn:
    """score(x_t) + scale grad log p(y | x_t), from `score_fn`, the score of p(x_t)."""

    def log_likelihood(x: Batch, t: PerExample) -> tuple[Scalar, Batch]:
      alpha, sigma = self.sde.alpha_sigma(t)
      score = score_fn(x, t)
      denoised = self.sde.denoise(x, t, score)
      if self.bounds is not None:
        denoised = jnp.clip(denoised, *self.bounds)
      s2, d2 = (sigma / alpha) ** 2, self.data_std**2
      variance = self.noise_std**2 + s2 * d2 / (s2 + d2)
      errors = (self.y - self.A(denoised)).reshape(x.shape[0], -1)
      return jnp.sum(-jnp.sum(errors**2, axis=-1) / (2 * variance)), score

    def guided(x: Batch, t: PerExample) -> Batch:
      # One pass of the network gives both, its output as an auxiliary value of the gradient.
      gradient, score = jax.grad(log_likelihood, has_aux=True)(x, t)
      return score + self.scale * gradient

    return guided
