"""The forward SDEs of the paper, their marginals, their discrete chains and their reversal.

Notation follows Song et al., "Score-Based Generative Modeling through Stochastic Differential
Equations" (ICLR 2021): dx = f(x, t) dt + g(t) dw for t in [0, T] (Eq. 5), reversed by
dx = [f(x, t) - g(t)^2 score(x, t)] dt + g(t) dw (Eq. 6).

Everything in which one SDE differs from another is a method or an attribute here, so that a
subclass of `SDE` works with every loss and sampler. Shapes: `x` is (B, ...), `t` is (B,), and
whatever is returned per example ("std", "diffusion") is (B,).
"""

import abc
import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from runtime.errors import UserError
from runtime.registry import Registry

ScoreFn = Callable[[jax.Array, jax.Array], jax.Array]

SDES = Registry('SDE', keys={'N': 'num_scales'})
register_sde = SDES.register


def batch_mul(a: jax.Array, b: jax.Array) -> jax.Array:
  """Product of one number per example, (B,), with one array per example, (B, ...)."""
  return jax.vmap(jnp.multiply)(a, b)


@dataclasses.dataclass(frozen=True)
class SDE(abc.ABC):
  """A forward SDE with Gaussian transition kernels. Subclasses declare the field `N`.

  To define one, give `sde`, `marginal_prob`, `prior_sampling` and `prior_logp`; the rest has
  defaults that fit a variance-preserving process.

  Attributes:
    N: number of discretization steps of [0, T].
    T: end time.
    sampling_eps: the time at which samplers stop; below it the score is badly conditioned.
  """

  T: ClassVar[float] = 1.0
  sampling_eps: ClassVar[float] = 1e-3

  @abc.abstractmethod
  def sde(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Drift f(x, t), shaped as `x`, and diffusion g(t), (B,)."""

  @abc.abstractmethod
  def marginal_prob(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean, shaped as `x`, and standard deviation, (B,), of p(x_t | x_0 = x)."""

  def alpha_sigma(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha_t and sigma_t, both (B,), of the marginals p(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I).

    The marginals must be linear in x_0, as those of the paper are.
    """
    return self.marginal_prob(jnp.ones_like(t), t)

  def denoise(self, x: jax.Array, t: jax.Array, score: jax.Array) -> jax.Array:
    """E[x_0 | x_t] = (x_t + sigma_t^2 score) / alpha_t, by Tweedie's formula; shaped as `x`.

    Args:
      x: x_t, (B, ...).
      t: (B,).
      score: the score of p_t at `x`, shaped as it.
    """
    alpha, sigma = self.alpha_sigma(t)
    return batch_mul(1 / alpha, x + batch_mul(sigma**2, score))

  @abc.abstractmethod
  def prior_sampling(self, rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A sample of the prior p_T."""

  @abc.abstractmethod
  def prior_logp(self, z: jax.Array) -> jax.Array:
    """log p_T(z) in nats, (B,)."""

  def discretize(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f_i and G_i of x_{i+1} = x_i + f_i(x_i) + G_i z_i; by default Euler-Maruyama."""
    dt = self.T / self.N
    drift, diffusion = self.sde(x, t)
    return drift * dt, diffusion * np.sqrt(dt)

  def reverse(self, score_fn: ScoreFn, probability_flow: bool = False) -> 'ReverseSDE':
    """The reverse-time SDE (Eq. 6) or the probability flow ODE (Eq. 13)."""
    return ReverseSDE(self, score_fn, probability_flow)

  # What a network is told, and what its output means.

  def time_label(self, t: jax.Array, continuous: bool = True) -> jax.Array:
    """The conditioning value that a network receives for time `t`, (B,).

    Continuously trained networks use 0...999 whatever N is, as in the published models.
    """
    return t * (999 if continuous else self.N - 1)

  def score_scale(self, t: jax.Array, continuous: bool = True) -> jax.Array:
    """The factor, (B,), with score = factor * network output. Here the network predicts noise."""
    del continuous
    return -1 / self.alpha_sigma(t)[1]

  # The discrete chain behind SMLD or DDPM.

  def timestep(self, t: jax.Array) -> jax.Array:
    """Index in 0...N-1 of time `t` in the discrete chain."""
    return (t * (self.N - 1) / self.T).astype(jnp.int32)

  def perturb_discrete(
    self, x: jax.Array, noise: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Perturbed data, regression target and loss weight (B,) of the discrete objective.

    Args:
      x: data, (B, ...).
      noise: standard normal, shaped as `x`.
      labels: what the network receives, integers in 0...N-1, (B,).

    Raises:
      UserError: where the SDE has no discrete counterpart.
    """
    raise UserError(
      f'{type(self).__name__} has no discrete training objective; set training.continuous=True.'
    )

  def langevin_alpha(self, t: jax.Array) -> jax.Array:
    """The factor alpha, (B,), of the Langevin step size (Algorithms 4 and 5)."""
    return jnp.ones_like(t)

  def ancestral_step(
    self, score_fn: ScoreFn, x: jax.Array, t: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Mean, shaped as `x`, and standard deviation, (B,), of x_{t-T/N} given x_t.

    With x_t = a x_s + sqrt(v) z, where a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2,
    the mean is (x_t + v score) / a and the variance that of p(x_s | x_t, x_0): v sigma_s^2 /
    sigma_t^2. The marginals must be linear in x_0.
    """
    s = jnp.maximum(t - self.T / self.N, 0.0)
    alpha_t, sigma_t = self.alpha_sigma(t)
    alpha_s, sigma_s = self.alpha_sigma(s)
    a = alpha_t / alpha_s
    v = jnp.maximum(sigma_t**2 - a**2 * sigma_s**2, 0.0)
    mean = batch_mul(1 / a, x + batch_mul(v, score_fn(x, t)))
    return mean, jnp.sqrt(v) * sigma_s / sigma_t


@dataclasses.dataclass(frozen=True)
class ReverseSDE:
  """The time reversal of `forward` under a score; run it from T to 0 with negative steps."""

  forward: SDE
  score_fn: ScoreFn
  probability_flow: bool = False

  @property
  def N(self) -> int:
    return self.forward.N

  @property
  def T(self) -> float:
    return self.forward.T

  def sde(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Drift f - g^2 score and diffusion g (Eq. 6); f - g^2 score / 2 and 0 for the ODE (Eq. 13)."""
    return self._reverse(*self.forward.sde(x, t), x, t)

  def discretize(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f_i and G_i of the reverse diffusion sampler x_i = x_{i+1} - f_i + G_i z (Eq. 46)."""
    return self._reverse(*self.forward.discretize(x, t), x, t)

  def _reverse(
    self, f: jax.Array, g: jax.Array, x: jax.Array, t: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    score = batch_mul(g**2, self.score_fn(x, t))
    if self.probability_flow:
      return f - 0.5 * score, jnp.zeros_like(g)
    return f - score, g


def _normal_logp(z: jax.Array, sigma: float) -> jax.Array:
  """log N(z; 0, sigma^2 I) in nats, one value per example."""
  dim = int(np.prod(z.shape[1:]))
  squares = jnp.sum(z.reshape(z.shape[0], -1) ** 2, axis=-1)
  return -dim / 2 * np.log(2 * np.pi * sigma**2) - squares / (2 * sigma**2)


@dataclasses.dataclass(frozen=True)
class _LinearBetaSDE(SDE):
  """beta(t) = beta_min + t (beta_max - beta_min): what the VP and sub-VP SDEs share."""

  beta_min: float = 0.1
  beta_max: float = 20.0
  N: int = 1000

  def __post_init__(self):
    if not 0 <= self.beta_min <= self.beta_max or self.beta_max == 0:
      raise UserError(
        f'{type(self).__name__} needs 0 <= beta_min <= beta_max and beta_max > 0, '
        f'got beta_min={self.beta_min} and beta_max={self.beta_max}.'
      )
    _check_steps(self)

  def beta(self, t: jax.Array) -> jax.Array:
    return self.beta_min + t * (self.beta_max - self.beta_min)

  def log_mean_coeff(self, t: jax.Array) -> jax.Array:
    """-1/2 int_0^t beta(s) ds, the logarithm of alpha_t."""
    return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

  def prior_sampling(self, rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(rng, shape)

  def prior_logp(self, z: jax.Array) -> jax.Array:
    return _normal_logp(z, 1.0)

  @cached_property
  def discrete_betas(self) -> np.ndarray:
    """beta_i of the DDPM chain, i = 0...N-1."""
    return np.linspace(self.beta_min / self.N, self.beta_max / self.N, self.N, dtype=np.float32)

  @cached_property
  def alphas(self) -> np.ndarray:
    """1 - beta_i of the DDPM chain.

    Raises:
      UserError: if the steps are so coarse that some are not positive.
    """
    if self.beta_max >= self.N:
      raise UserError(
        f'The discrete chain of {type(self).__name__} needs more steps than beta_max: '
        f'got N={self.N} (sampling.n_steps, else model.num_scales) and beta_max={self.beta_max}; '
        f'raise it or use the predictor euler_maruyama with the corrector none.'
      )
    return 1 - self.discrete_betas

  def langevin_alpha(self, t: jax.Array) -> jax.Array:
    return jnp.asarray(self.alphas)[self.timestep(t)]


@register_sde(name='vpsde')
@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBetaSDE):
  """The variance preserving SDE, the limit of DDPM (Eq. 11).

  dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw, with marginals
  N(alpha_t x_0, (1 - alpha_t^2) I), alpha_t = exp(-1/2 int_0^t beta) (Eq. 29).

  Args:
    beta_min: beta(0).
    beta_max: beta(1).
    N: discretization steps.
  """

  def sde(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    beta_t = self.beta(t)
    return -0.5 * batch_mul(beta_t, x), jnp.sqrt(beta_t)

  def marginal_prob(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_alpha_t = self.log_mean_coeff(t)
    return batch_mul(jnp.exp(log_alpha_t), x), jnp.sqrt(-jnp.expm1(2 * log_alpha_t))

  def discretize(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The DDPM chain x_{i+1} = sqrt(1 - beta_i) x_i + sqrt(beta_i) z_i (Eq. 10)."""
    i = self.timestep(t)
    sqrt_alpha, beta = jnp.asarray(np.sqrt(self.alphas))[i], jnp.asarray(self.discrete_betas)[i]
    return batch_mul(sqrt_alpha, x) - x, jnp.sqrt(beta)

  @cached_property
  def alphas_cumprod(self) -> np.ndarray:
    return np.cumprod(self.alphas, dtype=np.float64).astype(np.float32)

  @cached_property
  def sqrt_alphas_cumprod(self) -> np.ndarray:
    return np.sqrt(self.alphas_cumprod)

  @cached_property
  def sqrt_1m_alphas_cumprod(self) -> np.ndarray:
    return np.sqrt(1 - self.alphas_cumprod)

  def score_scale(self, t: jax.Array, continuous: bool = True) -> jax.Array:
    if continuous:
      return super().score_scale(t)
    labels = self.time_label(t, continuous=False).astype(jnp.int32)
    return -1 / jnp.asarray(self.sqrt_1m_alphas_cumprod)[labels]

  def perturb_discrete(
    self, x: jax.Array, noise: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The DDPM objective: predict the noise of x_i ~ N(sqrt(abar_i) x, (1 - abar_i) I)."""
    mean = batch_mul(jnp.asarray(self.sqrt_alphas_cumprod)[labels], x)
    std = jnp.asarray(self.sqrt_1m_alphas_cumprod)[labels]
    return mean + batch_mul(std, noise), noise, jnp.ones_like(std)

  def ancestral_step(
    self, score_fn: ScoreFn, x: jax.Array, t: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """DDPM's ancestral sampling (Eq. 4), with the standard deviation sqrt(beta_i)."""
    i = self.timestep(t)
    sqrt_alpha, beta = jnp.asarray(np.sqrt(self.alphas))[i], jnp.asarray(self.discrete_betas)[i]
    mean = batch_mul(1 / sqrt_alpha, x + batch_mul(beta, score_fn(x, t)))
    return mean, jnp.sqrt(beta)


@register_sde(name='subvpsde')
@dataclasses.dataclass(frozen=True)
class subVPSDE(_LinearBetaSDE):
  """The sub-VP SDE (Eq. 12), whose variance is bounded by the VP SDE's; made for likelihoods.

  dx = -1/2 beta(t) x dt + sqrt(beta(t) (1 - alpha_t^4)) dw, with marginals
  N(alpha_t x_0, (1 - alpha_t^2)^2 I) (Eq. 29).

  Args:
    beta_min: beta(0).
    beta_max: beta(1).
    N: discretization steps.
  """

  def sde(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    beta_t = self.beta(t)
    discount = -jnp.expm1(4 * self.log_mean_coeff(t))
    return -0.5 * batch_mul(beta_t, x), jnp.sqrt(beta_t * discount)

  def marginal_prob(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_alpha_t = self.log_mean_coeff(t)
    return batch_mul(jnp.exp(log_alpha_t), x), -jnp.expm1(2 * log_alpha_t)


@register_sde(name='vesde')
@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
  """The variance exploding SDE, the limit of SMLD (Eq. 9).

  dx = sqrt(d[sigma^2(t)]/dt) dw with sigma(t) = sigma_min (sigma_max / sigma_min)^t (Eq. 30) and
  marginals N(x_0, sigma(t)^2 I).

  Args:
    sigma_min: smallest noise level, in units of the scaled data.
    sigma_max: largest noise level; take the largest pairwise distance in the training set.
    N: discretization steps.
  """

  sampling_eps: ClassVar[float] = 1e-5

  sigma_min: float = 0.01
  sigma_max: float = 50.0
  N: int = 1000

  def __post_init__(self):
    if not 0 < self.sigma_min < self.sigma_max:
      raise UserError(
        f'VESDE needs 0 < sigma_min < sigma_max, '
        f'got sigma_min={self.sigma_min} and sigma_max={self.sigma_max}.'
      )
    _check_steps(self)

  def sigma(self, t: jax.Array) -> jax.Array:
    return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

  def sde(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    rate = np.sqrt(2 * np.log(self.sigma_max / self.sigma_min))
    return jnp.zeros_like(x), self.sigma(t) * rate.astype(np.float32)

  def marginal_prob(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, self.sigma(t)

  def prior_sampling(self, rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(rng, shape) * self.sigma_max

  def prior_logp(self, z: jax.Array) -> jax.Array:
    return _normal_logp(z, self.sigma_max)

  @cached_property
  def discrete_sigmas(self) -> np.ndarray:
    """sigma_i of the SMLD chain, increasing, i = 0...N-1.

    In single precision, as published models were trained and sampled: differences of neighbouring
    squares amplify its rounding.
    """
    with jax.ensure_compile_time_eval():
      log_sigmas = jnp.linspace(np.log(self.sigma_min), np.log(self.sigma_max), self.N)
      return np.asarray(jnp.exp(log_sigmas))

  def _adjacent_sigmas(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sigma_i and sigma_{i-1} at time `t`, with sigma_{-1} = 0."""
    sigmas = jnp.asarray(np.concatenate([[0], self.discrete_sigmas]).astype(np.float32))
    i = self.timestep(t)
    return sigmas[i + 1], sigmas[i]

  def discretize(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The SMLD chain x_{i+1} = x_i + sqrt(sigma_{i+1}^2 - sigma_i^2) z_i (Eq. 8)."""
    sigma, adjacent = self._adjacent_sigmas(t)
    return jnp.zeros_like(x), jnp.sqrt(sigma**2 - adjacent**2)

  def time_label(self, t: jax.Array, continuous: bool = True) -> jax.Array:
    """sigma(t); a discretely trained network counts its noise levels from the largest down."""
    if continuous:
      return self.sigma(t)
    return jnp.round((self.T - t) * (self.N - 1)).astype(jnp.int32)

  def score_scale(self, t: jax.Array, continuous: bool = True) -> jax.Array:
    """One: the network divides by sigma itself."""
    return jnp.ones_like(t)

  def perturb_discrete(
    self, x: jax.Array, noise: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The SMLD objective: predict -z / sigma_i with the weight sigma_i^2 (Eq. 1)."""
    sigmas = jnp.asarray(self.discrete_sigmas[::-1].copy())[labels]
    return x + batch_mul(sigmas, noise), -batch_mul(1 / sigmas, noise), sigmas**2

  def ancestral_step(
    self, score_fn: ScoreFn, x: jax.Array, t: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Ancestral sampling of the SMLD chain (Eq. 47)."""
    sigma, adjacent = self._adjacent_sigmas(t)
    mean = x + batch_mul(sigma**2 - adjacent**2, score_fn(x, t))
    return mean, jnp.sqrt(adjacent**2 * (sigma**2 - adjacent**2) / sigma**2)


def _check_steps(sde: SDE) -> None:
  if sde.N < 1:
    raise UserError(f'{type(sde).__name__} needs at least one step, got N={sde.N}.')


def check_consistency(sde: SDE) -> None:
  """Checks that `sde.sde` and `sde.marginal_prob` are of one process.

  For an affine drift f, mean m_t and standard deviation s_t of p(x_t | x_0) obey
  (Särkkä and Solin, "Applied stochastic differential equations", Eq. 5.50 and 5.51)

    dm/dt = f(m, t),    d(s^2)/dt = 2 (df/dx) s^2 + g(t)^2,

  that is f = (log alpha)' x and g^2 = (sigma^2)' - 2 (log alpha)' sigma^2 where m = alpha x_0.

  Raises:
    UserError: if they do not, at one of a few times.
  """
  t = jnp.linspace(0.1, 0.9, 5) * sde.T
  ones = jnp.ones((len(t), 1, 1, 1))
  marginal = lambda t: sde.marginal_prob(ones, t)
  (mean, std), (mean_rate, std_rate) = jax.jvp(marginal, (t,), (jnp.ones_like(t),))
  drift, slope = jax.jvp(lambda x: sde.sde(x, t)[0], (mean,), (ones,))
  variance_rate = 2 * slope.reshape(-1) * std**2 + sde.sde(mean, t)[1] ** 2
  for what, by_marginal, by_sde in (
    ('mean', mean_rate.reshape(-1), drift.reshape(-1)),
    ('variance', 2 * std * std_rate, variance_rate),
  ):
    expected, got = np.asarray(by_marginal), np.asarray(by_sde)
    wrong = ~np.isclose(got, expected, rtol=1e-2, atol=1e-4 * np.abs(expected).max() + 1e-6)
    if wrong.any():
      i = int(wrong.argmax())
      raise UserError(
        f'{type(sde).__name__} is inconsistent: at t={float(t[i]):.3g} the {what} of x_t, given '
        f'x_0 = 1, grows at the rate {expected[i]:.4g} by marginal_prob() and {got[i]:.4g} by '
        f'sde(); make both those of one process.'
      )


def get_sde(config: ConfigDict) -> SDE:
  """The SDE that `config.training.sde` names, its fields read from `config.model`.

  Each field of the class is taken from the key of the same name (`N` from `num_scales`); one that
  the configuration lacks keeps its default.

  Raises:
    UserError: for an unknown name, values that the SDE refuses, or an SDE whose marginals are not
      its own.
  """
  sde = SDES.build(config.training.sde, config.model)
  check_consistency(sde)
  return sde
