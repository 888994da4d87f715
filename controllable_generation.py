"""Controllable generation: the tasks of `--mode=sample`, and the factories of the 2021 code.

A task makes a condition from test images, labels and settings. Once it is registered,
`sampling.task` selects it by its name. The conditions themselves, which work with every sampler,
are in `samplers/conditions.py`.

Sections and equation numbers are those of Song et al., "Score-based generative modeling through
stochastic differential equations", ICLR 2021, https://arxiv.org/abs/2011.13456, which treats
controllable generation in section 5 and appendix I.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

import sampling
from models.classifier import classifier_score, get_logit_fn, load_classifier
from runtime.array_types import Array, Images, Labels, RandomKey, Scaler
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
from sampling import Condition, Corrector, Predictor, SamplingFn
from sde_lib import SDE
from train_state import State

PyTree = Any
Index = Int[np.ndarray, 'B']
Region = Float[np.ndarray, 'H W']

__all__ = [
  'ClassConditional',
  'ClassGuidance',
  'Colorize',
  'FromBlocks',
  'GuidedPCSettings',
  'Imputation',
  'Inpaint',
  'PCSettings',
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
  """A task of `--mode=sample`, which makes a condition from test images and labels.

  Attributes:
    uses_images: whether the task needs test images.

  Args:
    config: the configuration, of which `sampling` and what the task needs are read.
    sde: the forward SDE.
    inverse_scaler: from the network's range to [0, 1].
  """

  uses_images: bool = False

  def __init__(self, config: ConfigDict, sde: SDE, inverse_scaler: Scaler):
    self.settings = config.sampling
    self.sde = sde

  @abc.abstractmethod
  def condition(self, images: Images, labels: Labels) -> Condition:
    """The condition from images, (B, H, W, C), in the network's range, and labels, (B,)."""

  def labels(self, index: Index) -> Index:
    """The labels of the samples numbered `index`, both (B,), for tasks that use no test images.

    By default they are -1, which stands for no label.
    """
    return np.full(len(index), -1)

  def observed(self, condition: Condition, images: Images) -> Images:
    """The observed part of `images`, as images (B, H, W, C), for tasks that use test images."""
    return images


@register_task(name='unconditional')
class Unconditional(SamplingTask):
  """Unconditional samples."""

  def condition(self, images: Images, labels: Labels) -> Condition:
    """No conditioning."""
    return Condition()


class _ImputationTask(SamplingTask):
  """A task that observes some coordinates of test images, by an `Imputation`."""

  uses_images = True

  def observed(self, condition: Condition, images: Images) -> Images:
    """The observed coordinates of `images`, (B, H, W, C); the others are those of a dark image."""
    return condition.finish(jnp.full_like(images, jnp.min(images)))


def _regions(size: int) -> dict[str, Region]:
  """The masks of observed pixels, (size, size), by the name of the region to be drawn."""
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
  """Inpainting: draws the region of test images that `sampling.mask` names.

  Raises:
    UserError: if no region has that name.
  """

  def __init__(self, config: ConfigDict, sde: SDE, inverse_scaler: Scaler):
    super().__init__(config, sde, inverse_scaler)
    regions = _regions(config.data.image_size)
    if self.settings.mask not in regions:
      raise UserError(
        f'Unknown sampling.mask {self.settings.mask!r}: choose one of {", ".join(regions)}.'
      )
    self.mask = regions[self.settings.mask][None, :, :, None]

  def condition(self, images: Images, labels: Labels) -> Condition:
    """The condition that the other pixels of `images`, (B, H, W, C), are observed."""
    return inpainting(self.sde, images, self.mask)


@register_task(name='colorize')
class Colorize(_ImputationTask):
  """Colorization: draws the colours of test images from their mean over the channels."""

  def condition(self, images: Images, labels: Labels) -> Condition:
    """The condition that the mean over the channels of `images`, (B, H, W, C), is observed.

    Raises:
      UserError: if the images have one channel.
    """
    if images.shape[-1] == 1:
      raise UserError(
        'sampling.task=colorize needs images in colour, data.num_channels=3, but these have one '
        'channel: choose another task or data set.'
      )
    return colorization(self.sde, images)


@register_task(name='superres')
class SuperResolution(_ImputationTask):
  """Super-resolution: draws test images from the means of their blocks of pixels."""

  def condition(self, images: Images, labels: Labels) -> Condition:
    """The condition that the means over blocks of `images`, (B, H, W, C), are observed.

    Raises:
      UserError: if the blocks do not fit the images.
    """
    return super_resolution(self.sde, images, self.settings.superres_factor)


@register_task(name='class')
class ClassConditional(SamplingTask):
  """Images of the class `sampling.label`, or of all classes in turn if it is -1 (Eq. 14).

  Raises:
    UserError: if the classifier cannot be read or is for images of another shape, or if it has no
      such class.
  """

  def __init__(self, config: ConfigDict, sde: SDE, inverse_scaler: Scaler):
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
        f'sampling.label={self.settings.label} must be a class from 0 to {self.num_classes - 1}: '
        f'set it to one, or to -1 for all in turn.'
      )
    self.class_score = classifier_score(sde, trained.logits, inverse_scaler)

  def labels(self, index: Index) -> Index:
    """The classes of the samples numbered `index`, both (B,)."""
    if self.settings.label >= 0:
      return np.full(len(index), self.settings.label)
    return index % self.num_classes

  def condition(self, images: Images, labels: Labels) -> Condition:
    """The condition that images are of the classes `labels`, (B,)."""
    return ClassGuidance(
      labels=labels, class_score=self.class_score, scale=self.settings.guidance_scale
    )


def check(config: ConfigDict) -> None:
  """Checks the name of the task.

  Raises:
    UserError: if `sampling.task` is not the name of a task.
  """
  _TASKS.get(config.sampling.task)


def get_task(config: ConfigDict, sde: SDE, inverse_scaler: Scaler) -> SamplingTask:
  """The task that `sampling.task` names; the arguments are those of `SamplingTask`.

  Raises:
    UserError: if the name is unknown or the task refuses its settings.
  """
  return _TASKS.get(config.sampling.task)(config, sde, inverse_scaler)


# The factories of the 2021 code.


@dataclasses.dataclass(frozen=True)
class PCSettings:
  """The last arguments of the three factories below, in the order of the 2021 code.

  They are those of `sampling.get_pc_sampler`, but the default of `eps` is different.

  Attributes:
    predictor: a `Predictor` class; None for `NonePredictor`.
    corrector: a `Corrector` class; None for `NoneCorrector`.
    inverse_scaler: from the network's range to [0, 1].
    snr: the signal-to-noise ratio of the corrector.
    n_steps: the number of corrector steps before each predictor step.
    probability_flow: whether the predictor solves the probability flow ODE (Eq. 13).
    continuous: whether the network was trained on continuous time.
    denoise: whether to return the last update without its noise.
    eps: the last time.
  """

  predictor: type[Predictor] | None
  corrector: type[Corrector] | None
  inverse_scaler: Scaler
  snr: float
  n_steps: int = 1
  probability_flow: bool = False
  continuous: bool = False
  denoise: bool = True
  eps: float = 1e-5

  def sampler(
    self, sde: SDE, model: nn.Module
  ) -> Callable[[RandomKey, State, tuple[int, ...], Condition], Images]:
    """The function `(rng, state, shape, condition) -> images`, compiled once for each shape."""

    @functools.cache
    def sampler_of(shape: tuple[int, ...]) -> SamplingFn:
      return sampling.get_pc_sampler(
        sde,
        model,
        shape,
        self.predictor,
        self.corrector,
        self.inverse_scaler,
        self.snr,
        self.n_steps,
        self.probability_flow,
        self.continuous,
        self.denoise,
        self.eps,
      )

    def sample(
      rng: RandomKey, state: State, shape: tuple[int, ...], condition: Condition
    ) -> Images:
      return sampler_of(shape)(rng, state, condition=condition)[0]

    return sample


@dataclasses.dataclass(frozen=True)
class GuidedPCSettings(PCSettings):
  """The last arguments of `get_pc_conditional_sampler`.

  Attributes:
    scale: the factor of the classifier's gradient.
  """

  scale: float = 1.0


def _takes(cls: type[PCSettings]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Replaces the last argument of a factory, `settings`, by the fields of `cls`.

  So the fields are written once, and every factory keeps the signature that it had in 2021.
  """

  def decorate(factory: Callable[..., Any]) -> Callable[..., Any]:
    own = inspect.signature(factory)
    fields = inspect.signature(cls).parameters
    signature = own.replace(parameters=[*list(own.parameters.values())[:-1], *fields.values()])

    @functools.wraps(factory)
    def with_fields(*args: Any, **kwargs: Any) -> Any:
      arguments = signature.bind(*args, **kwargs).arguments
      settings = {name: arguments.pop(name) for name in fields if name in arguments}
      return factory(**arguments, settings=cls(**settings))

    with_fields.__signature__ = signature
    return with_fields

  return decorate


@_takes(PCSettings)
def get_pc_inpainter(
  sde: SDE, model: nn.Module, settings: PCSettings
) -> Callable[[RandomKey, State, Images, Array], Images]:
  """The function `(rng, state, data, mask) -> images` that draws the pixels where `mask` is zero.

  `data`, (B, H, W, C), are in the network's range; `mask` broadcasts to them. With `denoise`, known
  pixels come back exactly; otherwise with the noise of the last update, as in the 2021 code.

  Args:
    sde: the forward SDE; `sde.N` is the number of steps.
    model: the network.
    settings: the fields of `PCSettings`, each as an argument of its own.
  """
  sampler = settings.sampler(sde, model)

  def inpainter(rng: RandomKey, state: State, data: Images, mask: Array) -> Images:
    condition = inpainting(sde, data, mask).replace(exact=settings.denoise)
    return sampler(rng, state, data.shape, condition)

  return inpainter


@_takes(PCSettings)
def get_pc_colorizer(
  sde: SDE, model: nn.Module, settings: PCSettings
) -> Callable[[RandomKey, State, Images], Images]:
  """The function `(rng, state, gray) -> images` that draws the colours of gray-scale images.

  `gray`, (B, H, W, C), are in the network's range, with equal channels. With `denoise`, their mean
  over the channels comes back exactly; otherwise with the noise of the last update, as in the 2021
  code.

  Args:
    sde: the forward SDE; `sde.N` is the number of steps.
    model: the network.
    settings: the fields of `PCSettings`, each as an argument of its own.
  """
  sampler = settings.sampler(sde, model)

  def colorizer(rng: RandomKey, state: State, gray: Images) -> Images:
    condition = colorization(sde, gray).replace(exact=settings.denoise)
    return sampler(rng, state, gray.shape, condition)

  return colorizer


@_takes(GuidedPCSettings)
def get_pc_conditional_sampler(
  sde: SDE,
  score_model: nn.Module,
  classifier: nn.Module,
  classifier_params: PyTree,
  shape: tuple[int, ...],
  settings: GuidedPCSettings,
) -> Callable[[RandomKey, State, Labels], Images]:
  """The function `(rng, state, labels) -> images` of the classes `labels`, (B,) (Eq. 14).

  Args:
    sde: the forward SDE; `sde.N` is the number of steps.
    score_model: the score network.
    classifier: a noise-conditional classifier, see `models.classifier.create_classifier`.
    classifier_params: its parameters.
    shape: (B, H, W, C) over all devices.
    settings: the fields of `GuidedPCSettings`, each as an argument of its own.
  """
  logit_fn = get_logit_fn(classifier, classifier_params)
  class_score = classifier_score(sde, logit_fn, settings.inverse_scaler)
  sampler = settings.sampler(sde, score_model)

  def conditional_sampler(rng: RandomKey, state: State, labels: Labels) -> Images:
    condition = ClassGuidance(labels=labels, class_score=class_score, scale=settings.scale)
    return sampler(rng, state, shape, condition)

  return conditional_sampler
