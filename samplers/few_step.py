"""Samplers that need tens of network calls: DDIM, Heun with EDM's noise levels, DPM-Solver++(2M).

With marginals x_t = alpha_t x_0 + sigma_t z and the noise level s = sigma_t / alpha_t, the
probability flow ODE (Eq. 13) of every SDE of the paper is one equation of y = x / alpha,

  dy/ds = (y - D(x_t, t)) / s,   D(x_t, t) = (x_t + sigma_t^2 score(x_t, t)) / alpha_t,

where D is the denoised image (Tweedie's formula). So each solver here serves VE, VP, sub-VP and a
user's own SDE: it sees nothing but s, y and D.

The number of steps is that of updates, as in EDM, whose last one goes to noise zero: n - 1 updates
by the solver on n times from T to eps, and then the denoised image at eps, an Euler step to s = 0.
Without that denoising it is n updates by the solver on n + 1 times.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime import parallelism
from runtime.errors import UserError
from runtime.registry import Registry
from samplers.base import Condition, Sampler, register_sampler
from sde_lib import SDE, ScoreFn, batch_mul

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]

_TIME_GRIDS = Registry('time grid')
register_time_grid = _TIME_GRIDS.register


def noise_level(sde: SDE, t: jax.Array) -> jax.Array:
  """s(t) = sigma_t / alpha_t, increasing in t; both (n,)."""
  alpha, sigma = sde.alpha_sigma(t)
  return sigma / alpha


def time_of_noise_level(sde: SDE, s: jax.Array, eps: float) -> jax.Array:
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
  return time_of_noise_level(sde, s, eps).at[0].set(sde.T).at[-1].set(eps)


def get_denoiser(sde: SDE, score_fn: ScoreFn) -> Denoiser:
  """D(x_t, t) = E[x_0 | x_t], by Tweedie's formula."""
  return lambda x, t: sde.denoise(x, t, score_fn(x, t))


@dataclasses.dataclass(frozen=True)
class ProbabilityFlow:
  """The probability flow ODE in (s, y), on a grid of times.

  Attributes:
    sde: the forward SDE.
    denoiser: D(x_t, t).
    t: decreasing times, (n,).
    s: noise levels at these times, (n,).
    n_steps: number of updates, with that to the denoised image at the end if there is one.
  """

  sde: SDE
  denoiser: Denoiser
  t: jax.Array
  s: jax.Array
  n_steps: int

  def D(self, y: jax.Array, t: jax.Array) -> jax.Array:
    """The denoised image at y = x / alpha and the time `t`, a scalar."""
    t = jnp.full((y.shape[0],), t)
    alpha = self.sde.alpha_sigma(t)[0]
    return self.denoiser(batch_mul(alpha, y), t)


class Solver(abc.ABC):
  """A numerical solver of the probability flow in (s, y), or of a reverse SDE with its marginals.

  Args:
    eta: the part of each step's noise that is drawn anew, from 0 (the flow) to 1 (the reverse SDE);
      noise corrects the errors of a network, where the flow piles them up.
    churn: how much noise is added over the whole way before it is removed again, `S_churn` of
      Karras et al. 2022, Algorithm 2: each update raises s by churn / n_steps of itself, but by no
      more than sqrt(2) - 1.

  A subclass names the one of the two that it takes in `noise`.
  """

  nfe = 1  # calls of the denoiser in a step
  noise = 'eta'

  def __init__(self, eta: float = 0.0, churn: float = 0.0):
    refused, value = ('churn', churn) if self.noise == 'eta' else ('eta', eta)
    if value:
      raise UserError(
        f'sampling.{refused}={value} is not for this sampling method, whose noise is set by '
        f'sampling.{self.noise}; set sampling.{refused}=0.'
      )
    if not 0 <= eta <= 1 or churn < 0:
      raise UserError(
        f'sampling.eta={eta} must be from 0 to 1 and sampling.churn={churn} not negative.'
      )
    self.eta, self.churn = eta, churn

  def init(self, flow: ProbabilityFlow, y: jax.Array) -> Any:
    """What a step needs of the ones before, first."""
    del flow, y
    return ()

  @abc.abstractmethod
  def step(
    self, flow: ProbabilityFlow, i: jax.Array, rng: jax.Array, y: jax.Array, memory: Any
  ) -> tuple[jax.Array, Any]:
    """From `flow.t[i]` to `flow.t[i + 1]`."""

  def ddim_step(
    self, flow: ProbabilityFlow, i: jax.Array, rng: jax.Array, y: jax.Array, D: jax.Array
  ) -> jax.Array:
    """The exact solution over a step in which the denoised image is `D` throughout.

    y' = D + c (y - D) + n z with the new noise n = eta s' sqrt(1 - (s'/s)^2) and c such that
    c^2 s^2 + n^2 = s'^2 (Song, Meng and Ermon 2021, Eq. 12 and 16).
    """
    s, s_next = flow.s[i], flow.s[i + 1]
    new = self.eta * s_next * jnp.sqrt(1 - (s_next / s) ** 2)
    y = D + jnp.sqrt(s_next**2 - new**2) / s * (y - D)
    return y + new * jax.random.normal(rng, y.shape) if self.eta else y


class DDIM(Solver):
  """DDIM (Song, Meng and Ermon 2021), the exponential Euler method. Order 1.

  With eta = 1 it is ancestral sampling over steps of any length.
  """

  def step(self, flow, i, rng, y, memory):
    return self.ddim_step(flow, i, rng, y, flow.D(y, flow.t[i])), memory


class Heun(Solver):
  """Heun's method with optional churn (Karras et al. 2022, Algorithm 2). Order 2 without churn."""

  nfe = 2
  noise = 'churn'

  def step(self, flow, i, rng, y, memory):
    s, t = flow.s[i], flow.t[i]
    if self.churn:
      gamma = min(self.churn / flow.n_steps, np.sqrt(2) - 1)
      s_hat = jnp.minimum(s * (1 + gamma), flow.s[0])
      added = (s_hat - s) * (s_hat + s)  # never negative, as a difference of squares may be
      y = y + jnp.sqrt(added) * jax.random.normal(rng, y.shape)
      t_hat = time_of_noise_level(flow.sde, s_hat[None], flow.t[-1])[0]
      s, t = s_hat, jnp.where(s_hat > s, t_hat, t)
    s_next = flow.s[i + 1]
    slope = (y - flow.D(y, t)) / s
    euler = y + (s_next - s) * slope
    slope_next = (euler - flow.D(euler, flow.t[i + 1])) / s_next
    return y + (s_next - s) * (slope + slope_next) / 2, memory


class DPMSolverPP(Solver):
  """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): D is extrapolated from two steps. Order 2.

  With eta = 1 it is SDE-DPM-Solver++(2M) (Lu et al. 2022, section 6).
  """

  def init(self, flow, y):
    return jnp.zeros_like(y)

  def step(self, flow, i, rng, y, memory):
    D = flow.D(y, flow.t[i])
    h = jnp.log(flow.s[i] / flow.s[i + 1])
    h_before = jnp.log(flow.s[i - 1] / flow.s[i])
    extrapolated = D + h / (2 * h_before) * (D - memory)
    target = jnp.where(i == 0, D, extrapolated)  # the first step has no predecessor
    return self.ddim_step(flow, i, rng, y, target), D


class NoiseLevelSampler(Sampler):
  """A sampling method that follows the probability flow by one of the solvers here.

  Args:
    sde: the forward SDE; its marginals must be linear in x_0.
    solver: the numerical method.
    n_steps: number of updates; with `denoise` the last of them is the denoising.
    time_grid: 'edm', 'logsnr', 'uniform' or a registered name.
    rho: exponent of the grid 'edm'.
    denoise: end with the denoised image at `eps`, which is one network call.
    eps: the last time of the solver.

  Raises:
    UserError: for an unknown grid, or a number of updates that leaves the solver none.
  """

  def __init__(
    self,
    sde: SDE,
    solver: Solver,
    n_steps: int,
    time_grid: str = 'edm',
    rho: float = 7.0,
    denoise: bool = True,
    eps: float = 1e-3,
  ):
    grid = _TIME_GRIDS.get(time_grid)
    least = 2 if denoise else 1
    if n_steps < least:
      raise UserError(f'sampling.n_steps={n_steps} is too few: use at least {least}.')
    if rho <= 0:
      raise UserError(f'sampling.rho={rho} must be positive; EDM uses 7.')
    self.sde, self.solver, self.denoise = sde, solver, denoise
    self.n_updates = n_steps
    self.n_steps = n_steps - denoise  # of the solver; `result` takes the last one
    self.nfe_per_step = solver.nfe
    with jax.ensure_compile_time_eval():
      self.t = grid(sde, self.n_steps + 1, eps, rho)
      self.s = noise_level(sde, self.t)

  def _flow(self, score_fn: ScoreFn, condition: Condition) -> ProbabilityFlow:
    denoiser = get_denoiser(self.sde, condition.flow_score(score_fn))
    return ProbabilityFlow(self.sde, denoiser, self.t, self.s, self.n_updates)

  def _alpha(self, i: int | jax.Array) -> jax.Array:
    return self.sde.alpha_sigma(self.t[i][None])[0]

  def init(self, score_fn, condition, rng, shape, z):
    rng, prior_rng = jax.random.split(rng)
    x = parallelism.shard_batch(self.sde.prior_sampling(prior_rng, shape) if z is None else z)
    y = x / self._alpha(0)
    return x, y, self.solver.init(self._flow(score_fn, condition), y), rng

  def step(self, score_fn, condition, i, carry):
    _, y, memory, rng = carry
    flow = self._flow(score_fn, condition)
    y, memory = self.solver.step(flow, i, jax.random.fold_in(rng, i), y, memory)
    return y * self._alpha(i + 1), y, memory, rng

  def result(self, score_fn, condition, carry):
    x, y = carry[:2]
    return self._flow(score_fn, condition).D(y, self.t[-1]) if self.denoise else x

  def nfe(self, carry):
    return super().nfe(carry) + self.denoise


def _register(name: str, solver: type[Solver]) -> None:
  def make(config: Any, sde: SDE, eps: float) -> Sampler:
    settings = config.sampling
    return NoiseLevelSampler(
      sde,
      solver(settings.eta, settings.churn),
      settings.n_steps or sde.N,
      settings.time_grid,
      settings.rho,
      settings.noise_removal,
      eps,
    )

  make.__qualname__ = solver.__qualname__
  register_sampler(make, name=name)


_register('ddim', DDIM)
_register('heun', Heun)
_register('dpm_solver++', DPMSolverPP)
