"""A trained score network and what one does with it."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float
from ml_collections import ConfigDict

import datasets
import likelihood
import sampling
import sde_lib
from models import utils as mutils
from modes.drawing import TaskSampler, round_sizes
from runtime import configuration, reporting
from runtime.array_types import GreyLevels, Images, PerExample
from runtime.errors import UserError
from runtime.rng import check_seed, stream
from runtime.settings import read_keys
from samplers.base import Callback, check_floats
from score_sde.arguments import (
  as_floats,
  check_continuous,
  check_images,
  check_latents,
  check_times,
  in_parts,
)
from train_state import State

_Images = Float[np.ndarray, 'B H W C']
_PerImage = Float[np.ndarray, 'B']

_OF_FILES = ('num_samples', 'trajectory_every')  # settings of what `--mode=sample` writes


class TrainedModel:
  """A trained score network; `score_sde.load` opens one.

  Images are arrays (B, H, W, C): floats in [0, 1], or uint8 grey levels. All that is random follows
  from the `seed` of a call. No batch has more than `config.sampling.batch_size` images. What a call
  compiles is kept for calls with the same settings and batch size.

  Attributes:
    config: the configuration that it was trained with, complete and checked.
    model: the network, a Flax module.
    state: its EMA parameters.
    step: the number of steps that it was trained for.
    sde: the forward SDE.
    scaler: from [0, 1] to the network's range.
    inverse_scaler: from the network's range to [0, 1].
    image_shape: (H, W, C).
  """

  def __init__(self, config: ConfigDict, model: nn.Module, state: State):
    data = config.data
    self.config, self.model, self.state = config, model, state
    self.step = int(state.step)
    self.sde = sde_lib.get_sde(config)
    self.scaler = datasets.get_data_scaler(config)
    self.inverse_scaler = datasets.get_data_inverse_scaler(config)
    self.image_shape = (data.image_size, data.image_size, data.num_channels)
    self._compiled: dict[tuple[str, ...], Any] = {}

  def __repr__(self) -> str:
    size = 'x'.join(map(str, self.image_shape))
    return f'<TrainedModel {self.config.model.name} of {size}, {self.sde}, step {self.step}>'

  def sample(
    self,
    n: int | None = None,
    *,
    images: Images | GreyLevels | None = None,
    seed: int = 0,
    classifier: str | pathlib.Path | None = None,
    callback: Callback | None = None,
    **settings: Any,
  ) -> tuple[_Images, int]:
    """Draws images: those of `--mode=sample` with the same settings, seed and batch size.

    Args:
      n: how many; by default one for each of `images`.
      images: what the task is conditioned on, such as the images to be inpainted.
      seed: of all random numbers.
      classifier: the file that guides `task='class'`; by default that of the configuration.
      callback: called between the steps of a batch, see `sampling.SamplingFn`.
      **settings: fields of `config.sampling`, such as `method='dpm_solver++'`, `n_steps=20`.

    Returns:
      Images in [0, 1], float32 (n, H, W, C), and the NFE of a batch (the largest of several): how
      often the network was called.

    Raises:
      UserError: if a setting is unknown or wrong, or the images fit neither network nor task.
      FloatingPointError: if a sample has a value that is NaN or infinite.
    """
    if images is not None:
      images = as_floats(check_images(images, self.image_shape))
    n, seed = _count(n, images), check_seed(seed)
    config = configuration.override(self.config, 'sampling', settings, fixed=_OF_FILES)
    size = min(n, config.sampling.batch_size)
    if size < 1:
      raise UserError(f'sampling.batch_size={size} must be at least 1.')
    config.sampling.batch_size = size
    if classifier is not None:
      config.classifier.checkpoint = str(classifier)
    draw, sampler, read = self._once(
      self._compile_sampler, config, config.sampling, config.classifier.checkpoint
    )
    if unread := [name for name in settings if f'sampling.{name}' not in read]:
      raise UserError(
        f'{", ".join(unread)} has no effect with task={config.sampling.task!r} and method='
        f'{config.sampling.method!r}: leave it out, or choose another.'
      )
    _check_use(config.sampling.task, draw.task.uses_images, images)
    if images is None:
      images = np.broadcast_to(np.float32(0), (n, *self.image_shape))
    samples, most = [], 0
    for number, kept in enumerate(round_sizes(n, size)):
      index = number * size + np.arange(size)
      condition = draw.condition(images[np.minimum(index, n - 1)], draw.task.labels(index))
      rng = draw.rng(seed, number)
      x, nfe = draw.draw(sampler, self.state, rng, condition=condition, callback=callback)
      samples.append(np.clip(x[:kept], 0, 1))
      most = max(most, nfe)
    return np.concatenate(samples), most

  def _compile_sampler(
    self, config: ConfigDict
  ) -> tuple[TaskSampler, sampling.SamplingFn, tuple[str, ...]]:
    """The sampler, and the names of the settings that it depends on."""
    draw = TaskSampler(config, self.sde)
    read = read_keys(lambda config: TaskSampler(config, self.sde), config)
    return draw, draw.compile(self.model), read

  def bits_per_dim(
    self, images: Images | GreyLevels, *, seed: int = 0, **settings: Any
  ) -> _PerImage:
    """The negative log-likelihood of each image, (B,), in bits/dim, of 256 grey levels.

    A mean below zero, which cannot be, is logged as a warning: the tolerances are too large.

    Args:
      images: uint8 grey levels, spread evenly within each level; or floats, spread already.
      seed: of the spreading and of the probes of the divergence.
      **settings: fields of `config.likelihood`, such as `num_probes=4`.

    Raises:
      UserError: if a setting is unknown or wrong, or the images do not fit the network.
      FloatingPointError: if a result is NaN or infinite.
    """
    images = check_images(images, self.image_shape)
    check_continuous(images)
    config = configuration.override(self.config, 'likelihood', settings)
    likelihood_fn = self._once(self._compile_likelihood, config, config.likelihood)

    def bits(rng: jax.Array, x: np.ndarray) -> PerExample:
      return likelihood_fn(rng, self.state, x if x.dtype == np.uint8 else self.scaler(x))[0]

    bpd = self._map(bits, images, seed)
    if warning := likelihood.doubt(float(bpd.mean())):
      logging.warning('%s', warning)
    return bpd

  def _compile_likelihood(self, config: ConfigDict) -> likelihood.LikelihoodFn:
    return likelihood.from_config(config, self.sde, self.model, inverse_scaler=self.inverse_scaler)

  def encode(self, images: Images | GreyLevels, *, seed: int = 0, **settings: Any) -> _Images:
    """The latents x_T of images under the probability flow, (B, H, W, C).

    Args:
      images: floats; or uint8 grey levels, which are spread evenly within each level.
      seed: of the spreading, as in `bits_per_dim`.
      **settings: `ode_solver`, `rtol`, `atol` and `eps` of `config.likelihood`.

    Raises:
      UserError: if a setting is unknown or wrong, or the images do not fit the network.
      FloatingPointError: if a result is NaN or infinite.
    """
    images = check_images(images, self.image_shape)
    config = configuration.override(self.config, 'likelihood', settings)
    encoder = self._once(self._compile_encoder, config, config.likelihood)

    def encode(rng: jax.Array, x: np.ndarray) -> Images:
      if x.dtype == np.uint8:
        x = likelihood.dequantize(jax.random.split(rng)[1], x)
      return encoder(self.state, self.scaler(jnp.asarray(x)))[0]

    return self._map(encode, images, seed)

  def _compile_encoder(self, config: ConfigDict) -> sampling.Encoder:
    return sampling.get_encoder(self.sde, self.model, **self._flow(config))

  def decode(self, z: Images, **settings: Any) -> _Images:
    """The images in [0, 1] of latents, both (B, H, W, C): the inverse of `encode`.

    Args:
      z: the latents.
      **settings: as of `encode`.

    Raises:
      UserError: if a setting is unknown or wrong, or the latents do not fit the network.
      FloatingPointError: if a result is NaN or infinite.
    """
    z = check_latents(z, self.image_shape)
    config = configuration.override(self.config, 'likelihood', settings)
    decoder = self._once(self._compile_decoder, config, config.likelihood)
    return np.clip(self._map(lambda rng, z: decoder(rng, self.state, z)[0], z, 0), 0, 1)

  def _compile_decoder(self, config: ConfigDict) -> sampling.SamplingFn:
    shape = (1, *self.image_shape)  # latents bring their own number
    return sampling.get_ode_sampler(
      self.sde, self.model, shape, self.inverse_scaler, **self._flow(config)
    )

  def _flow(self, config: ConfigDict) -> dict[str, Any]:
    """The settings of the probability flow and of its solver."""
    settings = config.likelihood
    solver = {'rtol': settings.rtol, 'atol': settings.atol, 'method': settings.ode_solver}
    return {**solver, 'eps': settings.eps, 'continuous': config.training.continuous}

  def score_fn(self, x_t: Images, t: PerExample) -> jax.Array:
    """The score of p_t at x_t, (B, H, W, C), in the network's range; t in (0, T] is (B,).

    It is compiled, and may be called inside other compiled functions.

    Raises:
      UserError: if the shapes do not fit, x_t is not of floats, or a time is not in (0, T]; that is
        not checked inside other compiled functions.
    """
    shape, times = np.shape(x_t), np.shape(t)
    if shape[1:] != self.image_shape or times != shape[:1]:
      raise UserError(
        f'x_t is of shape {shape} and t of shape {times}: pass x_t of shape (B, '
        f'{", ".join(map(str, self.image_shape))}) and t of shape (B,).'
      )
    check_floats(x_t, 'x_t is')
    if not isinstance(t, jax.core.Tracer):
      check_times(t, self.sde.T)
    return self._score(self.state.params_ema, self.state.model_state, x_t, t)

  @functools.cached_property
  def _score(self) -> Callable[..., jax.Array]:
    continuous = self.config.training.continuous

    @jax.jit
    def score(params: Any, model_state: Any, x_t: Images, t: PerExample) -> Images:
      score_fn = mutils.get_score_fn(self.sde, self.model, params, model_state, False, continuous)
      return score_fn(jnp.asarray(x_t, jnp.float32), jnp.asarray(t, jnp.float32))

    return score

  def _once(
    self, build: Callable[[ConfigDict], Any], config: ConfigDict, *read: ConfigDict | str
  ) -> Any:
    """`build(config)`, once for each value of what it reads of the configuration."""
    key = (build.__name__, *(x if isinstance(x, str) else x.to_json() for x in read))
    if key not in self._compiled:
      self._compiled[key] = build(config)
    return self._compiled[key]

  def _map(self, fn: Callable[[jax.Array, Any], Any], x: np.ndarray, seed: int) -> np.ndarray:
    """`fn(rng, batch)` of all images, in batches."""
    root = stream(check_seed(seed), 'bpd')
    parts = enumerate(in_parts(x, self.config.sampling.batch_size))
    results = [np.asarray(fn(jax.random.fold_in(root, i), part)) for i, part in parts]
    reporting.check_finite(np.concatenate(results), 'results', self.step)
    return np.concatenate(results)[: len(x)]


def _count(n: int | None, images: Images | None) -> int:
  """The number of samples, of which `images` must have as many."""
  if n is None and images is None:
    raise UserError('sample() needs the number of images: sample(16).')
  n = len(images) if n is None else n
  if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
    raise UserError(f'n={n!r} must be a whole number of images, at least 1.')
  if images is not None and len(images) != n:
    raise UserError(f'n={n}, but there are {len(images)} images: leave n out.')
  return int(n)


def _check_use(task: str, uses_images: bool, images: Images | None) -> None:
  """Refuses images that the task does not use, and a task without the images that it needs."""
  if uses_images and images is None:
    raise UserError(
      f'task={task!r} is conditioned on images: pass an array (B, H, W, C) as images=.'
    )
  if images is not None and not uses_images:
    raise UserError(
      f"task={task!r} uses no images: leave images= out, or set another task, such as 'inpaint'."
    )
