"""Bits per dimension by the instantaneous change of variables (appendix D.2 of the paper).

Along the probability flow dx = f~(x, t) dt (Eq. 13), d log p_t(x_t) = -div f~(x_t, t) dt (Eq. 39):

  log p_0(x_0) = log p_T(x_T) + int_0^T div f~(x_t, t) dt.

The latent code is x_T, on which the prior's density is taken. The divergence is exact, or
Hutchinson's unbiased estimate E[v . (df~/dx) v] (Eq. 40).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import utils as mutils
from runtime import parallelism
from runtime.errors import UserError
from runtime.registry import Registry
from samplers import ode_solver
from sde_lib import SDE
from train_state import State

Drift = Callable[[jax.Array], jax.Array]
Divergence = Callable[[Drift, jax.Array], tuple[jax.Array, jax.Array]]
LikelihoodFn = Callable[[jax.Array, State, jax.Array], tuple[jax.Array, jax.Array, int]]

_LARGEST_EXACT = 4096  # dimensions; the exact divergence costs a network call for each

_PROBES = Registry('probe of the divergence')
register_probe = _PROBES.register


@register_probe(name='Rademacher')
def rademacher(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """+1 or -1: the least variance of all independent probes."""
  return jax.random.randint(rng, shape, 0, 2).astype(jnp.float32) * 2 - 1


@register_probe(name='Gaussian')
def gaussian(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal."""
  return jax.random.normal(rng, shape)


def hutchinson_divergence(probes: jax.Array) -> Divergence:
  """The estimator with fixed probes (K, B, ...): mean over K of v . (df/dx) v."""

  def divergence(drift, x):
    def one(v):
      # Forward mode: as fast as two forward passes on every backend, also inside loops.
      y, along_v = jax.jvp(drift, (x,), (v,))
      return y, _sum(along_v * v)

    if len(probes) == 1:
      return one(probes[0])
    y, estimates = jax.lax.map(one, probes)
    return y[0], estimates.mean(0)

  return divergence


def exact_divergence(drift: Drift, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The trace of df/dx, one entry of the diagonal after the other."""
  dim = x[0].size

  def entry(i):
    v = jnp.broadcast_to(jax.nn.one_hot(i, dim, dtype=x.dtype).reshape(x.shape[1:]), x.shape)
    return _sum(jax.jvp(drift, (x,), (v,))[1] * v)

  return drift(x), jax.lax.map(entry, jnp.arange(dim)).sum(0)


def _sum(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], -1).sum(-1)


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """log p_0 of data under a score, and their latent codes.

  Attributes:
    sde: the forward SDE.
    rtol: relative tolerance of the ODE solver.
    atol: absolute tolerance.
    method: a solver, see `ode_solver.solve`.
    eps: the time at which the data are taken to be.
  """

  sde: SDE
  rtol: float = 1e-5
  atol: float = 1e-5
  method: str = 'RK45'
  eps: float = 1e-5

  def log_prob(
    self, score_fn: Callable[..., jax.Array], x: jax.Array, divergence: Divergence
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log p_0(x) in nats (B,), x_T, and the number of network calls; in the network's range."""
    flow = self.sde.reverse(score_fn, probability_flow=True)

    def augmented(t, y):
      t = jnp.full((x.shape[0],), t)
      return divergence(lambda x: flow.sde(x, t)[0], y[0])

    start = (x, jnp.zeros(x.shape[0]))
    (z, change), nfe = ode_solver.solve(
      augmented, start, self.eps, self.sde.T, self.rtol, self.atol, self.method
    )
    return self.sde.prior_logp(z) + change, z, nfe


def dequantize(rng: jax.Array, images: jax.Array, n_levels: int = 256) -> jax.Array:
  """Integer grey levels 0...n_levels-1 to [0, 1], spread evenly within each level."""
  return (images + jax.random.uniform(rng, images.shape)) / n_levels


def get_likelihood_fn(
  sde: SDE,
  model: nn.Module,
  inverse_scaler: Callable[[jax.Array], jax.Array],
  hutchinson_type: str = 'Rademacher',
  rtol: float = 1e-5,
  atol: float = 1e-5,
  method: str = 'RK45',
  eps: float = 1e-5,
  continuous: bool = True,
  num_probes: int = 1,
  n_levels: int = 256,
) -> LikelihoodFn:
  """The function `(rng, state, data) -> (bits/dim (B,), latent codes (B, ...), network calls)`.

  Data of an integer type are grey levels 0...n_levels-1; they are dequantized with `rng`. Other
  data are taken to be dequantized and in the network's range.

  bits/dim = -log_2 p_0(x) / dim + log_2(n_levels d inverse_scaler/dx): the second term is that of a
  change of variables from [0, n_levels], in which a level has the volume 1.

  Args:
    sde: the forward SDE.
    model: the network.
    inverse_scaler: from the network's range to [0, 1]; affine.
    hutchinson_type: 'Rademacher', 'Gaussian', or 'exact' for the divergence without estimation.
    rtol: relative tolerance of the ODE solver.
    atol: absolute tolerance.
    method: a solver, see `ode_solver.solve`.
    eps: the time at which the data are taken to be.
    continuous: whether the network was trained on continuous time.
    num_probes: probes of the divergence that are averaged; each costs a pass of the network.
    n_levels: grey levels of the data.

  Raises:
    UserError: for an unknown probe or solver, or an exact divergence in too many dimensions.
  """
  exact = hutchinson_type.lower() == 'exact'
  probe = None if exact else _PROBES.get(hutchinson_type)
  likelihood = Likelihood(sde, rtol, atol, ode_solver.check_method(method), eps)
  offset, scale = (float(inverse_scaler(v)) for v in (0.0, 1.0))
  scale -= offset

  @jax.jit
  def likelihood_fn(rng, params, model_state, data):
    data = parallelism.shard_batch(data)
    if jnp.issubdtype(data.dtype, jnp.integer):
      rng, data_rng = jax.random.split(rng)
      data = (dequantize(data_rng, data, n_levels) - offset) / scale
    score_fn = mutils.get_score_fn(sde, model, params, model_state, False, continuous)
    if exact:
      divergence = exact_divergence
    else:
      _, probe_rng = jax.random.split(rng)
      divergence = hutchinson_divergence(probe(probe_rng, (num_probes, *data.shape)))
    logp, z, nfe = likelihood.log_prob(score_fn, data, divergence)
    dim = data[0].size
    return -logp / (dim * np.log(2)) + np.log2(n_levels * scale), z, nfe

  def call(rng, state, data):
    if exact and data[0].size > _LARGEST_EXACT:
      raise UserError(
        f'An exact divergence of {data[0].size} dimensions is too expensive (at most '
        f'{_LARGEST_EXACT}): use the probe Rademacher.'
      )
    bpd, z, nfe = likelihood_fn(rng, state.params_ema, state.model_state, data)
    return bpd, z, int(nfe)

  return call


def from_config(
  config: Any, sde: SDE, model: nn.Module, inverse_scaler: Callable[[jax.Array], jax.Array]
) -> LikelihoodFn:
  """`get_likelihood_fn` with the settings of `config.likelihood`."""
  settings = config.likelihood
  return get_likelihood_fn(
    sde,
    model,
    inverse_scaler,
    settings.hutchinson_type,
    settings.rtol,
    settings.atol,
    settings.ode_solver,
    settings.eps,
    config.training.continuous,
    settings.num_probes,
  )
