"""Bits per dimension by the instantaneous change of variables (appendix D.2).

Along the probability flow dx = f~(x, t) dt (Eq. 13), d log p_t(x_t) = -div f~(x_t, t) dt (Eq. 39):

    log p_0(x_0) = log p_T(x_T) + int_0^T div f~(x_t, t) dt.

x_T is the latent, at which the density of the prior is taken. The divergence is exact, or
Hutchinson's unbiased estimate E[v . (df~/dx) v] (Eq. 40).

Appendix and equation numbers are those of Song et al., "Score-based generative modeling through
stochastic differential equations", ICLR 2021, https://arxiv.org/abs/2011.13456. NFE is the number
of function evaluations, that is, of calls of the drift f~.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real
from ml_collections import ConfigDict

from models import utils as mutils
from runtime import parallelism
from runtime.array_types import Array, Batch, Count, PerExample, RandomKey, Scalar, Scaler
from runtime.errors import UserError
from runtime.registry import Registry
from samplers import ode_solver
from sde_lib import SDE, ScoreFn
from train_state import State

PyTree = Any
Levels = Real[Array, 'B *dims']  # grey levels, or values in the network's range
Probes = Float[Array, 'K B *dims']
Drift = Callable[[Batch], Batch]
Divergence = Callable[[Drift, Batch], tuple[Batch, PerExample]]
AugmentedDrift = Callable[[Scalar, tuple[Batch, PerExample]], tuple[Batch, PerExample]]
LikelihoodFn = Callable[[RandomKey, State, Levels], tuple[PerExample, Batch, int]]

_LARGEST_EXACT = 4096  # dimensions, each of which costs the exact divergence a pass of the network

_PROBES = Registry('probe of the divergence')
register_probe = _PROBES.register


@register_probe(name='Rademacher')
def rademacher(rng: RandomKey, shape: tuple[int, ...]) -> Float[Array, '...']:
  """Probes of `shape` that are +1 or -1, with the least variance of all independent probes."""
  return jax.random.randint(rng, shape, 0, 2).astype(jnp.float32) * 2 - 1


@register_probe(name='Gaussian')
def gaussian(rng: RandomKey, shape: tuple[int, ...]) -> Float[Array, '...']:
  """Standard normal probes of `shape`."""
  return jax.random.normal(rng, shape)


def hutchinson_divergence(probes: Probes) -> Divergence:
  """Hutchinson's estimator with fixed probes: the mean over K probes v of v . (df/dx) v (Eq. 40).

  Args:
    probes: independent probes of zero mean and unit covariance, (K, B, ...).

  Returns:
    The function `(drift, x) -> (drift(x), estimate)`, with x (B, ...) and the estimate (B,).
  """

  def divergence(drift: Drift, x: Batch) -> tuple[Batch, PerExample]:
    def one(v: Batch) -> tuple[Batch, PerExample]:
      # Forward mode costs about two forward passes on every backend, inside loops too.
      y, along_v = jax.jvp(drift, (x,), (v,))
      return y, _sum(along_v * v)

    if len(probes) == 1:
      return one(probes[0])
    y, estimates = jax.lax.map(one, probes)
    return y[0], estimates.mean(0)

  return divergence


def exact_divergence(drift: Drift, x: Batch) -> tuple[Batch, PerExample]:
  """drift(x), (B, ...), and the trace of its Jacobian, (B,), at `x`, (B, ...).

  The entries of the diagonal are computed one after the other, so that memory does not grow with
  their number.
  """
  dim = x[0].size

  def entry(i: Count) -> PerExample:
    v = jnp.broadcast_to(jax.nn.one_hot(i, dim, dtype=x.dtype).reshape(x.shape[1:]), x.shape)
    return _sum(jax.jvp(drift, (x,), (v,))[1] * v)

  return drift(x), jax.lax.map(entry, jnp.arange(dim)).sum(0)


def _sum(x: Batch) -> PerExample:
  return x.reshape(x.shape[0], -1).sum(-1)


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """The log-density log p_0 of data under a score, and their latents.

  Attributes:
    sde: the forward SDE.
    rtol: the relative tolerance of the ODE solver.
    atol: the absolute tolerance of the ODE solver.
    method: the name of an ODE solver, see `ode_solver.solve`.
    eps: the time in (0, T] that the data are assigned to.
  """

  sde: SDE
  _: dataclasses.KW_ONLY
  rtol: float = 1e-5
  atol: float = 1e-5
  method: str = 'RK45'
  eps: float = 1e-5

  def augmented_drift(self, score_fn: ScoreFn, divergence: Divergence) -> AugmentedDrift:
    """The right-hand side of the ODE for (x_t, the change of log p): f~ and its divergence.

    The arguments are those of `log_prob`; the result is `(t, (x, change)) -> (f~, div f~)`.
    """
    flow = self.sde.reverse(score_fn, probability_flow=True)

    def augmented(t: Scalar, y: tuple[Batch, PerExample]) -> tuple[Batch, PerExample]:
      t = jnp.full((y[0].shape[0],), t)
      return divergence(lambda x: flow.sde(x, t)[0], y[0])

    return augmented

  def log_prob(
    self, score_fn: ScoreFn, x: Batch, divergence: Divergence
  ) -> tuple[PerExample, Batch, Count]:
    """The log-density of data in the network's range.

    Args:
      score_fn: (x, t) -> score, shaped as `x`.
      x: the data, (B, ...).
      divergence: `exact_divergence`, or an estimator of `hutchinson_divergence`.

    Returns:
      log p_0(x) in nats, (B,), the latents x_T, (B, ...), and the NFE.

    Raises:
      UserError: if the ODE solver is unknown or the tolerances are impossible.
    """
    start = (x, jnp.zeros(x.shape[0]))
    (z, change), nfe = ode_solver.solve(
      self.augmented_drift(score_fn, divergence),
      start,
      t0=self.eps,
      t1=self.sde.T,
      rtol=self.rtol,
      atol=self.atol,
      method=self.method,
    )
    return self.sde.prior_logp(z) + change, z, nfe


def dequantize(rng: RandomKey, images: Levels, n_levels: int = 256) -> Batch:
  """Maps grey levels 0...n_levels-1, (B, ...), to [0, 1], spread evenly within each level."""
  u = jax.random.uniform(rng, images.shape)
  return (images.astype(u.dtype) + u) / n_levels


def get_likelihood_fn(
  sde: SDE,
  model: nn.Module,
  inverse_scaler: Scaler,
  hutchinson_type: str = 'Rademacher',
  rtol: float = 1e-5,
  atol: float = 1e-5,
  method: str = 'RK45',
  eps: float = 1e-5,
  continuous: bool = True,
  num_probes: int = 1,
  n_levels: int = 256,
) -> LikelihoodFn:
  """The function `(rng, state, data) -> (bits/dim (B,), latents (B, ...), NFE)`.

  `data` are (B, H, W, C). Those of an integer type are grey levels 0...n_levels-1, which are
  dequantized with `rng`. All others must be dequantized and in the network's range.

  bits/dim = -log_2 p_0(x) / dim + log_2(n_levels d inverse_scaler/dx): the second term changes the
  variables to [0, n_levels], in which a level has the volume 1.

  Args:
    sde: the forward SDE.
    model: the network.
    inverse_scaler: from the network's range to [0, 1]; affine.
    hutchinson_type: the probe, 'Rademacher', 'Gaussian' or a registered name, or 'exact' for the
      divergence without estimation.
    rtol: the relative tolerance of the ODE solver.
    atol: the absolute tolerance of the ODE solver.
    method: the name of an ODE solver, see `ode_solver.solve`.
    eps: the time in (0, T] that the data are assigned to.
    continuous: whether the network was trained on continuous time.
    num_probes: the number of probes of the divergence that are averaged; each costs a pass of the
      network.
    n_levels: the number of grey levels of the data.

  Raises:
    UserError: if the probe or the ODE solver is unknown, or `eps` or `num_probes` is out of range;
      when the function is called, if the images are of another type or range, or the exact
      divergence is to be taken in more than 4096 dimensions.
  """
  exact = hutchinson_type.lower() == 'exact'
  probe = None if exact else _PROBES.get(hutchinson_type)
  method = ode_solver.check_method(method)
  ode_solver.check_eps(eps, sde.T)
  if num_probes < 1:
    raise UserError(f'likelihood.num_probes={num_probes} must be at least 1.')
  likelihood = Likelihood(sde, rtol=rtol, atol=atol, method=method, eps=eps)
  # The inverse scaler is affine: two of its values determine it.
  offset, scale = (float(inverse_scaler(v)) for v in (0.0, 1.0))
  scale -= offset

  @jax.jit
  def likelihood_fn(
    rng: RandomKey, params: PyTree, model_state: PyTree, data: Levels
  ) -> tuple[PerExample, Batch, Count]:
    data = parallelism.shard_batch(data)
    if jnp.issubdtype(data.dtype, jnp.integer):
      rng, data_rng = jax.random.split(rng)
      data = (dequantize(data_rng, data, n_levels) - offset) / scale
    score_fn = mutils.get_score_fn(sde, model, params, model_state, False, continuous)
    if exact:
      divergence = exact_divergence
    else:
      _, probe_rng = jax.random.split(rng)
      probes = probe(probe_rng, (num_probes, *data.shape)).astype(data.dtype)
      divergence = hutchinson_divergence(probes)
    logp, z, nfe = likelihood.log_prob(score_fn, data, divergence)
    dim = data[0].size
    return -logp / (dim * np.log(2)) + np.log2(n_levels * scale), z, nfe

  def call(rng: RandomKey, state: State, data: Levels) -> tuple[PerExample, Batch, int]:
    _check_levels(data, n_levels)
    if exact and data[0].size > _LARGEST_EXACT:
      raise UserError(
        f'An exact divergence of {data[0].size} dimensions is too expensive (the largest number is '
        f'{_LARGEST_EXACT}): use the probe Rademacher.'
      )
    bpd, z, nfe = likelihood_fn(rng, state.params_ema, state.model_state, data)
    return bpd, z, int(nfe)

  return call


def _check_levels(data: Levels, n_levels: int) -> None:
  """Refuses images that are neither float32 (or float64) nor whole numbers in [0, n_levels)."""
  if data.dtype in (jnp.float32, jnp.float64):
    return
  if not jnp.issubdtype(data.dtype, jnp.integer):
    raise UserError(f'The images are of type {data.dtype}: pass float32, or uint8 grey levels.')
  kind = jnp.iinfo(data.dtype)
  if (kind.min < 0 or kind.max >= n_levels) and not jnp.all((data >= 0) & (data < n_levels)):
    raise UserError(
      f'The images of type {data.dtype} have values that are no grey levels, 0 to {n_levels - 1}.'
    )


def doubt(bpd: float) -> str:
  """What is wrong with a mean of bits/dim of dequantized images; '' if nothing is.

  The mean over the dequantization of -log p(x + u) is at least that of -log P(x), which is not
  negative for a probability P of grey levels (Theis et al., "A note on the evaluation of generative
  models", ICLR 2016, section 3.1). A mean below zero is therefore an error of the solver.
  """
  if bpd >= 0:
    return ''
  return f'{bpd:.3g} bits/dim cannot be: set likelihood.rtol and likelihood.atol lower.'


def from_config(
  config: ConfigDict, sde: SDE, model: nn.Module, *, inverse_scaler: Scaler
) -> LikelihoodFn:
  """The function of `get_likelihood_fn` with the settings of `config.likelihood`.

  Raises:
    UserError: if the probe or the ODE solver is unknown.
  """
  settings = config.likelihood
  return get_likelihood_fn(
    sde,
    model,
    inverse_scaler,
    hutchinson_type=settings.hutchinson_type,
    rtol=settings.rtol,
    atol=settings.atol,
    method=settings.ode_solver,
    eps=settings.eps,
    continuous=config.training.continuous,
    num_probes=settings.num_probes,
  )
