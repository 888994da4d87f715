"""Controllable generation (section 5 and appendix I): conditions for every sampler.

A condition wraps the score or the update of a sampling method (`sampling.Condition`), so that each
works with each method:

- `Measurement`: some coordinates in an orthonormal basis are known. Inpainting, colorization and
  super-resolution differ in the basis only (appendix I.2, I.3).
- `ClassGuidance`: the gradient of a noise-conditional classifier is added to the score (Eq. 14).
- `PosteriorGuidance`: y = A(x) + noise for any function A, by the gradient of an estimate of
  log p(y | x_t).
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

import sampling
from models.classifier import classifier_score, get_logit_fn, load_classifier
from runtime.errors import UserError
from runtime.registry import Registry
from sampling import Condition, Corrector, Predictor
from sde_lib import SDE, batch_mul
from train_state import State

Transform = Callable[[jax.Array], jax.Array]
Scaler = Callable[[jax.Array], jax.Array]
ClassScore = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_TASKS = Registry('sampling task')
register_task = _TASKS.register


def _identity(x: jax.Array) -> jax.Array:
  return x


class Measurement(Condition):
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


def inpainting(sde: SDE, images: jax.Array, mask: jax.Array) -> Measurement:
  """The pixels where `mask` is nonzero are known.

  Args:
    sde: the forward SDE.
    images: (B, H, W, C), in the network's range.
    mask: broadcasts to the shape of `images`.
  """
  return Measurement(sde, images, jnp.broadcast_to(mask, images.shape))


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


def colorization(sde: SDE, gray: jax.Array) -> Measurement:
  """The mean over the channels is known (appendix I.3).

  Args:
    sde: the forward SDE.
    gray: (B, H, W, C), in the network's range; only the mean of the channels is used.
  """
  known = _to_basis(gray)
  return Measurement(sde, known, _first_known(known), _to_basis, _from_basis)


def super_resolution(sde: SDE, images: jax.Array, factor: int) -> Measurement:
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
  return Measurement(sde, known, _first_known(known), ToBlocks(factor), FromBlocks(factor))


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
      alpha, sigma = self.sde.marginal_prob(jnp.ones_like(t), t)
      score = score_fn(x, t)
      denoised = batch_mul(1 / alpha, x + batch_mul(sigma**2, score))
      s2, d2 = (sigma / alpha) ** 2, self.data_std**2
      variance = self.noise_std**2 + s2 * d2 / (s2 + d2)
      errors = (self.y - self.A(denoised)).reshape(x.shape[0], -1)
      return jnp.sum(-jnp.sum(errors**2, axis=-1) / (2 * variance)), score

    def guided(x, t):
      gradient, score = jax.grad(log_likelihood, has_aux=True)(x, t)
      return score + self.scale * gradient

    return guided


class Task(abc.ABC):
  """What `--mode=sample` draws: a condition made of test images and labels.

  Attributes:
    uses_images: whether it needs the data set.

  Args:
    config: reads `sampling` and what the task needs.
    sde: the forward SDE.
    inverse_scaler: from the network's range to [0, 1].
  """

  uses_images = False

  def __init__(self, config: Any, sde: SDE, inverse_scaler: Scaler):
    self.settings = config.sampling
    self.sde = sde

  @abc.abstractmethod
  def condition(self, images: jax.Array, labels: jax.Array) -> Condition:
    """The condition for images (B, H, W, C), in the network's range, and their labels (B,)."""

  def labels(self, index: np.ndarray) -> np.ndarray:
    """The labels of the samples number `index`, for tasks that use no test images."""
    return np.full(len(index), -1)

  def given(self, condition: Condition, images: jax.Array) -> jax.Array:
    """What of the images the condition knows, as images, for tasks that use test images."""
    return images


@register_task(name='unconditional')
class Unconditional(Task):
  """Samples of the model."""

  def condition(self, images, labels):
    return Condition()


class _MeasurementTask(Task):
  """Images of which a `Measurement` is given."""

  uses_images = True

  def given(self, condition, images):
    return condition.finish(jnp.full_like(images, jnp.min(images)))


def _regions(size: int) -> dict[str, np.ndarray]:
  """Known pixels, (H, W), by the name of what is to be drawn."""
  known = {}
  for name, index in {
    'right': np.s_[:, size // 2 :],
    'left': np.s_[:, : size // 2],
    'bottom': np.s_[size // 2 :],
    'top': np.s_[: size // 2],
    'center': np.s_[size // 4 : -size // 4, size // 4 : -size // 4],
  }.items():
    known[name] = np.ones((size, size), np.float32)
    known[name][index] = 0
  known['random'] = (np.random.RandomState(0).rand(size, size) < 0.25).astype(np.float32)
  return known


@register_task(name='inpaint')
class Inpaint(_MeasurementTask):
  """Draws the part of the image that `sampling.mask` names."""

  def __init__(self, config, sde, inverse_scaler):
    super().__init__(config, sde, inverse_scaler)
    regions = _regions(config.data.image_size)
    if self.settings.mask not in regions:
      raise UserError(
        f'Unknown sampling.mask {self.settings.mask!r}: choose one of {", ".join(regions)}.'
      )
    self.mask = regions[self.settings.mask][None, :, :, None]

  def condition(self, images, labels):
    return inpainting(self.sde, images, self.mask)


@register_task(name='colorize')
class Colorize(_MeasurementTask):
  """Gives colours to the mean over the channels."""

  def condition(self, images, labels):
    if images.shape[-1] == 1:
      raise UserError(
        'sampling.task=colorize needs images in colour, data.num_channels=3: these have one '
        'channel.'
      )
    return colorization(self.sde, images)


@register_task(name='superres')
class SuperResolution(_MeasurementTask):
  """Sharpens images of which the means of blocks are given."""

  def condition(self, images, labels):
    return super_resolution(self.sde, images, self.settings.superres_factor)


@register_task(name='class')
class ClassConditional(Task):
  """Images of the class `sampling.label`, or of all classes in turn."""

  def __init__(self, config, sde, inverse_scaler):
    super().__init__(config, sde, inverse_scaler)
    trained = load_classifier(config.classifier.checkpoint)
    data = config.data
    shape = (data.image_size, data.image_size, data.num_channels)
    if trained.image_shape != shape:
      raise UserError(
        f'{config.classifier.checkpoint} is a classifier of images of shape {trained.image_shape}, '
        f'not {shape}: train one with --mode=train_classifier and name it in '
        f'config.classifier.checkpoint.'
      )
    self.num_classes = trained.module.num_classes
    if not -1 <= self.settings.label < self.num_classes:
      raise UserError(
        f'sampling.label={self.settings.label} must be a class, 0 to {self.num_classes - 1}, or -1 '
        f'for all in turn.'
      )
    self.class_score = classifier_score(sde, trained.logits, inverse_scaler)

  def labels(self, index):
    if self.settings.label >= 0:
      return np.full(len(index), self.settings.label)
    return index % self.num_classes

  def condition(self, images, labels):
    return ClassGuidance(
      labels=labels, class_score=self.class_score, scale=self.settings.guidance_scale
    )


def check(config: Any) -> None:
  """Raises `UserError` for a task that does not exist."""
  _TASKS.get(config.sampling.task)


def get_task(config: Any, sde: SDE, inverse_scaler: Scaler) -> Task:
  """The task that `sampling.task` names.

  Raises:
    UserError: for an unknown one, or settings that it cannot do.
  """
  return _TASKS.get(config.sampling.task)(config, sde, inverse_scaler)


def _pc_sampler_of_any_batch(
  sde: SDE,
  model: nn.Module,
  predictor: type[Predictor] | None,
  corrector: type[Corrector] | None,
  inverse_scaler: Scaler,
  *settings: Any,
) -> Callable[[jax.Array, State, tuple[int, ...], Condition], jax.Array]:
  """A PC sampler that is built anew for each shape that it meets."""

  @functools.cache
  def sampler_of(shape):
    return sampling.get_pc_sampler(
      sde, model, shape, predictor, corrector, inverse_scaler, *settings
    )

  return lambda rng, state, shape, condition: sampler_of(shape)(rng, state, None, condition)[0]


def get_pc_inpainter(
  sde: SDE,
  model: nn.Module,
  predictor: type[Predictor] | None,
  corrector: type[Corrector] | None,
  inverse_scaler: Scaler,
  snr: float,
  n_steps: int = 1,
  probability_flow: bool = False,
  continuous: bool = False,
  denoise: bool = True,
  eps: float = 1e-5,
) -> Callable[[jax.Array, State, jax.Array, jax.Array], jax.Array]:
  """The function `(rng, state, data, mask) -> images` that fills in where `mask` is zero.

  `data` (B, H, W, C) are in the network's range; `mask` broadcasts to them. With `denoise`, known
  pixels come back exactly; without it, with the noise of the last update, as the reference has it.
  The other arguments are those of `sampling.get_pc_sampler`.
  """
  settings = snr, n_steps, probability_flow, continuous, denoise, eps
  sampler = _pc_sampler_of_any_batch(sde, model, predictor, corrector, inverse_scaler, *settings)

  def inpainter(rng, state, data, mask):
    condition = inpainting(sde, data, mask).replace(exact=denoise)
    return sampler(rng, state, data.shape, condition)

  return inpainter


def get_pc_colorizer(
  sde: SDE,
  model: nn.Module,
  predictor: type[Predictor] | None,
  corrector: type[Corrector] | None,
  inverse_scaler: Scaler,
  snr: float,
  n_steps: int = 1,
  probability_flow: bool = False,
  continuous: bool = False,
  denoise: bool = True,
  eps: float = 1e-5,
) -> Callable[[jax.Array, State, jax.Array], jax.Array]:
  """The function `(rng, state, gray) -> images` that gives colours to gray-scale images.

  `gray` (B, H, W, C) are in the network's range, with equal channels. With `denoise`, their mean
  over the channels comes back exactly; without it, with the noise of the last update, as the
  reference has it. The other arguments are those of `sampling.get_pc_sampler`.
  """
  settings = snr, n_steps, probability_flow, continuous, denoise, eps
  sampler = _pc_sampler_of_any_batch(sde, model, predictor, corrector, inverse_scaler, *settings)

  def colorizer(rng, state, gray):
    condition = colorization(sde, gray).replace(exact=denoise)
    return sampler(rng, state, gray.shape, condition)

  return colorizer


def get_pc_conditional_sampler(
  sde: SDE,
  score_model: nn.Module,
  classifier: nn.Module,
  classifier_params: Any,
  shape: tuple[int, ...],
  predictor: type[Predictor] | None,
  corrector: type[Corrector] | None,
  inverse_scaler: Scaler,
  snr: float,
  n_steps: int = 1,
  probability_flow: bool = False,
  continuous: bool = False,
  denoise: bool = True,
  eps: float = 1e-5,
  scale: float = 1.0,
) -> Callable[[jax.Array, State, jax.Array], jax.Array]:
  """The function `(rng, state, labels) -> images` of the given classes (Eq. 14).

  Args:
    sde: the forward SDE.
    score_model: the score network.
    classifier: a noise-conditional classifier, see `models.classifier.create_classifier`.
    classifier_params: its parameters.
    shape: (B, H, W, C) over all devices.
    predictor: as the arguments that follow, of `sampling.get_pc_sampler`.
    corrector: a `Corrector` class; None for none.
    inverse_scaler: from the network's range to [0, 1].
    snr: signal-to-noise ratio of the corrector.
    n_steps: corrector steps before each predictor step.
    probability_flow: solve the probability flow ODE with the predictor.
    continuous: whether the score network was trained on continuous time.
    denoise: return the last step without its noise.
    eps: the last time.
    scale: of the guidance.
  """
  logit_fn = get_logit_fn(classifier, classifier_params)
  class_score = classifier_score(sde, logit_fn, inverse_scaler)
  settings = snr, n_steps, probability_flow, continuous, denoise, eps
  sampler = _pc_sampler_of_any_batch(
    sde, score_model, predictor, corrector, inverse_scaler, *settings
  )
  return lambda rng, state, labels: sampler(
    rng, state, shape, ClassGuidance(labels=labels, class_score=class_score, scale=scale)
  )
