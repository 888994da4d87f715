"""The forward SDEs of the paper, their marginals, their discrete chains and their reversal.

Notation and equation numbers are those of Song et al., "Score-based generative modeling through
stochastic differential equations", ICLR 2021, https://arxiv.org/abs/2011.13456. The forward SDE
dx = f(x, t) dt + g(t) dw (Eq. 5) runs from the data at t = 0 to the prior at t = T; its reversal is
dx = [f(x, t) - g(t)^2 score(x, t)] dt + g(t) dw (Eq. 6). The time t has no unit. Noise levels sigma
are standard deviations in units of the scaled data, which is what a network sees.

Everything that differs between SDEs is a method or an attribute of `SDE`, so that a subclass works
with every loss and every sampler. Shapes: `x` is (B, ...) and `t` is (B,); a standard deviation or
a diffusion coefficient is one number for each example, (B,).
"""

import abc
import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from runtime.array_types import Array, Batch, Labels, PerExample, RandomKey
from runtime.errors import UserError
from runtime.registry import Registry

ScoreFn = Callable[[Batch, PerExample], Batch]
Times = float | Float[Array, '*times']
Chain = Float[np.ndarray, 'N']  # one number for each step of a discrete chain

SDES = Registry('SDE', keys={'N': 'num_scales'})
register_sde = SDES.register


def batch_mul(a: PerExample, b: Batch) -> Batch:
  """Multiplies each example of `b`, (B, ...), by its number in `a`, (B,)."""
  return jax.vmap(jnp.multiply)(a, b)


@dataclasses.dataclass(frozen=True)
class SDE(abc.ABC):
  """A forward SDE with Gaussian transition kernels. Subclasses declare the field `N`.

  A subclass implements `sde`, `marginal_prob`, `prior_sampling` and `prior_logp`. Everything else
  has a default that fits a variance-preserving process.

  Attributes:
    N: the number of discretization steps of [0, T].
    T: the end time, at which x_t has the distribution of the prior.
    sampling_eps: the time at which samplers stop, because the score is ill-conditioned below it.
  """

  T: ClassVar[float] = 1.0
  sampling_eps: ClassVar[float] = 1e-3

  @abc.abstractmethod
  def sde(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """The drift f(x, t), shaped as `x`, and the diffusion coefficient g(t), (B,), of Eq. 5."""

  @abc.abstractmethod
  def marginal_prob(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """The mean, shaped as `x`, and the standard deviation, (B,), of p(x_t | x_0 = x)."""

  def alpha_sigma(self, t: PerExample) -> tuple[PerExample, PerExample]:
    """alpha_t and sigma_t, both (B,), of the marginals p(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I).

    The mean of the marginals must be linear in x_0, as it is for all SDEs of the paper.
    """
    return self.marginal_prob(jnp.ones_like(t), t)

  def denoise(self, x: Batch, t: PerExample, score: Batch) -> Batch:
    """E[x_0 | x_t] = (x_t + sigma_t^2 score) / alpha_t, by Tweedie's formula; shaped as `x`.

    Args:
      x: x_t, (B, ...).
      t: times in (0, T], (B,).
      score: the score of p_t at `x`, shaped as `x`.
    """
    alpha, sigma = self.alpha_sigma(t)
    return batch_mul(1 / alpha, x + batch_mul(sigma**2, score))

  @abc.abstractmethod
  def prior_sampling(self, rng: RandomKey, shape: tuple[int, ...]) -> Float[Array, '...']:
    """A sample of `shape` from the prior p_T."""

  @abc.abstractmethod
  def prior_logp(self, z: Batch) -> PerExample:
    """The log-density log p_T(z) of the prior in nats, (B,), at `z`, (B, ...)."""

  def discretize(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """f_i, shaped as `x`, and G_i, (B,), of one forward step x_{i+1} = x_i + f_i(x_i) + G_i z_i.

    The default is Euler-Maruyama: f_i = f(x, t) T / N and G_i = g(t) sqrt(T / N).
    """
    dt = self.T / self.N
    drift, diffusion = self.sde(x, t)
    return drift * dt, diffusion * np.sqrt(dt)

  def reverse(self, score_fn: ScoreFn, probability_flow: bool = False) -> 'ReverseSDE':
    """The reverse-time SDE (Eq. 6), or the probability flow ODE (Eq. 13), under `score_fn`."""
    return ReverseSDE(self, score_fn, probability_flow)

  # What a network is conditioned on, and what its output means.

  def time_label(self, t: PerExample, continuous: bool = True) -> PerExample | Labels:
    """The value, (B,), that a network is conditioned on at the times `t`, (B,).

    A network that was trained on continuous time gets 0...999 whatever N is, as the published
    models do; one that was trained on the discrete chain gets 0...N-1.
    """
    return t * (999 if continuous else self.N - 1)

  def score_scale(self, t: PerExample, continuous: bool = True) -> PerExample:
    """The factor, (B,), that turns the network's output into the score at the times `t`, (B,).

    By default the network predicts the noise z of x_t = alpha_t x_0 + sigma_t z, and the score is
    -z / sigma_t.
    """
    del continuous
    return -1 / self.alpha_sigma(t)[1]

  # The discrete chain behind SMLD or DDPM.

  def timestep(self, t: PerExample) -> Labels:
    """The steps 0...N-1 of the discrete chain, (B,), at the times `t` in [0, T], (B,)."""
    return (t * (self.N - 1) / self.T).astype(jnp.int32)

  def perturb_discrete(
    self, x: Batch, noise: Batch, labels: Labels
  ) -> tuple[Batch, Batch, PerExample]:
    """Perturbed data, regression target and loss weight of the discrete objective.

    Args:
      x: data, (B, ...).
      noise: standard normal noise, shaped as `x`.
      labels: what the network is conditioned on, integers in 0...N-1, (B,).

    Returns:
      The perturbed data and the target, both shaped as `x`, and the weight, (B,).

    Raises:
      UserError: if the SDE has no discrete counterpart.
    """
    raise UserError(
      f'{type(self).__name__} has no discrete training objective; set training.continuous=True.'
    )

  def langevin_alpha(self, t: PerExample) -> PerExample:
    """The factor alpha, (B,), of the Langevin step size at `t`, (B,) (Algorithms 4 and 5)."""
    return jnp.ones_like(t)

  def ancestral_step(self, score_fn: ScoreFn, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """The mean, shaped as `x`, and the standard deviation, (B,), of x_s given x_t, s = t - T / N.

    With x_t = a x_s + sqrt(v) z, where a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2,
    the mean is (x_t + v score) / a, and the variance is that of p(x_s | x_t, x_0), which is
    v sigma_s^2 / sigma_t^2. The mean of the marginals must be linear in x_0.

    Args:
      score_fn: (x, t) -> score, shaped as `x`.
      x: x_t, (B, ...).
      t: times in (0, T], (B,).
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
  """The time reversal of an SDE under a score, to be run from T to 0 with negative time steps.

  Attributes:
    forward: the forward SDE.
    score_fn: (x, t) -> score, shaped as `x`.
    probability_flow: the probability flow ODE (Eq. 13) in place of the reverse-time SDE (Eq. 6).
  """

  forward: SDE
  score_fn: ScoreFn
  probability_flow: bool = False

  @property
  def N(self) -> int:
    """The number of discretization steps, that of the forward SDE."""
    return self.forward.N

  @property
  def T(self) -> float:
    """The time from which the reversal starts, that of the forward SDE."""
    return self.forward.T

  def sde(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """Drift, shaped as `x`, and diffusion coefficient, (B,), at `x`, (B, ...), and `t`, (B,).

    They are f - g^2 score and g (Eq. 6), or f - g^2 score / 2 and 0 for the ODE (Eq. 13).
    """
    return self._reverse(*self.forward.sde(x, t), x, t)

  def discretize(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """f_i, shaped as `x`, and G_i, (B,), of the reverse diffusion sampler (Eq. 46).

    One of its steps is x_i = x_{i+1} - f_i(x_{i+1}) + G_i z.
    """
    return self._reverse(*self.forward.discretize(x, t), x, t)

  def _reverse(self, f: Batch, g: PerExample, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    score = batch_mul(g**2, self.score_fn(x, t))
    if self.probability_flow:
      return f - 0.5 * score, jnp.zeros_like(g)
    return f - score, g


def _normal_logp(z: Batch, sigma: float) -> PerExample:
  """log N(z; 0, sigma^2 I) in nats, (B,)."""
  dim = int(np.prod(z.shape[1:]))
  squares = jnp.sum(z.reshape(z.shape[0], -1) ** 2, axis=-1)
  return -dim / 2 * np.log(2 * np.pi * sigma**2) - squares / (2 * sigma**2)


@dataclasses.dataclass(frozen=True)
class _LinearBetaSDE(SDE):
  """What the VP and sub-VP SDEs share: beta(t) = beta_min + t (beta_max - beta_min)."""

  beta_min: float = 0.1
  beta_max: float = 20.0
  N: int = 1000

  def __post_init__(self):
    if not 0 <= self.beta_min <= self.beta_max or self.beta_max == 0:
      raise UserError(
        f'{type(self).__name__} needs 0 <= beta_min <= beta_max and beta_max > 0, got '
        f'beta_min={self.beta_min} and beta_max={self.beta_max}: change these two settings.'
      )
    _check_steps(self)

  def beta(self, t: Times) -> Times:
    """beta(t), shaped as `t`."""
    return self.beta_min + t * (self.beta_max - self.beta_min)

  def log_mean_coeff(self, t: Times) -> Times:
    """log alpha_t = -1/2 int_0^t beta(s) ds, shaped as `t`."""
    return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

  def prior_sampling(self, rng: RandomKey, shape: tuple[int, ...]) -> Float[Array, '...']:
    """A standard normal sample of `shape`."""
    return jax.random.normal(rng, shape)

  def prior_logp(self, z: Batch) -> PerExample:
    """log N(z; 0, I) in nats, (B,)."""
    return _normal_logp(z, 1.0)

  @cached_property
  def discrete_betas(self) -> Chain:
    """beta_i of the DDPM chain for i = 0...N-1, (N,)."""
    return np.linspace(self.beta_min / self.N, self.beta_max / self.N, self.N, dtype=np.float32)

  @cached_property
  def alphas(self) -> Chain:
    """1 - beta_i of the DDPM chain for i = 0...N-1, (N,).

    Raises:
      UserError: if N is so small that some of them are not positive.
    """
    if self.beta_max >= self.N:
      raise UserError(
        f'The discrete chain of {type(self).__name__} needs more steps than beta_max: '
        f'got N={self.N} (sampling.n_steps, else model.num_scales) and beta_max={self.beta_max}; '
        f'raise N or use the predictor euler_maruyama with the corrector none.'
      )
    return 1 - self.discrete_betas

  def langevin_alpha(self, t: PerExample) -> PerExample:
    """1 - beta_i at the step i of the DDPM chain, (B,) (Algorithm 5)."""
    return jnp.asarray(self.alphas, t.dtype)[self.timestep(t)]


@register_sde(name='vpsde')
@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBetaSDE):
  """The variance preserving SDE, the continuous limit of DDPM (Eq. 11).

  dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw, with the marginals
  N(alpha_t x_0, (1 - alpha_t^2) I), alpha_t = exp(-1/2 int_0^t beta) (Eq. 29).

  Args:
    beta_min: beta(0).
    beta_max: beta(1).
    N: the number of discretization steps.

  Raises:
    UserError: unless 0 <= beta_min <= beta_max, beta_max > 0 and N >= 1.
  """

  def sde(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """-1/2 beta(t) x, shaped as `x`, and sqrt(beta(t)), (B,) (Eq. 11)."""
    beta_t = self.beta(t)
    return -0.5 * batch_mul(beta_t, x), jnp.sqrt(beta_t)

  def marginal_prob(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """alpha_t x, shaped as `x`, and sqrt(1 - alpha_t^2), (B,) (Eq. 29)."""
    log_alpha_t = self.log_mean_coeff(t)
    return batch_mul(jnp.exp(log_alpha_t), x), jnp.sqrt(-jnp.expm1(2 * log_alpha_t))

  def discretize(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """(sqrt(1 - beta_i) - 1) x, shaped as `x`, and sqrt(beta_i), (B,), of the DDPM chain.

    The chain is x_{i+1} = sqrt(1 - beta_i) x_i + sqrt(beta_i) z_i (Eq. 10).
    """
    i = self.timestep(t)
    sqrt_alpha, beta = jnp.asarray(np.sqrt(self.alphas))[i], jnp.asarray(self.discrete_betas)[i]
    return batch_mul(sqrt_alpha, x) - x, jnp.sqrt(beta)

  @cached_property
  def alphas_cumprod(self) -> Chain:
    """abar_i = prod_{j <= i} (1 - beta_j) for i = 0...N-1, (N,)."""
    # In double precision: rounding would add up over the product.
    return np.cumprod(self.alphas, dtype=np.float64).astype(np.float32)

  @cached_property
  def sqrt_alphas_cumprod(self) -> Chain:
    """sqrt(abar_i) for i = 0...N-1, (N,), the factor of the data in the DDPM chain."""
    return np.sqrt(self.alphas_cumprod)

  @cached_property
  def sqrt_1m_alphas_cumprod(self) -> Chain:
    """sqrt(1 - abar_i) for i = 0...N-1, (N,), the noise level of the DDPM chain."""
    return np.sqrt(1 - self.alphas_cumprod)

  def score_scale(self, t: PerExample, continuous: bool = True) -> PerExample:
    """-1 / sigma_t, or -1 / sqrt(1 - abar_i) of the DDPM chain if not `continuous`, (B,)."""
    if continuous:
      return super().score_scale(t)
    labels = self.time_label(t, continuous=False).astype(jnp.int32)
    return -1 / jnp.asarray(self.sqrt_1m_alphas_cumprod)[labels]

  def perturb_discrete(
    self, x: Batch, noise: Batch, labels: Labels
  ) -> tuple[Batch, Batch, PerExample]:
    """The DDPM objective: predict the noise of x_i ~ N(sqrt(abar_i) x, (1 - abar_i) I) (Eq. 3).

    Arguments and returns are those of `SDE.perturb_discrete`; all weights are 1.
    """
    mean = batch_mul(jnp.asarray(self.sqrt_alphas_cumprod)[labels], x)
    std = jnp.asarray(self.sqrt_1m_alphas_cumprod)[labels]
    return mean + batch_mul(std, noise), noise, jnp.ones_like(std)

  def ancestral_step(self, score_fn: ScoreFn, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """DDPM's ancestral sampling (Eq. 4): the mean, shaped as `x`, and sqrt(beta_i), (B,)."""
    i = self.timestep(t)
    sqrt_alpha, beta = jnp.asarray(np.sqrt(self.alphas))[i], jnp.asarray(self.discrete_betas)[i]
    mean = batch_mul(1 / sqrt_alpha, x + batch_mul(beta, score_fn(x, t)))
    return mean, jnp.sqrt(beta)


@register_sde(name='subvpsde')
@dataclasses.dataclass(frozen=True)
class subVPSDE(_LinearBetaSDE):
  """The sub-VP SDE (Eq. 12), whose variance is at most that of the VP SDE.

  dx = -1/2 beta(t) x dt + sqrt(beta(t) (1 - alpha_t^4)) dw, with the marginals
  N(alpha_t x_0, (1 - alpha_t^2)^2 I) (Eq. 29). The paper proposes it for likelihoods.

  Args:
    beta_min: beta(0).
    beta_max: beta(1).
    N: the number of discretization steps.

  Raises:
    UserError: unless 0 <= beta_min <= beta_max, beta_max > 0 and N >= 1.
  """

  def sde(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """-1/2 beta(t) x, shaped as `x`, and sqrt(beta(t) (1 - alpha_t^4)), (B,) (Eq. 12)."""
    beta_t = self.beta(t)
    discount = -jnp.expm1(4 * self.log_mean_coeff(t))
    return -0.5 * batch_mul(beta_t, x), jnp.sqrt(beta_t * discount)

  def marginal_prob(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """alpha_t x, shaped as `x`, and 1 - alpha_t^2, (B,) (Eq. 29)."""
    log_alpha_t = self.log_mean_coeff(t)
    return batch_mul(jnp.exp(log_alpha_t), x), -jnp.expm1(2 * log_alpha_t)


@register_sde(name='vesde')
@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
  """The variance exploding SDE, the continuous limit of SMLD (Eq. 9).

  dx = sqrt(d[sigma^2(t)]/dt) dw with sigma(t) = sigma_min (sigma_max / sigma_min)^t (Eq. 30), and
  with the marginals N(x_0, sigma(t)^2 I).

  Args:
    sigma_min: the smallest noise level, in units of the scaled data.
    sigma_max: the largest noise level, in the same units; the paper takes the largest distance
      between two training images.
    N: the number of discretization steps.

  Raises:
    UserError: unless 0 < sigma_min < sigma_max and N >= 1.
  """

  sampling_eps: ClassVar[float] = 1e-5

  sigma_min: float = 0.01
  sigma_max: float = 50.0
  N: int = 1000

  def __post_init__(self):
    if not 0 < self.sigma_min < self.sigma_max:
      raise UserError(
        f'VESDE needs 0 < sigma_min < sigma_max, got sigma_min={self.sigma_min} and '
        f'sigma_max={self.sigma_max}: change these two settings.'
      )
    _check_steps(self)

  def sigma(self, t: Times) -> Times:
    """The noise level sigma(t) in units of the scaled data, shaped as `t` (Eq. 30)."""
    return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

  def sde(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """Zero, shaped as `x`, and sigma(t) sqrt(2 log(sigma_max / sigma_min)), (B,) (Eq. 9, 30)."""
    rate = float(np.float32(np.sqrt(2 * np.log(self.sigma_max / self.sigma_min))))
    return jnp.zeros_like(x), self.sigma(t) * rate

  def marginal_prob(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """`x` itself and sigma(t), (B,)."""
    return x, self.sigma(t)

  def prior_sampling(self, rng: RandomKey, shape: tuple[int, ...]) -> Float[Array, '...']:
    """A sample of N(0, sigma_max^2 I) of `shape`."""
    return jax.random.normal(rng, shape) * self.sigma_max

  def prior_logp(self, z: Batch) -> PerExample:
    """log N(z; 0, sigma_max^2 I) in nats, (B,)."""
    return _normal_logp(z, self.sigma_max)

  @cached_property
  def discrete_sigmas(self) -> Chain:
    """sigma_i of the SMLD chain for i = 0...N-1, increasing, (N,)."""
    # The exponents are in single precision, in which the published models were trained and sampled;
    # the rest is NumPy's, because JAX rounds its exponentials differently from version to version,
    # and the differences of neighbouring squares amplify that.
    log_sigmas = np.linspace(np.log(self.sigma_min), np.log(self.sigma_max), self.N)
    return np.exp(np.float32(log_sigmas).astype(np.float64)).astype(np.float32)

  def _adjacent_sigmas(self, t: PerExample) -> tuple[PerExample, PerExample]:
    """sigma_i and sigma_{i-1}, both (B,), at the times `t`, (B,), with sigma_{-1} = 0."""
    sigmas = jnp.asarray(np.concatenate([[0], self.discrete_sigmas]).astype(np.float32))
    i = self.timestep(t)
    return sigmas[i + 1], sigmas[i]

  def discretize(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """Zero, shaped as `x`, and sqrt(sigma_{i+1}^2 - sigma_i^2), (B,), of the SMLD chain.

    The chain is x_{i+1} = x_i + sqrt(sigma_{i+1}^2 - sigma_i^2) z_i (Eq. 8).
    """
    sigma, adjacent = self._adjacent_sigmas(t)
    return jnp.zeros_like(x), jnp.sqrt(sigma**2 - adjacent**2)

  def time_label(self, t: PerExample, continuous: bool = True) -> PerExample | Labels:
    """sigma(t), (B,); if not `continuous`, the index of the noise level from the largest down."""
    if continuous:
      return self.sigma(t)
    return jnp.round((self.T - t) * (self.N - 1)).astype(jnp.int32)

  def score_scale(self, t: PerExample, continuous: bool = True) -> PerExample:
    """One, (B,): the network divides its output by sigma itself."""
    return jnp.ones_like(t)

  def perturb_discrete(
    self, x: Batch, noise: Batch, labels: Labels
  ) -> tuple[Batch, Batch, PerExample]:
    """The SMLD objective: predict the score -z / sigma_i with the weight sigma_i^2 (Eq. 1).

    Arguments and returns are those of `SDE.perturb_discrete`.
    """
    sigmas = jnp.asarray(self.discrete_sigmas[::-1].copy())[labels]
    return x + batch_mul(sigmas, noise), -batch_mul(1 / sigmas, noise), sigmas**2

  def ancestral_step(self, score_fn: ScoreFn, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
    """Ancestral sampling of the SMLD chain (Eq. 47): mean and standard deviation of x_{i-1}."""
    sigma, adjacent = self._adjacent_sigmas(t)
    mean = x + batch_mul(sigma**2 - adjacent**2, score_fn(x, t))
    return mean, jnp.sqrt(adjacent**2 * (sigma**2 - adjacent**2) / sigma**2)


def _check_steps(sde: SDE) -> None:
  if sde.N < 1:
    raise UserError(
      f'{type(sde).__name__} needs at least one step, got N={sde.N}: set it to 1 or more.'
    )


def check_consistency(sde: SDE) -> None:
  """Checks that `sde.sde` and `sde.marginal_prob` describe the same process.

  For an affine drift f, the mean m_t and the standard deviation s_t of p(x_t | x_0) obey
  (Särkkä and Solin, "Applied stochastic differential equations", 2019, Eq. 5.50 and 5.51)

    dm/dt = f(m, t),    d(s^2)/dt = 2 (df/dx) s^2 + g(t)^2,

  that is f = (log alpha)' x and g^2 = (sigma^2)' - 2 (log alpha)' sigma^2 where m = alpha x_0.

  Raises:
    UserError: if the two methods disagree at one of five times in [0.1 T, 0.9 T].
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
        f'sde(): make both methods describe the same process.'
      )


def get_sde(config: ConfigDict) -> SDE:
  """The SDE that `config.training.sde` names, with fields from `config.model`.

  Each field of the class is read from the key of the same name (`N` from `num_scales`). A field
  whose key is missing from the configuration keeps its default.

  Raises:
    UserError: if the name is unknown, the SDE refuses the values, or `check_consistency` finds that
      its marginals are not those of its drift and diffusion.
  """
  sde = SDES.build(config.training.sde, config.model)
  check_consistency(sde)
  return sde
