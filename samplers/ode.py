"""Sampling by the probability flow ODE with an adaptive solver.

The ODE is Eq. 13 of Song et al., "Score-based generative modeling through stochastic differential
equations", ICLR 2021, https://arxiv.org/abs/2011.13456.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from runtime import parallelism
from runtime.array_types import Batch, Count, RandomKey, Scaler
from samplers import ode_solver
from samplers.base import (
  Carry,
  Condition,
  Sampler,
  SamplingFn,
  check_last_time,
  compile_sampler,
  register_sampler,
)
from samplers.predictor_corrector import ReverseDiffusionPredictor
from sde_lib import SDE, ScoreFn


@dataclasses.dataclass(frozen=True)
class ODESampler(Sampler):
  """The probability flow ODE (Eq. 13) from T to `eps`, by an adaptive solver.

  The steps of the solver are the same for the whole batch. All of them are one step of the sampler.

  Attributes:
    sde: the forward SDE.
    denoise: whether to end with a step of the reverse diffusion sampler without its noise.
    rtol: the relative tolerance of the solver.
    atol: the absolute tolerance of the solver.
    solver: the name of an ODE solver, see `ode_solver.solve`.
    eps: the last time.
  """

  sde: SDE
  _: dataclasses.KW_ONLY
  denoise: bool = False
  rtol: float = 1e-5
  atol: float = 1e-5
  solver: str = 'RK45'
  eps: float = 1e-3

  n_steps = 1

  def init(
    self,
    score_fn: ScoreFn,
    condition: Condition,
    rng: RandomKey,
    shape: tuple[int, ...],
    z: Batch | None,
  ) -> Carry:
    """x_T and an NFE of zero; the arguments are those of `Sampler.init`."""
    x = self.sde.prior_sampling(rng, shape) if z is None else z
    return parallelism.shard_batch(x), jnp.zeros((), jnp.int32)

  def step(self, score_fn: ScoreFn, condition: Condition, i: Count, carry: Carry) -> Carry:
    """x_t at `eps` and the NFE of the solver."""
    flow = self.sde.reverse(condition.flow_score(score_fn), probability_flow=True)
    drift = lambda t, x: flow.sde(x, jnp.full((x.shape[0],), t))[0]
    return ode_solver.solve(
      drift,
      carry[0],
      t0=self.sde.T,
      t1=self.eps,
      rtol=self.rtol,
      atol=self.atol,
      method=self.solver,
    )

  def result(self, score_fn: ScoreFn, condition: Condition, carry: Carry) -> Batch:
    """x_t at `eps`, (B, ...), with `denoise` after one more step without noise."""
    x, _ = carry
    if self.denoise:
      predictor = ReverseDiffusionPredictor(self.sde, condition.flow_score(score_fn))
      t = jnp.full((x.shape[0],), self.eps)
      x = predictor.update_fn(jax.random.PRNGKey(0), x, t)[1]  # the noise of the key is left out
    return x

  def nfe(self, carry: Carry) -> int:
    """The NFE of the solver, the largest if images are solved one by one, and of the denoising."""
    return int(carry[1].max()) + self.denoise


def get_ode_sampler(
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  inverse_scaler: Scaler,
  denoise: bool = False,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  method: str = 'RK45',
  eps: float = 1e-3,
  continuous: bool = True,
) -> SamplingFn:
  """The sampler by the flow of Eq. 13 as a function `(rng, state, z=None) -> (samples, NFE)`.

  Args:
    sde: the forward SDE.
    model: the network.
    shape: (B, H, W, C) over all devices.
    inverse_scaler: from the network's range to [0, 1].
    denoise: whether to add one denoising step.
    rtol: the relative tolerance of the solver.
    atol: the absolute tolerance of the solver.
    method: the name of an ODE solver, see `ode_solver.solve`.
    eps: the last time.
    continuous: whether the network was trained on continuous time.

  Raises:
    UserError: if the ODE solver is unknown, or `eps` is out of range.
  """
  check_last_time(eps, sde.T)
  solver = ode_solver.check_method(method)
  sampler = ODESampler(sde, denoise=denoise, rtol=rtol, atol=atol, solver=solver, eps=eps)
  return compile_sampler(
    sampler, sde, model, shape=shape, inverse_scaler=inverse_scaler, continuous=continuous
  )


@register_sampler(name='ode')
def _ode_sampler(config: ConfigDict, sde: SDE, eps: float) -> Sampler:
  settings = config.sampling
  return ODESampler(
    sde,
    denoise=settings.noise_removal,
    rtol=settings.rtol,
    atol=settings.atol,
    solver=ode_solver.check_method(settings.ode_solver),
    eps=eps,
  )
