"""Samplers that need tens of network calls: DDIM, Heun with EDM's noise levels, DPM-Solver++(2M).

With marginals x_t = alpha_t x_0 + sigma_t z and the noise level s = sigma_t / alpha_t, the
probability flow ODE (Eq. 13) of every SDE of the paper is one equation of y = x / alpha,

  dy/ds = (y - D(x_t, t)) / s,   D(x_t, t) = (x_t + sigma_t^2 score(x_t, t)) / alpha_t,

where D is the denoised image (Tweedie's formula). So each solver here serves VE, VP, sub-VP and a
user's own SDE: it sees nothing but s, y and D.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import parallelism
from errors import UserError
from losses import State
from models import utils as mutils
from registry import Registry
from sampling import Sampler, register_method
from sde_lib import SDE, ScoreFn, batch_mul

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]

_TIME_GRIDS = Registry('time grid')
register_time_grid = _TIME_GRIDS.register


def noise_level(sde: SDE, t: jax.Array) -> jax.Array:
  """s(t) = sigma_t / alpha_t, increasing in t; both (n,)."""
  alpha, sigma = sde.marginal_prob(jnp.ones_like(t), t)
  return sigma / alpha


def time_of(sde: SDE, s: jax.Array, eps: float) -> jax.Array:
  """The t in [eps, T] with noise level `s`, by bisection, for any SDE."""

  def halve(_, bounds):
    low, high = bounds
    middle = 0.5 * (low + high)
    above = noise_level(sde, middle) > s
    return jnp.where(above, low, middle), jnp.where(above, middle, high)

  low, high = jnp.full_like(s, eps), jnp.full_like(s, sde.T)
  return jax.lax.fori_loop(0, 40, halve, (low, high))[1]


@register_time_grid(name='uniform')
def uniform_grid(sde: SDE, n: int, eps: float, rho: float) -> jax.Array:
  """Times at equal distances, as the paper's samplers take them."""
  del rho
  return jnp.linspace(sde.T, eps, n)


@register_time_grid(name='edm')
def edm_grid(sde: SDE, n: int, eps: float, rho: float) -> jax.Array:
  """s^(1/rho) at equal distances (Karras et al. 2022, Eq. 5)."""
  ends = noise_level(sde, jnp.asarray([sde.T, eps])) ** (1 / rho)
  return _between(sde, jnp.linspace(ends[0], ends[1], n) ** rho, eps)


@register_time_grid(name='logsnr')
def logsnr_grid(sde: SDE, n: int, eps: float, rho: float) -> jax.Array:
  """log(alpha^2 / sigma^2) at equal distances (Lu et al. 2022)."""
  del rho
  ends = jnp.log(noise_level(sde, jnp.asarray([sde.T, eps])))
  return _between(sde, jnp.exp(jnp.linspace(ends[0], ends[1], n)), eps)


def _between(sde: SDE, s: jax.Array, eps: float) -> jax.Array:
  """The times of decreasing noise levels, from exactly T to exactly eps."""
  return time_of(sde, s, eps).at[0].set(sde.T).at[-1].set(eps)


def get_denoiser(sde: SDE, score_fn: ScoreFn) -> Denoiser:
  """D(x_t, t) = E[x_0 | x_t], by Tweedie's formula."""

  def denoiser(x: jax.Array, t: jax.Array) -> jax.Array:
    alpha, sigma = sde.marginal_prob(jnp.ones_like(t), t)
    return batch_mul(1 / alpha, x + batch_mul(sigma**2, score_fn(x, t)))

  return denoiser


@dataclasses.dataclass(frozen=True)
class Flow:
  """The probability flow ODE in (s, y), on a grid of times.

  Attributes:
    sde: the forward SDE.
    denoiser: D(x_t, t).
    t: decreasing times, (n,).
    eps: the last of them.
  """

  sde: SDE
  denoiser: Denoiser
  t: jax.Array
  eps: float

  @property
  def s(self) -> jax.Array:
    """Noise levels at the times, (n,)."""
    return noise_level(self.sde, self.t)

  def D(self, y: jax.Array, t: jax.Array) -> jax.Array:
    """The denoised image at y = x / alpha and the time `t`, a scalar."""
    t = jnp.full((y.shape[0],), t)
    alpha = self.sde.marginal_prob(jnp.ones_like(t), t)[0]
    return self.denoiser(batch_mul(alpha, y), t)


class Solver(abc.ABC):
  """A numerical solver of the probability flow in (s, y).

  Args:
    churn: how much noise is added again over the whole way, where a solver can (`S_churn` of Karras
      et al. 2022, Algorithm 2).
  """

  evaluations = 1  # calls of the denoiser in a step

  def __init__(self, churn: float = 0.0):
    if churn:
      raise UserError(
        f'sampling.churn={churn} needs the sampling method heun: the others follow the '
        f'probability flow; set sampling.churn=0.'
      )

  def init(self, flow: Flow, y: jax.Array) -> Any:
    """What a step needs of the ones before, first."""
    del flow, y
    return ()

  @abc.abstractmethod
  def step(
    self, flow: Flow, i: jax.Array, rng: jax.Array, y: jax.Array, memory: Any
  ) -> tuple[jax.Array, Any]:
    """From `flow.t[i]` to `flow.t[i + 1]`."""


class DDIM(Solver):
  """DDIM (Song et al. 2021), the exponential Euler method: D is held over the step. Order 1."""

  def step(self, flow, i, rng, y, memory):
    del rng
    s = flow.s
    D = flow.D(y, flow.t[i])
    return D + s[i + 1] / s[i] * (y - D), memory


class Heun(Solver):
  """Heun's method with optional churn (Karras et al. 2022, Algorithm 2). Order 2 without churn."""

  evaluations = 2

  def __init__(self, churn: float = 0.0):
    self.churn = churn

  def step(self, flow, i, rng, y, memory):
    s, t = flow.s[i], flow.t[i]
    if self.churn:
      gamma = min(self.churn / (len(flow.t) - 1), np.sqrt(2) - 1)
      churned = jnp.clip(s * (1 + gamma), s, jnp.maximum(s, flow.s[0]))  # s may round above s[0]
      y = y + jnp.sqrt(churned**2 - s**2) * jax.random.normal(rng, y.shape)
      there = time_of(flow.sde, churned[None], flow.eps)[0]
      s, t = churned, jnp.where(churned > s, there, t)
    following = flow.s[i + 1]
    slope = (y - flow.D(y, t)) / s
    euler = y + (following - s) * slope
    slope_there = (euler - flow.D(euler, flow.t[i + 1])) / following
    return y + (following - s) * (slope + slope_there) / 2, memory


class DPMSolverPP(Solver):
  """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): D is extrapolated from two steps. Order 2."""

  def init(self, flow, y):
    return jnp.zeros_like(y)

  def step(self, flow, i, rng, y, memory):
    del rng
    s = flow.s
    D = flow.D(y, flow.t[i])
    h = jnp.log(s[i] / s[i + 1])
    h_before = jnp.log(s[i - 1] / s[i])
    extrapolated = D + h / (2 * h_before) * (D - memory)
    target = jnp.where(i == 0, D, extrapolated)  # the first step has no predecessor
    return target + s[i + 1] / s[i] * (y - target), D


def get_fast_sampler(
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  solver: Solver,
  inverse_scaler: Callable[[jax.Array], jax.Array],
  n_steps: int,
  time_grid: str = 'edm',
  rho: float = 7.0,
  continuous: bool = True,
  denoise: bool = True,
  eps: float = 1e-3,
) -> Sampler:
  """A sampler `(rng, state) -> (samples, number of network calls)`.

  Args:
    sde: the forward SDE; its marginals must be linear in x_0.
    model: the network.
    shape: (B, H, W, C) over all devices.
    solver: the numerical method.
    inverse_scaler: from the network's range to [0, 1].
    n_steps: times on the grid, at least 2.
    time_grid: 'edm', 'logsnr', 'uniform' or a registered name.
    rho: exponent of the grid 'edm'.
    continuous: whether the network was trained on continuous time.
    denoise: end with the denoised image at `eps`, which is one more network call.
    eps: the last time.

  Raises:
    UserError: for an unknown grid or fewer than two steps.
  """
  grid = _TIME_GRIDS.get(time_grid)
  if n_steps < 2:
    raise UserError(f'sampling.n_steps={n_steps} is too few: use at least 2.')
  calls = (n_steps - 1) * solver.evaluations + denoise

  def flow_of(score_fn):
    return Flow(sde, get_denoiser(sde, score_fn), grid(sde, n_steps, eps, rho), eps)

  @jax.jit
  def sample(rng, params, model_state):
    score_fn = mutils.get_score_fn(sde, model, params, model_state, False, continuous)
    return inverse_scaler(solve(rng, flow_of(score_fn), solver, shape, denoise))

  def fast_sampler(rng: jax.Array, state: State) -> tuple[jax.Array, int]:
    return sample(rng, state.params_ema, state.model_state), calls

  return fast_sampler


def solve(
  rng: jax.Array, flow: Flow, solver: Solver, shape: tuple[int, ...], denoise: bool = True
) -> jax.Array:
  """Integrates the flow from a sample of the prior to the last time of its grid."""
  rng, prior_rng = jax.random.split(rng)
  x = parallelism.shard_batch(flow.sde.prior_sampling(prior_rng, shape))
  ends = flow.sde.marginal_prob(jnp.ones(2), jnp.stack([flow.t[0], flow.t[-1]]))[0]
  y = x / ends[0]

  def step(i, carry):
    y, memory = carry
    return solver.step(flow, i, jax.random.fold_in(rng, i), y, memory)

  y, _ = jax.lax.fori_loop(0, len(flow.t) - 1, step, (y, solver.init(flow, y)))
  return flow.D(y, flow.t[-1]) if denoise else y * ends[1]


def _register(name: str, solver: type[Solver]) -> None:
  def make(config, sde, model, shape, inverse_scaler, eps) -> Sampler:
    settings = config.sampling
    return get_fast_sampler(
      sde,
      model,
      shape,
      solver(settings.churn),
      inverse_scaler,
      n_steps=settings.n_steps or sde.N,
      time_grid=settings.time_grid,
      rho=settings.rho,
      continuous=config.training.continuous,
      denoise=settings.noise_removal,
      eps=eps,
    )

  make.__qualname__ = solver.__qualname__
  register_method(make, name=name)


_register('ddim', DDIM)
_register('heun', Heun)
_register('dpm_solver++', DPMSolverPP)
