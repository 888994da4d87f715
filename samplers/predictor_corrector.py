"""Predictors, correctors and Algorithm 1, which takes them in turn."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from runtime import parallelism
from runtime.errors import UserError
from samplers.base import (
  Corrector,
  Predictor,
  Sampler,
  SamplingFn,
  compile_sampler,
  get_corrector,
  get_predictor,
  register_corrector,
  register_predictor,
  register_sampler,
)
from sde_lib import SDE, ScoreFn, batch_mul


@register_predictor(name='euler_maruyama')
class EulerMaruyamaPredictor(Predictor):
  """Euler-Maruyama for the reverse SDE with the step T / N."""

  def update_fn(self, rng, x, t):
    dt = -self.rsde.T / self.rsde.N
    z = jax.random.normal(rng, x.shape)
    drift, diffusion = self.rsde.sde(x, t)
    x_mean = x + drift * dt
    return x_mean + batch_mul(diffusion, (-dt) ** 0.5 * z), x_mean


@register_predictor(name='reverse_diffusion')
class ReverseDiffusionPredictor(Predictor):
  """The reverse diffusion sampler (Eq. 46): discretized as the forward chain is."""

  def update_fn(self, rng, x, t):
    f, G = self.rsde.discretize(x, t)
    z = jax.random.normal(rng, x.shape)
    x_mean = x - f
    return x_mean + batch_mul(G, z), x_mean


@register_predictor(name='ancestral_sampling')
class AncestralSamplingPredictor(Predictor):
  """Ancestral sampling of the discrete chain: Eq. 4 for the VP SDE, Eq. 47 for the VE SDE."""

  def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False):
    if probability_flow:
      raise UserError(
        'The predictor ancestral_sampling has no probability flow: set '
        'sampling.probability_flow=False or choose reverse_diffusion or euler_maruyama.'
      )
    super().__init__(sde, score_fn, probability_flow)

  def update_fn(self, rng, x, t):
    x_mean, std = self.sde.ancestral_step(self.score_fn, x, t)
    z = jax.random.normal(rng, x.shape)
    return x_mean + batch_mul(std, z), x_mean


@register_predictor(name='none')
class NonePredictor(Predictor):
  """Leaves x as it is, for sampling with a corrector alone."""

  nfe = 0

  def update_fn(self, rng, x, t):
    return x, x


class _LangevinSteps(Corrector):
  """x <- x + eps score + sqrt(2 eps) z, repeated; subclasses choose eps."""

  @abc.abstractmethod
  def step_size(self, x: jax.Array, t: jax.Array, score: jax.Array, z: jax.Array) -> jax.Array:
    """eps, (B,)."""

  def update_fn(self, rng, x, t):
    def step(_, carry):
      rng, x, _ = carry
      rng, step_rng = jax.random.split(rng)
      score = self.score_fn(x, t)
      z = jax.random.normal(step_rng, x.shape)
      eps = self.step_size(x, t, score, z)
      x_mean = x + batch_mul(eps, score)
      return rng, x_mean + batch_mul(jnp.sqrt(2 * eps), z), x_mean

    _, x, x_mean = jax.lax.fori_loop(0, self.n_steps, step, (rng, x, x))
    return x, x_mean


@register_corrector(name='langevin')
class LangevinCorrector(_LangevinSteps):
  """Langevin dynamics (Algorithms 4 and 5), eps = 2 alpha (snr ||z|| / ||score||)^2.

  The norms are means over the whole batch, on however many devices: samples depend, slightly, on
  the batch that they are drawn in.
  """

  def step_size(self, x, t, score, z):
    ratio = self.snr * _mean_norm(z) / _mean_norm(score)
    return 2 * self.sde.langevin_alpha(t) * ratio**2


@register_corrector(name='ald')
class AnnealedLangevinDynamics(_LangevinSteps):
  """Annealed Langevin dynamics of NCSN, eps = 2 alpha (snr std(t))^2."""

  def step_size(self, x, t, score, z):
    sigma = self.sde.alpha_sigma(t)[1]
    return 2 * self.sde.langevin_alpha(t) * (self.snr * sigma) ** 2


@register_corrector(name='none')
class NoneCorrector(Corrector):
  """Leaves x as it is, for sampling with a predictor alone."""

  nfe = 0

  def update_fn(self, rng, x, t):
    return x, x


def _mean_norm(x: jax.Array) -> jax.Array:
  return jnp.mean(jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=-1))


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(Sampler):
  """Algorithm 1 over `sde.N` times from T to `eps`.

  Each step corrects at its time and then predicts the next: the order of the reference
  implementation, whose outputs these are. Algorithm 1 as printed has the two the other way about.
  Network calls are those that are made: where the reference counts N (n_corrector_steps + 1) in any
  case, a predictor or corrector that is 'none' counts nothing here.

  Attributes:
    sde: the forward SDE; `sde.N` is the number of updates, of which the last is the denoising.
    predictor: a `Predictor` class.
    corrector: a `Corrector` class.
    snr: signal-to-noise ratio of the corrector.
    n_corrector_steps: corrector steps before each predictor step.
    probability_flow: solve the probability flow ODE with the predictor.
    denoise: return the last update without its noise.
    eps: the last time.
  """

  sde: SDE
  predictor: type[Predictor]
  corrector: type[Corrector] = NoneCorrector
  snr: float = 0.16
  n_corrector_steps: int = 1
  probability_flow: bool = False
  denoise: bool = True
  eps: float = 1e-3

  @property
  def n_steps(self) -> int:
    return self.sde.N

  @property
  def nfe_per_step(self) -> int:
    corrections = self.n_corrector_steps * self.corrector.nfe
    return corrections + self.predictor.nfe

  def init(self, score_fn, condition, rng, shape, z):
    rng, prior_rng = jax.random.split(rng)
    x = self.sde.prior_sampling(prior_rng, shape) if z is None else z
    x = condition.start(parallelism.shard_batch(x))
    return x, x, rng

  def step(self, score_fn, condition, i, carry):
    x, _, rng = carry
    score_fn = condition.score(score_fn)
    corrector = self.corrector(self.sde, score_fn, self.snr, self.n_corrector_steps)
    predictor = self.predictor(self.sde, score_fn, self.probability_flow)
    t = jnp.full((x.shape[0],), jnp.linspace(self.sde.T, self.eps, self.sde.N)[i])
    rng, corrector_rng = jax.random.split(rng)
    x, _ = condition.update(corrector.update_fn)(corrector_rng, x, t)
    rng, predictor_rng = jax.random.split(rng)
    x, x_mean = condition.update(predictor.update_fn)(predictor_rng, x, t)
    return x, x_mean, rng

  def result(self, score_fn, condition, carry):
    x, x_mean, _ = carry
    return x_mean if self.denoise else x


def get_pc_sampler(
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  predictor: type[Predictor] | None,
  corrector: type[Corrector] | None,
  inverse_scaler: Callable[[jax.Array], jax.Array],
  snr: float,
  n_steps: int = 1,
  probability_flow: bool = False,
  continuous: bool = False,
  denoise: bool = True,
  eps: float = 1e-3,
) -> SamplingFn:
  """A predictor-corrector sampler `(rng, state) -> (samples, number of network calls)`.

  Args:
    sde: the forward SDE; `sde.N` is the number of steps.
    model: the network.
    shape: (B, H, W, C) over all devices.
    predictor: a `Predictor` class; None for none.
    corrector: a `Corrector` class; None for none.
    inverse_scaler: from the network's range to [0, 1].
    snr: signal-to-noise ratio of the corrector.
    n_steps: corrector steps before each predictor step.
    probability_flow: solve the probability flow ODE with the predictor.
    continuous: whether the network was trained on continuous time.
    denoise: return the last step without its noise.
    eps: the last time.
  """
  method = PredictorCorrector(
    sde,
    predictor or NonePredictor,
    corrector or NoneCorrector,
    snr,
    n_steps,
    probability_flow,
    denoise,
    eps,
  )
  return compile_sampler(method, sde, model, shape, inverse_scaler, continuous)


@register_sampler(name='pc')
def _pc_method(config: Any, sde: SDE, eps: float) -> Sampler:
  settings = config.sampling
  if settings.n_steps_each < 0:
    raise UserError(f'sampling.n_steps_each={settings.n_steps_each} must not be negative.')
  predictor, corrector = get_predictor(settings.predictor), get_corrector(settings.corrector)
  if not predictor.nfe + settings.n_steps_each * corrector.nfe:
    raise UserError(
      f'sampling.predictor={settings.predictor!r} and sampling.corrector={settings.corrector!r} '
      f'with sampling.n_steps_each={settings.n_steps_each} never ask the network, so that samples '
      f'would be those of the prior: choose another predictor or corrector.'
    )
  return PredictorCorrector(
    _with_steps(config, sde),
    predictor,
    corrector,
    settings.snr,
    settings.n_steps_each,
    settings.probability_flow,
    settings.noise_removal,
    eps,
  )


def _with_steps(config: Any, sde: SDE) -> SDE:
  """The SDE in `sampling.n_steps` steps, where that is set."""
  n_steps = config.sampling.n_steps
  if n_steps < 0:
    raise UserError(f'sampling.n_steps={n_steps} must be at least 1, or 0 for model.num_scales.')
  if n_steps and not config.training.continuous:
    raise UserError(
      f'sampling.n_steps={n_steps} needs a network that was trained on continuous time: this one '
      f'knows the {sde.N} steps of model.num_scales only; set sampling.n_steps=0.'
    )
  return dataclasses.replace(sde, N=n_steps) if n_steps else sde
