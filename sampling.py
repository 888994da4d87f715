"""Samplers: predictors and correctors (Algorithm 1), and their combination.

A predictor or corrector is a class with `update_fn(rng, x, t) -> (x, x_mean)`, where `x_mean` is
`x` before the noise of the step is added. Register one and its name works in every configuration:

  @register_predictor(name='my_predictor')
  class MyPredictor(Predictor):
    def update_fn(self, rng, x, t): ...
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import parallelism
from errors import UserError
from losses import State
from models import utils as mutils
from registry import Registry
from sde_lib import SDE, ScoreFn, batch_mul

_PREDICTORS = Registry('predictor')
_CORRECTORS = Registry('corrector')
_METHODS = Registry('sampling method')
register_predictor = _PREDICTORS.register
register_corrector = _CORRECTORS.register
register_method = _METHODS.register
get_predictor = _PREDICTORS.get
get_corrector = _CORRECTORS.get

Sampler = Callable[[jax.Array, State], tuple[jax.Array, int]]


class Predictor(abc.ABC):
  """One step of a numerical solver of the reverse SDE.

  Args:
    sde: the forward SDE.
    score_fn: (x, t) -> score.
    probability_flow: solve the probability flow ODE (Eq. 13) instead.
  """

  def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False):
    self.sde = sde
    self.rsde = sde.reverse(score_fn, probability_flow)
    self.score_fn = score_fn
    self.probability_flow = probability_flow

  @abc.abstractmethod
  def update_fn(self, rng: jax.Array, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From x_t to the next, earlier time.

    Args:
      rng: key of this step.
      x: (B, ...).
      t: (B,).

    Returns:
      The new state, and the same without its noise.
    """


class Corrector(abc.ABC):
  """Steps of a Markov chain that leaves p_t invariant.

  Args:
    sde: the forward SDE.
    score_fn: (x, t) -> score.
    snr: signal-to-noise ratio that sets the step size.
    n_steps: number of steps.
  """

  def __init__(self, sde: SDE, score_fn: ScoreFn, snr: float, n_steps: int):
    self.sde = sde
    self.score_fn = score_fn
    self.snr = snr
    self.n_steps = n_steps

  @abc.abstractmethod
  def update_fn(self, rng: jax.Array, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`n_steps` steps at the fixed time `t`; arguments and returns as `Predictor.update_fn`."""


@register_predictor(name='euler_maruyama')
class EulerMaruyamaPredictor(Predictor):
  """Euler-Maruyama for the reverse SDE with the step T / N."""

  def update_fn(self, rng, x, t):
    dt = -self.rsde.T / self.rsde.N
    z = jax.random.normal(rng, x.shape)
    drift, diffusion = self.rsde.sde(x, t)
    x_mean = x + drift * dt
    return x_mean + batch_mul(diffusion, (-dt) ** 0.5 * z), x_mean


@register_predictor(name='reverse_diffusion')
class ReverseDiffusionPredictor(Predictor):
  """The reverse diffusion sampler (Eq. 46): discretized as the forward chain is."""

  def update_fn(self, rng, x, t):
    f, G = self.rsde.discretize(x, t)
    z = jax.random.normal(rng, x.shape)
    x_mean = x - f
    return x_mean + batch_mul(G, z), x_mean


@register_predictor(name='ancestral_sampling')
class AncestralSamplingPredictor(Predictor):
  """Ancestral sampling of the discrete chain: Eq. 4 for the VP SDE, Eq. 47 for the VE SDE."""

  def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False):
    if probability_flow:
      raise UserError(
        'The predictor ancestral_sampling has no probability flow: set '
        'sampling.probability_flow=False or choose reverse_diffusion or euler_maruyama.'
      )
    super().__init__(sde, score_fn, probability_flow)

  def update_fn(self, rng, x, t):
    x_mean, std = self.sde.ancestral_step(self.score_fn, x, t)
    z = jax.random.normal(rng, x.shape)
    return x_mean + batch_mul(std, z), x_mean


@register_predictor(name='none')
class NonePredictor(Predictor):
  """Leaves x as it is, for sampling with a corrector alone."""

  def update_fn(self, rng, x, t):
    return x, x


class _LangevinSteps(Corrector):
  """x <- x + eps score + sqrt(2 eps) z, repeated; subclasses choose eps."""

  @abc.abstractmethod
  def step_size(self, x: jax.Array, t: jax.Array, score: jax.Array, z: jax.Array) -> jax.Array:
    """eps, (B,)."""

  def update_fn(self, rng, x, t):
    def step(_, carry):
      rng, x, _ = carry
      rng, step_rng = jax.random.split(rng)
      score = self.score_fn(x, t)
      z = jax.random.normal(step_rng, x.shape)
      eps = self.step_size(x, t, score, z)
      x_mean = x + batch_mul(eps, score)
      return rng, x_mean + batch_mul(jnp.sqrt(2 * eps), z), x_mean

    _, x, x_mean = jax.lax.fori_loop(0, self.n_steps, step, (rng, x, x))
    return x, x_mean


@register_corrector(name='langevin')
class LangevinCorrector(_LangevinSteps):
  """Langevin dynamics (Algorithms 4 and 5), eps = 2 alpha (snr ||z|| / ||score||)^2.

  The norms are means over the whole batch, on however many devices: samples depend, slightly, on
  the batch that they are drawn in.
  """

  def step_size(self, x, t, score, z):
    ratio = self.snr * _mean_norm(z) / _mean_norm(score)
    return 2 * self.sde.langevin_alpha(t) * ratio**2


@register_corrector(name='ald')
class AnnealedLangevinDynamics(_LangevinSteps):
  """Annealed Langevin dynamics of NCSN, eps = 2 alpha (snr std(t))^2."""

  def step_size(self, x, t, score, z):
    std = self.sde.marginal_prob(jnp.zeros_like(x), t)[1]
    return 2 * self.sde.langevin_alpha(t) * (self.snr * std) ** 2


@register_corrector(name='none')
class NoneCorrector(Corrector):
  """Leaves x as it is, for sampling with a predictor alone."""

  def update_fn(self, rng, x, t):
    return x, x


def _mean_norm(x: jax.Array) -> jax.Array:
  return jnp.mean(jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=-1))


def pc_loop(
  rng: jax.Array,
  sde: SDE,
  shape: tuple[int, ...],
  predictor: Predictor,
  corrector: Corrector,
  eps: float,
) -> tuple[jax.Array, jax.Array]:
  """Algorithm 1 over `sde.N` times from T to `eps`; returns the last x and its mean.

  Each step corrects at its time and then predicts the next: the order of the reference
  implementation, whose outputs these are. Algorithm 1 as printed has the two the other way about.
  """
  timesteps = jnp.linspace(sde.T, eps, sde.N)
  rng, prior_rng = jax.random.split(rng)
  x = parallelism.shard_batch(sde.prior_sampling(prior_rng, shape))

  def step(i, carry):
    rng, x, _ = carry
    t = jnp.full((shape[0],), timesteps[i])
    rng, corrector_rng = jax.random.split(rng)
    x, _ = corrector.update_fn(corrector_rng, x, t)
    rng, predictor_rng = jax.random.split(rng)
    x, x_mean = predictor.update_fn(predictor_rng, x, t)
    return rng, x, x_mean

  _, x, x_mean = jax.lax.fori_loop(0, sde.N, step, (rng, x, x))
  return x, x_mean


def get_pc_sampler(
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  predictor: type[Predictor] | None,
  corrector: type[Corrector] | None,
  inverse_scaler: Callable[[jax.Array], jax.Array],
  snr: float,
  n_steps: int = 1,
  probability_flow: bool = False,
  continuous: bool = False,
  denoise: bool = True,
  eps: float = 1e-3,
) -> Sampler:
  """A predictor-corrector sampler `(rng, state) -> (samples, number of network calls)`.

  Args:
    sde: the forward SDE; `sde.N` is the number of steps.
    model: the network.
    shape: (B, H, W, C) over all devices.
    predictor: a `Predictor` class; None for none.
    corrector: a `Corrector` class; None for none.
    inverse_scaler: from the network's range to [0, 1].
    snr: signal-to-noise ratio of the corrector.
    n_steps: corrector steps after each predictor step.
    probability_flow: solve the probability flow ODE with the predictor.
    continuous: whether the network was trained on continuous time.
    denoise: return the last step without its noise.
    eps: the last time.

  The number of calls is N (n_steps + 1), as the reference counts it, also where the predictor or
  the corrector is 'none'.
  """
  predictor = predictor or NonePredictor
  corrector = corrector or NoneCorrector
  predictor(sde, lambda x, t: x, probability_flow)  # refuses a bad combination before compilation

  @jax.jit
  def sample(rng, params, model_state):
    score_fn = mutils.get_score_fn(sde, model, params, model_state, False, continuous)
    x, x_mean = pc_loop(
      rng,
      sde,
      shape,
      predictor(sde, score_fn, probability_flow),
      corrector(sde, score_fn, snr, n_steps),
      eps,
    )
    return inverse_scaler(x_mean if denoise else x)

  def pc_sampler(rng: jax.Array, state: State) -> tuple[jax.Array, int]:
    return sample(rng, state.params_ema, state.model_state), sde.N * (n_steps + 1)

  return pc_sampler


@register_method(name='pc')
def _pc_method(config, sde, model, shape, inverse_scaler, eps) -> Sampler:
  return get_pc_sampler(
    _with_steps(config, sde),
    model,
    shape,
    get_predictor(config.sampling.predictor.lower()),
    get_corrector(config.sampling.corrector.lower()),
    inverse_scaler,
    snr=config.sampling.snr,
    n_steps=config.sampling.n_steps_each,
    probability_flow=config.sampling.probability_flow,
    continuous=config.training.continuous,
    denoise=config.sampling.noise_removal,
    eps=eps,
  )


def _with_steps(config: Any, sde: SDE) -> SDE:
  """The SDE in `sampling.n_steps` steps, where that is set."""
  n_steps = config.sampling.n_steps
  if n_steps and not config.training.continuous:
    raise UserError(
      f'sampling.n_steps={n_steps} needs a network that was trained on continuous time: this one '
      f'knows the {sde.N} steps of model.num_scales only; set sampling.n_steps=0.'
    )
  return dataclasses.replace(sde, N=n_steps) if n_steps else sde


def check(config: Any, sde: SDE) -> None:
  """Raises `UserError` for names that do not exist or settings that do not go together."""
  get_sampling_fn(config, sde, None, (2, 2, 2, 1), lambda x: x)  # compiles nothing
  predictor = get_predictor(config.sampling.predictor.lower())
  corrector = get_corrector(config.sampling.corrector.lower())
  settings = config.sampling
  x, t = jnp.zeros((2, 2, 2, 1)), jnp.ones((2,))
  for solver in (
    predictor(sde, lambda x, t: x, settings.probability_flow),
    corrector(sde, lambda x, t: x, settings.snr, settings.n_steps_each),
  ):
    jax.eval_shape(solver.update_fn, jax.random.PRNGKey(0), x, t)


def get_sampling_fn(
  config: Any,
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  inverse_scaler: Callable[[jax.Array], jax.Array],
  eps: float | None = None,
) -> Sampler:
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
  make = _METHODS.get(config.sampling.method.lower())
  return make(config, sde, model, shape, inverse_scaler, sde.sampling_eps if eps is None else eps)
