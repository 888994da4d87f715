"""Samplers that need tens of NFE: DDIM, Heun with EDM's noise levels, DPM-Solver++(2M).

With marginals x_t = alpha_t x_0 + sigma_t z and the noise level s = sigma_t / alpha_t, in units of
the scaled data, the probability flow ODE of every SDE of the paper is the same equation of
y = x / alpha,

    dy/ds = (y - D(x_t, t)) / s,   D(x_t, t) = (x_t + sigma_t^2 score(x_t, t)) / alpha_t,

where D is the denoised image (Tweedie's formula). A solver only needs s, y and D, and therefore
works with the VE, VP and sub-VP SDEs and with those of users.

As in EDM, the number of steps is the number of updates, of which the last goes to zero noise: n - 1
updates by the solver on n times from T to eps, then the denoised image at eps, which is an Euler
step to s = 0. Without that denoising, the solver does n updates on n + 1 times.

References:

- Song et al., "Score-based generative modeling through stochastic differential equations", ICLR
  2021, https://arxiv.org/abs/2011.13456: the probability flow ODE (Eq. 13).
- Song, Meng and Ermon, "Denoising diffusion implicit models", ICLR 2021,
  https://arxiv.org/abs/2010.02502: DDIM.
- Karras et al., "Elucidating the design space of diffusion-based generative models", NeurIPS 2022,
  https://arxiv.org/abs/2206.00364: EDM, its grid and Heun's method with churn.
- Lu et al., "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models",
  2022, https://arxiv.org/abs/2211.01095.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from runtime import parallelism
from runtime.array_types import Array, Batch, Count, PerExample, RandomKey, Scalar
from runtime.errors import UserError
from runtime.registry import Registry
from samplers.base import Carry, Condition, Sampler, register_sampler
from sde_lib import SDE, ScoreFn, batch_mul

PyTree = Any
Denoiser = Callable[[Batch, PerExample], Batch]
Levels = Float[Array, 'n']  # times or noise levels

_TIME_GRIDS = Registry('time grid')
register_time_grid = _TIME_GRIDS.register


def noise_level(sde: SDE, t: Levels) -> Levels:
  """The noise levels s(t) = sigma_t / alpha_t, (n,), at the times `t`, (n,); increasing in t."""
  alpha, sigma = sde.alpha_sigma(t)
  return sigma / alpha


def time_of_noise_level(sde: SDE, s: Levels, eps: float | Scalar) -> Levels:
  """The times t in [eps, T], (n,), with the noise levels `s`, (n,), by bisection, for any SDE."""

  def halve(_: Count, bounds: tuple[Levels, Levels]) -> tuple[Levels, Levels]:
    low, high = bounds
    middle = 0.5 * (low + high)
    above = noise_level(sde, middle) > s
    return jnp.where(above, low, middle), jnp.where(above, middle, high)

  low, high = jnp.full_like(s, eps), jnp.full_like(s, sde.T)
  # 40 halvings take any interval below the spacing of single-precision numbers.
  return jax.lax.fori_loop(0, 40, halve, (low, high))[1]


@register_time_grid(name='uniform')
def uniform_grid(sde: SDE, n: int, eps: float, rho: float) -> Levels:
  """n equidistant times from T to `eps`, (n,), as the paper's samplers take them."""
  del rho
  return jnp.linspace(sde.T, eps, n)


@register_time_grid(name='edm')
def edm_grid(sde: SDE, n: int, eps: float, rho: float) -> Levels:
  """n times from T to `eps`, (n,), with equidistant s^(1/rho) (Karras et al. 2022, Eq. 5)."""
  ends = noise_level(sde, jnp.asarray([sde.T, eps])) ** (1 / rho)
  return _between(sde, jnp.linspace(ends[0], ends[1], n) ** rho, eps)


@register_time_grid(name='logsnr')
def logsnr_grid(sde: SDE, n: int, eps: float, rho: float) -> Levels:
  """n times from T to `eps`, (n,), with equidistant log(alpha^2 / sigma^2) (Lu et al. 2022)."""
  del rho
  ends = jnp.log(noise_level(sde, jnp.asarray([sde.T, eps])))
  return _between(sde, jnp.exp(jnp.linspace(ends[0], ends[1], n)), eps)


def _between(sde: SDE, s: Levels, eps: float) -> Levels:
  """The times with the decreasing noise levels `s`, of which the ends are exactly T and `eps`."""
  return time_of_noise_level(sde, s, eps).at[0].set(sde.T).at[-1].set(eps)


def get_denoiser(sde: SDE, score_fn: ScoreFn) -> Denoiser:
  """D(x_t, t) = E[x_0 | x_t], shaped as x_t, from the score by Tweedie's formula."""
  return lambda x, t: sde.denoise(x, t, score_fn(x, t))


@dataclasses.dataclass(frozen=True)
class ProbabilityFlow:
  """The probability flow ODE in (s, y), on a grid of times.

  Attributes:
    sde: the forward SDE.
    denoiser: D(x_t, t).
    t: decreasing times, (n,).
    s: the noise levels at these times, (n,).
    n_steps: the number of updates; a final denoising counts as one of them.
  """

  sde: SDE
  denoiser: Denoiser
  t: Levels
  s: Levels
  n_steps: int

  def D(self, y: Batch, t: Scalar) -> Batch:
    """The denoised images, (B, ...), at y = x / alpha, (B, ...), and the time `t`, a scalar."""
    t = jnp.full((y.shape[0],), t)
    alpha = self.sde.alpha_sigma(t)[0]
    return self.denoiser(batch_mul(alpha, y), t)


class Solver(abc.ABC):
  """A numerical solver of the probability flow in (s, y), or of a reverse SDE with its marginals.

  Attributes:
    nfe: the number of calls of the denoiser in a step.
    noise: which of the two arguments below the solver uses, 'eta' or 'churn'.

  Args:
    eta: the fraction of each step's noise that is drawn again, from 0 (the probability flow) to 1
      (the reverse SDE). Fresh noise corrects errors of the network, which the flow accumulates.
    churn: the amount of noise that is added, and removed again, in all updates together: `S_churn`
      of Karras et al. 2022, Algorithm 2. Each update raises s by the fraction churn / n_steps, but
      by no more than sqrt(2) - 1.

  Raises:
    UserError: if eta is not in [0, 1], churn is negative, or the solver does not use one that is
      not zero.
  """

  nfe: ClassVar[int] = 1
  noise: ClassVar[str] = 'eta'

  def __init__(self, eta: float = 0.0, churn: float = 0.0):
    refused, value = ('churn', churn) if self.noise == 'eta' else ('eta', eta)
    if value:
      raise UserError(
        f'sampling.{refused}={value} has no meaning for this sampler, whose noise is set by '
        f'sampling.{self.noise}: set sampling.{refused}=0.'
      )
    if not 0 <= eta <= 1 or churn < 0:
      raise UserError(
        f'sampling.eta={eta} must be between 0 and 1, and sampling.churn={churn} must not be '
        f'negative: change the one that is out of range.'
      )
    self.eta, self.churn = eta, churn

  def init(self, flow: ProbabilityFlow, y: Batch) -> PyTree:
    """The memory of the first step, at y = x_T / alpha_T, (B, ...); by default none."""
    del flow, y
    return ()

  @abc.abstractmethod
  def step(
    self, flow: ProbabilityFlow, i: Count, rng: RandomKey, y: Batch, memory: PyTree
  ) -> tuple[Batch, PyTree]:
    """Moves `y`, (B, ...), from `flow.t[i]` to `flow.t[i + 1]`.

    Args:
      flow: the probability flow and its grid.
      i: the number of the step, from 0.
      rng: the key of this step.
      y: x / alpha at `flow.t[i]`, (B, ...).
      memory: what the step before left for this one.

    Returns:
      y at `flow.t[i + 1]`, and the memory of the next step.
    """

  def ddim_step(
    self, flow: ProbabilityFlow, i: Count, *, rng: RandomKey, y: Batch, D: Batch
  ) -> Batch:
    """The exact solution of a step over which the denoised image is constant.

    y' = D + c (y - D) + n z with fresh noise of standard deviation n = eta s' sqrt(1 - (s'/s)^2),
    and with c such that c^2 s^2 + n^2 = s'^2 (Song, Meng and Ermon 2021, Eq. 12 and 16).

    Args:
      flow: the probability flow and its grid.
      i: the number of the step, from `flow.s[i]` to `flow.s[i + 1]`.
      rng: the key of this step.
      y: x / alpha, (B, ...).
      D: the denoised images, (B, ...).
    """
    s, s_next = flow.s[i], flow.s[i + 1]
    new = self.eta * s_next * jnp.sqrt(1 - (s_next / s) ** 2)
    y = D + jnp.sqrt(s_next**2 - new**2) / s * (y - D)
    return y + new * jax.random.normal(rng, y.shape) if self.eta else y


class DDIM(Solver):
  """DDIM (Song, Meng and Ermon 2021), which is the exponential Euler method, of order 1.

  With eta = 1 it is ancestral sampling over steps of any length.
  """

  def step(
    self, flow: ProbabilityFlow, i: Count, rng: RandomKey, y: Batch, memory: PyTree
  ) -> tuple[Batch, PyTree]:
    """A step in which the denoised image is that of its start; see `Solver.step`."""
    return self.ddim_step(flow, i, rng=rng, y=y, D=flow.D(y, flow.t[i])), memory


class Heun(Solver):
  """Heun's method with optional churn (Karras et al. 2022, Algorithm 2); order 2 without churn."""

  nfe = 2
  noise = 'churn'

  def step(
    self, flow: ProbabilityFlow, i: Count, rng: RandomKey, y: Batch, memory: PyTree
  ) -> tuple[Batch, PyTree]:
    """Noise up to s_hat >= s, then the mean of the slopes at both ends; see `Solver.step`."""
    s, t = flow.s[i], flow.t[i]
    if self.churn:
      gamma = min(self.churn / flow.n_steps, np.sqrt(2) - 1)
      s_hat = jnp.minimum(s * (1 + gamma), flow.s[0])
      # A difference of squares may be negative after rounding; this product is not.
      added = (s_hat - s) * (s_hat + s)
      y = y + jnp.sqrt(added) * jax.random.normal(rng, y.shape)
      t_hat = time_of_noise_level(flow.sde, s_hat[None], flow.t[-1])[0]
      s, t = s_hat, jnp.where(s_hat > s, t_hat, t)
    s_next = flow.s[i + 1]
    slope = (y - flow.D(y, t)) / s
    euler = y + (s_next - s) * slope
    slope_next = (euler - flow.D(euler, flow.t[i + 1])) / s_next
    return y + (s_next - s) * (slope + slope_next) / 2, memory


class DPMSolverPP(Solver):
  """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), of order 2.

  The denoised image is extrapolated linearly in log s from two steps. With eta = 1 it is
  SDE-DPM-Solver++(2M) (Lu et al. 2022, section 6).
  """

  def init(self, flow: ProbabilityFlow, y: Batch) -> PyTree:
    """Zeros in place of the denoised image of a step before, (B, ...), which are not used."""
    return jnp.zeros_like(y)

  def step(
    self, flow: ProbabilityFlow, i: Count, rng: RandomKey, y: Batch, memory: PyTree
  ) -> tuple[Batch, PyTree]:
    """A step with the extrapolated denoised image; the memory is that of its start."""
    D = flow.D(y, flow.t[i])
    h = jnp.log(flow.s[i] / flow.s[i + 1])
    h_before = jnp.log(flow.s[i - 1] / flow.s[i])
    extrapolated = D + h / (2 * h_before) * (D - memory)
    target = jnp.where(i == 0, D, extrapolated)  # the first step has no predecessor
    return self.ddim_step(flow, i, rng=rng, y=y, D=target), D


class NoiseLevelSampler(Sampler):
  """A sampler that follows the probability flow by a `Solver` on a grid of noise levels.

  Args:
    sde: the forward SDE; the mean of its marginals must be linear in x_0.
    solver: the numerical solver.
    n_steps: the number of updates; with `denoise` the last of them is the denoising.
    time_grid: 'edm', 'logsnr', 'uniform' or a registered name.
    rho: the exponent of the grid 'edm'.
    denoise: whether to end with the denoised image at `eps`, at the cost of one NFE.
    eps: the last time of the solver.

  Raises:
    UserError: if the grid is unknown, rho is not positive, or no update is left for the solver.
  """

  def __init__(
    self,
    sde: SDE,
    solver: Solver,
    n_steps: int,
    *,
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
      raise UserError(f'sampling.rho={rho} must be positive: set it to 7, as EDM does.')
    self.sde, self.solver, self.denoise = sde, solver, denoise
    self.n_updates = n_steps
    self.n_steps = n_steps - denoise  # those of the solver; `result` does the denoising
    self.nfe_per_step = solver.nfe
    with jax.ensure_compile_time_eval():
      self.t = grid(sde, self.n_steps + 1, eps, rho)
      self.s = noise_level(sde, self.t)

  def _flow(self, score_fn: ScoreFn, condition: Condition) -> ProbabilityFlow:
    denoiser = get_denoiser(self.sde, condition.flow_score(score_fn))
    return ProbabilityFlow(self.sde, denoiser, self.t, self.s, self.n_updates)

  def _alpha(self, i: Count) -> Scalar:
    """alpha at time number `i`."""
    return self.sde.alpha_sigma(self.t[i][None])[0][0]

  def init(
    self,
    score_fn: ScoreFn,
    condition: Condition,
    rng: RandomKey,
    shape: tuple[int, ...],
    z: Batch | None,
  ) -> Carry:
    """x_T, y, the solver's memory and a key; the arguments are those of `Sampler.init`."""
    rng, prior_rng = jax.random.split(rng)
    x = parallelism.shard_batch(self.sde.prior_sampling(prior_rng, shape) if z is None else z)
    y = x / self._alpha(0)
    return x, y, self.solver.init(self._flow(score_fn, condition), y), rng

  def step(self, score_fn: ScoreFn, condition: Condition, i: Count, carry: Carry) -> Carry:
    """x_t and y at the time number i + 1, the solver's memory and the same key."""
    _, y, memory, rng = carry
    flow = self._flow(score_fn, condition)
    y, memory = self.solver.step(flow, i, jax.random.fold_in(rng, i), y, memory)
    return y * self._alpha(i + 1), y, memory, rng

  def result(self, score_fn: ScoreFn, condition: Condition, carry: Carry) -> Batch:
    """x_t at `eps`, (B, ...), or with `denoise` the denoised image at that time."""
    x, y = carry[:2]
    return self._flow(score_fn, condition).D(y, self.t[-1]) if self.denoise else x

  def nfe(self, carry: Carry) -> int:
    """The NFE of all updates, with that of the denoising."""
    return super().nfe(carry) + self.denoise


def _register(name: str, solver: type[Solver]) -> None:
  def make(config: ConfigDict, sde: SDE, eps: float) -> Sampler:
    settings = config.sampling
    return NoiseLevelSampler(
      sde,
      solver(settings.eta, settings.churn),
      settings.n_steps or sde.N,
      time_grid=settings.time_grid,
      rho=settings.rho,
      denoise=settings.noise_removal,
      eps=eps,
    )

  make.__qualname__ = solver.__qualname__
  register_sampler(make, name=name)


_register('ddim', DDIM)
_register('heun', Heun)
_register('dpm_solver++', DPMSolverPP)
