"""Controllable generation (section 5, appendix I): the tasks of `--mode=sample`, PC factories.

A task makes a condition of test images, labels and settings; register one and `sampling.task` names
it. The conditions themselves, which work with every sampler, come from `samplers/conditions.py`.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import sampling
from models.classifier import classifier_score, get_logit_fn, load_classifier
from runtime.errors import UserError
from runtime.registry import Registry
from samplers.conditions import (
  ClassGuidance,
  FromBlocks,
  Imputation,
  PosteriorGuidance,
  ToBlocks,
  colorization,
  constant_first_basis,
  inpainting,
  super_resolution,
)
from sampling import Condition, Corrector, Predictor
from sde_lib import SDE
from train_state import State

Scaler = Callable[[jax.Array], jax.Array]

__all__ = [
  'ClassConditional',
  'ClassGuidance',
  'Colorize',
  'FromBlocks',
  'Imputation',
  'Inpaint',
  'PosteriorGuidance',
  'SamplingTask',
  'SuperResolution',
  'ToBlocks',
  'Unconditional',
  'check',
  'colorization',
  'constant_first_basis',
  'get_pc_colorizer',
  'get_pc_conditional_sampler',
  'get_pc_inpainter',
  'get_task',
  'inpainting',
  'register_task',
  'super_resolution',
]

_TASKS = Registry('sampling task')
register_task = _TASKS.register


class SamplingTask(abc.ABC):
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

  def observed(self, condition: Condition, images: jax.Array) -> jax.Array:
    """What of the images the condition knows, as images, for tasks that use test images."""
    return images


@register_task(name='unconditional')
class Unconditional(SamplingTask):
  """Samples of the model."""

  def condition(self, images, labels):
    return Condition()


class _ImputationTask(SamplingTask):
  """Images of which a `Imputation` is given."""

  uses_images = True

  def observed(self, condition, images):
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
class Inpaint(_ImputationTask):
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
class Colorize(_ImputationTask):
  """Gives colours to the mean over the channels."""

  def condition(self, images, labels):
    if images.shape[-1] == 1:
      raise UserError(
        'sampling.task=colorize needs images in colour, data.num_channels=3: these have one '
        'channel.'
      )
    return colorization(self.sde, images)


@register_task(name='superres')
class SuperResolution(_ImputationTask):
  """Sharpens images of which the means of blocks are given."""

  def condition(self, images, labels):
    return super_resolution(self.sde, images, self.settings.superres_factor)


@register_task(name='class')
class ClassConditional(SamplingTask):
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


def get_task(config: Any, sde: SDE, inverse_scaler: Scaler) -> SamplingTask:
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
