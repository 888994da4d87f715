"""Data whose score is known in closed form, the networks that predict it, and a user's SDE.

In all formulas x_t = alpha x_0 + sigma z with z ~ N(0, I), where alpha and sigma are those of
`SDE.marginal_prob` at time t. As in the code under test, `x` is (B, ...) and `t` is (B,), and a
score function takes both and returns an array shaped as `x`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

import sde_lib
from models import utils
from sde_lib import SDE, ScoreFn, batch_mul

# What the golden values were recorded with.

RECORDED_SDES = {
  'vp': sde_lib.VPSDE(0.1, 20, 1000),
  'subvp': sde_lib.subVPSDE(0.1, 20, 1000),
  've': sde_lib.VESDE(0.01, 50, 1000),
  'vp_n17': sde_lib.VPSDE(0.2, 15, 17),
  've_n17': sde_lib.VESDE(0.02, 30, 17),
}


def recorded_score(x: jax.Array, t: jax.Array) -> jax.Array:
  """-x / (0.5 + t) + sin(3 x), which is the score of no data."""
  return batch_mul(1 / (0.5 + t), -x) + jnp.sin(3 * x)


@sde_lib.register_sde(name='constant_beta')
@dataclasses.dataclass(frozen=True)
class ConstantBetaSDE(SDE):
  """A user's SDE, which defines only what it must: dx = -b/2 x dt + sqrt(b) dw."""

  b: float = 9.0
  N: int = 200

  def sde(self, x, t):
    return -0.5 * self.b * x, jnp.full_like(t, self.b**0.5)

  def marginal_prob(self, x, t):
    alpha = jnp.exp(-0.5 * self.b * t)
    return batch_mul(alpha, x), jnp.sqrt(1 - alpha**2)

  def prior_sampling(self, rng, shape):
    return jax.random.normal(rng, shape)

  def prior_logp(self, z):
    return jax.scipy.stats.norm.logpdf(z).reshape(z.shape[0], -1).sum(-1)


def noise_scales(sde: SDE, t: jax.Array) -> tuple[jax.Array, jax.Array]:
  """alpha and sigma of each time, (B,)."""
  return sde.marginal_prob(jnp.ones_like(t), t)


# Independent entries, all N(mean, std^2).


def gaussian_marginal(
  sde: SDE, t: jax.Array, mean: float | jax.Array = 0.0, std: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of an entry of x_t, (B,).

  They are alpha mean and sqrt(alpha^2 std^2 + sigma^2).
  """
  alpha, sigma = noise_scales(sde, t)
  return alpha * mean, jnp.sqrt(alpha**2 * std**2 + sigma**2)


def gaussian_score(sde: SDE, mean: float | jax.Array = 0.0, std: float = 1.0) -> ScoreFn:
  """(alpha mean - x) / (alpha^2 std^2 + sigma^2), with one mean or one for each example, (B,)."""

  def score_fn(x, t):
    center, deviation = gaussian_marginal(sde, t, mean, std)
    return batch_mul(1 / deviation**2, batch_mul(center, jnp.ones_like(x)) - x)

  return score_fn


def end_of_gaussian_flow(
  sde: SDE, z: jax.Array, eps: float, mean: float = 0.0, std: float = 1.0
) -> jax.Array:
  """Where the probability flow leads from `z` at time T to time `eps`, shaped as `z`.

  It keeps the number of standard deviations from the mean: x = m_eps + s_eps (z - m_T) / s_T, where
  m_t and s_t are those of `gaussian_marginal`.
  """
  m, s = gaussian_marginal(sde, jnp.asarray([sde.T, eps]), mean, std)
  return m[1] + s[1] * (z - m[0]) / s[0]


class GaussianNetwork(nn.Module):
  """The noise in x for data N(0, std^2): x sigma / (alpha^2 std^2 + sigma^2).

  Attributes:
    sde: one whose networks predict noise, and are told 999 t.
    std: standard deviation of the data.
  """

  sde: SDE
  std: float = 0.3

  def __call__(self, x: jax.Array, labels: jax.Array, train: bool = True) -> jax.Array:
    alpha, sigma = noise_scales(self.sde, labels / 999)
    return batch_mul(sigma / (alpha**2 * self.std**2 + sigma**2), x)


class ConvolutionalGaussianNetwork(GaussianNetwork):
  """The same, with one parameter, which is 1 at first: a convolution by it comes before."""

  @nn.compact
  def __call__(self, x: jax.Array, labels: jax.Array, train: bool = True) -> jax.Array:
    x = nn.Conv(x.shape[-1], (1, 1), kernel_init=nn.initializers.ones)(x)
    return super().__call__(x, labels, train)


@utils.register_model(name='trainable_gaussian')
class TrainableGaussianNetwork(nn.Module):
  """The noise in x for data N(0, s^2) under `ConstantBetaSDE(b)`, with s to be learned.

  Attributes:
    num_channels: image channels; each has its s.
    b: that of the SDE.
    initial_scale: s before training.
  """

  num_channels: int
  b: float = 9.0
  initial_scale: float = 0.3

  @nn.compact
  def __call__(self, x: jax.Array, labels: jax.Array, train: bool = True) -> jax.Array:
    s = self.param('s', nn.initializers.constant(self.initial_scale), (self.num_channels,))
    alpha, sigma = (
      v[:, None, None, None] for v in noise_scales(ConstantBetaSDE(self.b), labels / 999)
    )
    return x * sigma / (alpha**2 * s**2 + sigma**2)


# Correlated entries.


def correlated_gaussian_score(sde: SDE, mean: jax.Array, covariance: jax.Array) -> ScoreFn:
  """(alpha^2 C + sigma^2 I)^-1 (alpha mean - x), in the eigenbasis of C.

  Args:
    sde: the SDE.
    mean: the mean of the D entries of an example, (D,).
    covariance: their covariance C, (D, D).
  """
  values, vectors = jnp.linalg.eigh(jnp.asarray(covariance, jnp.float32))

  def score_fn(x, t):
    alpha, sigma = (v[:, None] for v in noise_scales(sde, t))
    error = x.reshape(len(x), len(mean)) - alpha * mean[None]
    in_basis = error @ vectors / (alpha**2 * values[None] + sigma**2)
    return -(in_basis @ vectors.T).reshape(x.shape)

  return score_fn


# Mixtures of K Gaussians of equal weight, N(means[k], std^2 I).


def mixture_log_density(
  x: jax.Array, alpha: jax.Array, sigma: jax.Array, means: jax.Array, std: float
) -> jax.Array:
  """log p_t of one x: log sum_k N(x; alpha means[k], (alpha^2 std^2 + sigma^2) I) / K.

  Args:
    x: one example, (...).
    alpha: the factor of the data at time t, ().
    sigma: the standard deviation of the noise, ().
    means: the centers, (K, ...).
    std: standard deviation of each Gaussian.
  """
  variance = (alpha * std) ** 2 + sigma**2
  squares = jnp.sum((x[None] - alpha * means).reshape(len(means), -1) ** 2, axis=-1)
  return (
    jax.nn.logsumexp(-squares / (2 * variance))
    - x.size / 2 * jnp.log(2 * jnp.pi * variance)
    - jnp.log(float(len(means)))
  )


def mixture_score(sde: SDE, means: jax.Array, std: float) -> ScoreFn:
  """The gradient of `mixture_log_density` in x."""
  gradient = jax.vmap(jax.grad(mixture_log_density), in_axes=(0, 0, 0, None, None))

  def score_fn(x, t):
    return gradient(x, *noise_scales(sde, t), means, std)

  return score_fn
