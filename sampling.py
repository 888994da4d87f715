"""Samplers: predictors and correctors (Algorithm 1), the probability flow ODE, few-step solvers.

A predictor or corrector is a class with `update_fn(rng, x, t) -> (x, x_mean)`, where `x_mean` is
`x` before the noise of the step is added. Once it is registered, its name works in every
configuration:

    @register_predictor(name='my_predictor')
    class MyPredictor(Predictor):
      def update_fn(self, rng, x, t): ...

A `Sampler` is a sampling algorithm in steps; a `Condition` is the conditioning of its samples. The
names below come from the package `samplers`. Importing this module registers all of its samplers.

Algorithm 1 is that of Song et al., "Score-based generative modeling through stochastic differential
equations", ICLR 2021, https://arxiv.org/abs/2011.13456. NFE is the number of function evaluations,
that is, of calls of the network.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from runtime.array_types import RandomKey, Scaler
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
  check_last_time,
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
from samplers.latents import Encoder, get_encoder, interpolate, with_temperature
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
  'Encoder',
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


def get_sampler(config: ConfigDict, sde: SDE, eps: float | None = None) -> Sampler:
  """The sampler that `config.sampling` describes; the arguments are those of `get_sampling_fn`.

  Raises:
    UserError: if a name is unknown or a setting is out of range.
  """
  make = SAMPLERS.get(config.sampling.method)
  eps = sde.sampling_eps if eps is None else eps
  check_last_time(eps, sde.T)
  return make(config, sde, eps)


def check(config: ConfigDict, sde: SDE, condition: Condition | None = None) -> None:
  """Checks the settings of a sampler without computing anything.

  Two images are traced with a placeholder of the score.

  Args:
    config: the configuration; `sampling` and the shape of images in `data` are read.
    sde: the forward SDE.
    condition: the conditioning of two images; none by default.

  Raises:
    UserError: if a name is unknown or settings contradict each other.
  """
  data = config.data
  shape = (2, data.image_size, data.image_size, data.num_channels)
  sampler, score_fn = get_sampler(config, sde), lambda x, t: -x
  sample = functools.partial(run, sampler, score_fn, shape=shape, condition=condition)
  jax.eval_shape(sample, jax.random.PRNGKey(0))


def batch_rng(config: ConfigDict, root: RandomKey, number: int, *, size: int) -> RandomKey:
  """The `rng` of a sampler for one batch of many.

  Args:
    config: the configuration, of which `sampling.per_image_seeds` is read.
    root: the key of all batches.
    number: the number of the batch, from 0.
    size: the number of images in each batch.

  Returns:
    One key; or with `per_image_seeds` an array of `size` keys, which depend on nothing but the
    number of the image among all.
  """
  if not config.sampling.per_image_seeds:
    return jax.random.fold_in(root, number)
  return jax.vmap(jax.random.fold_in, (None, 0))(root, number * size + jnp.arange(size))


def get_sampling_fn(
  config: ConfigDict,
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  inverse_scaler: Scaler,
  eps: float | None = None,
) -> SamplingFn:
  """The sampler that `config.sampling` describes, as a function `(rng, state) -> (samples, NFE)`.

  Args:
    config: the configuration, of which `sampling` and `training.continuous` are read.
    sde: the forward SDE.
    model: the network.
    shape: (B, H, W, C) over all devices.
    inverse_scaler: from the network's range to [0, 1].
    eps: the last time; None takes `sde.sampling_eps`.

  Returns:
    The function that `compile_sampler` returns, see `SamplingFn`.

  Raises:
    UserError: if a name is unknown or a setting is out of range.
  """
  return compile_sampler(
    get_sampler(config, sde, eps),
    sde,
    model,
    shape=shape,
    inverse_scaler=inverse_scaler,
    continuous=config.training.continuous,
    frame_every=config.sampling.trajectory_every,
  )
