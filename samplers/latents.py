"""Latent codes: what the probability flow makes of an image at the end time T, and back.

The flow (Eq. 13) is invertible, so `decode(encode(x)) = x` up to the tolerance of the solver, and
every image has one code, which is normal under the prior.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import utils as mutils
from runtime import parallelism
from samplers import ode_solver
from sde_lib import SDE, batch_mul
from train_state import State

Encoder = Callable[[State, jax.Array], tuple[jax.Array, int]]


def get_encoder(
  sde: SDE,
  model: nn.Module,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  method: str = 'RK45',
  eps: float = 1e-5,
  continuous: bool = True,
) -> Encoder:
  """The function `(state, x) -> (z, network calls)`, from images in the network's range.

  The way back is `sampling.get_ode_sampler(...)(rng, state, z)` with the same `eps`.

  Args:
    sde: the forward SDE.
    model: the network.
    rtol: relative tolerance of the ODE solver.
    atol: absolute tolerance.
    method: a solver, see `ode_solver.solve`.
    eps: the time at which the images are taken to be.
    continuous: whether the network was trained on continuous time.
  """
  ode_solver.check_method(method)

  @jax.jit
  def encode(params, model_state, x):
    score_fn = mutils.get_score_fn(sde, model, params, model_state, False, continuous)
    flow = sde.reverse(score_fn, probability_flow=True)
    drift = lambda t, x: flow.sde(x, jnp.full((x.shape[0],), t))[0]
    return ode_solver.solve(drift, parallelism.shard_batch(x), eps, sde.T, rtol, atol, method)

  def encoder(state: State, x: jax.Array) -> tuple[jax.Array, int]:
    z, nfe = encode(state.params_ema, state.model_state, x)
    return z, int(nfe)

  return encoder


def interpolate(z0: jax.Array, z1: jax.Array, weight: jax.Array) -> jax.Array:
  """Spherical interpolation from `z0` (weight 0) to `z1` (weight 1), example by example.

  With the angle w between two codes, (sin((1-a) w) z0 + sin(a w) z1) / sin w. It keeps the norm
  that codes of a Gaussian prior have, which a straight line loses.

  Args:
    z0: (B, ...).
    z1: (B, ...).
    weight: (B,), or one number for all.
  """
  weight = jnp.broadcast_to(weight, z0.shape[:1])
  flat0, flat1 = z0.reshape(len(z0), -1), z1.reshape(len(z1), -1)
  norms = jnp.linalg.norm(flat0, axis=-1) * jnp.linalg.norm(flat1, axis=-1)
  angle = jnp.arccos(jnp.clip(jnp.sum(flat0 * flat1, -1) / norms, -1, 1))
  # sin(a w) / sin(w), which tends to a where the codes are parallel.
  part = lambda a: jnp.where(
    angle < 1e-3, a, jnp.sin(a * angle) / jnp.sin(jnp.maximum(angle, 1e-3))
  )
  return batch_mul(part(1 - weight), z0) + batch_mul(part(weight), z1)


def with_temperature(z: jax.Array, temperature: float) -> jax.Array:
  """Codes of a prior whose deviation is `temperature` times as large; below 1, smoother images."""
  return z * temperature
