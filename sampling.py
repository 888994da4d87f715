"""Samplers: predictors and correctors (Algorithm 1), the probability flow ODE, few-step methods.

A predictor or corrector is a class with `update_fn(rng, x, t) -> (x, x_mean)`, where `x_mean` is
`x` before the noise of the step is added. Register one and its name works in every configuration:

  @register_predictor(name='my_predictor')
  class MyPredictor(Predictor):
    def update_fn(self, rng, x, t): ...

A `Sampler` is a whole way of sampling, cut into steps; a `Condition` is what the samples shall
fulfil. The names below come from the room `samplers/`, whose methods are all registered by
importing this module.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from samplers.base import (
  _CORRECTORS,
  _PREDICTORS,
  SAMPLERS,
  Callback,
  Condition,
  Corrector,
  Predictor,
  Sampler,
  SamplingFn,
  UpdateFn,
  compile_sampler,
  get_corrector,
  get_predictor,
  register_corrector,
  register_predictor,
  register_sampler,
  run,
)
from samplers.few_step import (
  DDIM,
  DPMSolverPP,
  Heun,
  NoiseLevelSampler,
  ProbabilityFlow,
  Solver,
  get_denoiser,
  noise_level,
  register_time_grid,
  time_of_noise_level,
)
from samplers.latents import get_encoder, interpolate, with_temperature
from samplers.ode import ODESampler, get_ode_sampler
from samplers.predictor_corrector import (
  AncestralSamplingPredictor,
  AnnealedLangevinDynamics,
  EulerMaruyamaPredictor,
  LangevinCorrector,
  NoneCorrector,
  NonePredictor,
  PredictorCorrector,
  ReverseDiffusionPredictor,
  get_pc_sampler,
)
from sde_lib import SDE

__all__ = [
  'DDIM',
  '_CORRECTORS',
  '_PREDICTORS',
  'AncestralSamplingPredictor',
  'AnnealedLangevinDynamics',
  'Callback',
  'Condition',
  'Corrector',
  'DPMSolverPP',
  'EulerMaruyamaPredictor',
  'Heun',
  'LangevinCorrector',
  'NoiseLevelSampler',
  'NoneCorrector',
  'NonePredictor',
  'ODESampler',
  'Predictor',
  'PredictorCorrector',
  'ProbabilityFlow',
  'ReverseDiffusionPredictor',
  'Sampler',
  'SamplingFn',
  'Solver',
  'UpdateFn',
  'batch_rng',
  'check',
  'compile_sampler',
  'get_corrector',
  'get_denoiser',
  'get_encoder',
  'get_ode_sampler',
  'get_pc_sampler',
  'get_predictor',
  'get_sampler',
  'get_sampling_fn',
  'interpolate',
  'noise_level',
  'register_corrector',
  'register_predictor',
  'register_sampler',
  'register_time_grid',
  'run',
  'time_of_noise_level',
  'with_temperature',
]


def get_sampler(config: Any, sde: SDE, eps: float | None = None) -> Sampler:
  """The way of sampling that `config.sampling` describes; `eps` is as in `get_sampling_fn`."""
  make = SAMPLERS.get(config.sampling.method)
  return make(config, sde, sde.sampling_eps if eps is None else eps)


def check(config: Any, sde: SDE, condition: Condition | None = None) -> None:
  """Raises `UserError` for names that do not exist or settings that do not go together.

  Nothing is computed: one step is traced with a score that is none.
  """
  data = config.data
  shape = (2, data.image_size, data.image_size, data.num_channels)
  method, score_fn = get_sampler(config, sde), lambda x, t: -x
  sample = functools.partial(run, method, score_fn, shape=shape, condition=condition)
  jax.eval_shape(sample, jax.random.PRNGKey(0))


def batch_rng(config: Any, root: jax.Array, number: int, size: int) -> jax.Array:
  """What a sampler gets for batch `number`: a key, or with `per_image_seeds` one for each image."""
  if not config.sampling.per_image_seeds:
    return jax.random.fold_in(root, number)
  return jax.vmap(jax.random.fold_in, (None, 0))(root, number * size + jnp.arange(size))


def get_sampling_fn(
  config: Any,
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  inverse_scaler: Callable[[jax.Array], jax.Array],
  eps: float | None = None,
) -> SamplingFn:
  """The sampler that `config.sampling` describes, `(rng, state) -> (samples, network calls)`.

  Args:
    config: reads `sampling` and `training.continuous`.
    sde: the forward SDE.
    model: the network.
    shape: (B, H, W, C) over all devices.
    inverse_scaler: from the network's range to [0, 1].
    eps: the last time; None takes the SDE's own.

  Raises:
    UserError: for an unknown method, predictor or corrector, or one that the SDE cannot serve.
  """
  return compile_sampler(
    get_sampler(config, sde, eps),
    sde,
    model,
    shape,
    inverse_scaler,
    config.training.continuous,
    frame_every=config.sampling.trajectory_every,
  )
