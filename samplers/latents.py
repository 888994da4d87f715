"""Latents: the images x_T at which the probability flow arrives at the end time T, and back.

The flow is that of Eq. 13 of Song et al., "Score-based generative modeling through stochastic
differential equations", ICLR 2021, https://arxiv.org/abs/2011.13456. It is invertible: decoding an
encoded image gives that image up to the tolerance of the solver, and every image has exactly one
latent. The prior of latents is Gaussian.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import utils as mutils
from runtime import parallelism
from runtime.array_types import Batch, PerExample, Scalar
from samplers import ode_solver
from sde_lib import SDE, batch_mul
from train_state import State

Encoder = Callable[[State, Batch], tuple[Batch, int]]


def get_encoder(
  sde: SDE,
  model: nn.Module,
  *,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  method: str = 'RK45',
  eps: float = 1e-5,
  continuous: bool = True,
) -> Encoder:
  """The function `(state, x) -> (z, NFE)` from images in the network's range to their latents.

  Both x and z are (B, H, W, C). The inverse is `sampling.get_ode_sampler(...)(rng, state, z)` with
  the same `eps`, but for its inverse scaler.

  Args:
    sde: the forward SDE.
    model: the network.
    rtol: the relative tolerance of the ODE solver.
    atol: the absolute tolerance of the ODE solver.
    method: the name of an ODE solver, see `ode_solver.solve`.
    eps: the time in (0, T] that the images are assigned to.
    continuous: whether the network was trained on continuous time.

  Raises:
    UserError: if the ODE solver is unknown, or `eps` is not in (0, T).
  """
  ode_solver.check_method(method)
  ode_solver.check_eps(eps, sde.T)

  @jax.jit
  def encode(params, model_state, x):
    score_fn = mutils.get_score_fn(sde, model, params, model_state, False, continuous)
    flow = sde.reverse(score_fn, probability_flow=True)
    drift = lambda t, x: flow.sde(x, jnp.full((x.shape[0],), t))[0]
    return ode_solver.solve(
      drift,
      parallelism.shard_batch(x),
      t0=eps,
      t1=sde.T,
      rtol=rtol,
      atol=atol,
      method=method,
    )

  def encoder(state: State, x: Batch) -> tuple[Batch, int]:
    z, nfe = encode(state.params_ema, state.model_state, x)
    return z, int(nfe)

  return encoder


def interpolate(z0: Batch, z1: Batch, weight: PerExample | Scalar | float) -> Batch:
  """Spherical interpolation from `z0` (weight 0) to `z1` (weight 1), example by example.

  With the angle w between two latents and the weight a, it is
  (sin((1 - a) w) z0 + sin(a w) z1) / sin w. Unlike a straight line, it keeps the norm that latents
  of a Gaussian prior have.

  Args:
    z0: latents, (B, ...).
    z1: latents, (B, ...).
    weight: weights in [0, 1], (B,), or one number for all.

  Returns:
    Latents, (B, ...).
  """
  weight = jnp.broadcast_to(weight, z0.shape[:1])
  flat0, flat1 = z0.reshape(len(z0), -1), z1.reshape(len(z1), -1)
  norms = jnp.linalg.norm(flat0, axis=-1) * jnp.linalg.norm(flat1, axis=-1)
  angle = jnp.arccos(jnp.clip(jnp.sum(flat0 * flat1, -1) / norms, -1, 1))
  # sin(a w) / sin(w), which tends to a where the latents are parallel.
  part = lambda a: jnp.where(
    angle < 1e-3, a, jnp.sin(a * angle) / jnp.sin(jnp.maximum(angle, 1e-3))
  )
  return batch_mul(part(1 - weight), z0) + batch_mul(part(weight), z1)


def with_temperature(z: Batch, temperature: float | Scalar) -> Batch:
  """The latents `z`, (B, ...), of a prior whose standard deviation is `temperature` times as large.

  A temperature below 1 gives smoother images.
  """
  return z * temperature
