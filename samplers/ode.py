"""Sampling by the probability flow ODE (Eq. 13) with an adaptive solver."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from runtime import parallelism
from samplers import ode_solver
from samplers.base import Sampler, SamplingFn, compile_sampler, register_sampler
from samplers.predictor_corrector import ReverseDiffusionPredictor
from sde_lib import SDE


@dataclasses.dataclass(frozen=True)
class ODESampler(Sampler):
  """The probability flow ODE (Eq. 13) from T to `eps`, by an adaptive solver.

  One step controller serves the whole batch. It is one `Sampler` step.

  Attributes:
    sde: the forward SDE.
    denoise: take one step of the reverse diffusion sampler, without its noise, at the end.
    rtol: relative tolerance of the solver.
    atol: absolute tolerance.
    solver: a name, see `ode_solver.solve`.
    eps: the last time.
  """

  sde: SDE
  denoise: bool = False
  rtol: float = 1e-5
  atol: float = 1e-5
  solver: str = 'RK45'
  eps: float = 1e-3

  n_steps = 1

  def init(self, score_fn, condition, rng, shape, z):
    x = self.sde.prior_sampling(rng, shape) if z is None else z
    return parallelism.shard_batch(x), jnp.zeros((), jnp.int32)

  def step(self, score_fn, condition, i, carry):
    flow = self.sde.reverse(condition.flow_score(score_fn), probability_flow=True)
    drift = lambda t, x: flow.sde(x, jnp.full((x.shape[0],), t))[0]
    return ode_solver.solve(
      drift, carry[0], self.sde.T, self.eps, self.rtol, self.atol, self.solver
    )

  def result(self, score_fn, condition, carry):
    x, _ = carry
    if self.denoise:
      predictor = ReverseDiffusionPredictor(self.sde, condition.flow_score(score_fn))
      t = jnp.full((x.shape[0],), self.eps)
      x = predictor.update_fn(jax.random.PRNGKey(0), x, t)[1]
    return x

  def nfe(self, carry):
    return int(carry[1].max()) + self.denoise  # the most, where images are solved one by one


def get_ode_sampler(
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  inverse_scaler: Callable[[jax.Array], jax.Array],
  denoise: bool = False,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  method: str = 'RK45',
  eps: float = 1e-3,
  continuous: bool = True,
) -> SamplingFn:
  """A sampler `(rng, state, z=None) -> (samples, number of network calls)` by the flow of Eq. 13.

  Args:
    sde: the forward SDE.
    model: the network.
    shape: (B, H, W, C) over all devices.
    inverse_scaler: from the network's range to [0, 1].
    denoise: add one denoising step.
    rtol: relative tolerance of the solver.
    atol: absolute tolerance.
    method: of `ode_solver.solve`.
    eps: the last time.
    continuous: whether the network was trained on continuous time.
  """
  flow = ODESampler(sde, denoise, rtol, atol, ode_solver.check_method(method), eps)
  return compile_sampler(flow, sde, model, shape, inverse_scaler, continuous)


@register_sampler(name='ode')
def _ode_method(config: Any, sde: SDE, eps: float) -> Sampler:
  settings = config.sampling
  solver = ode_solver.check_method(settings.ode_solver)
  return ODESampler(sde, settings.noise_removal, settings.rtol, settings.atol, solver, eps)
