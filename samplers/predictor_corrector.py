"""Predictors, correctors, and the sampler that alternates them (Algorithm 1).

Equation and algorithm numbers are those of Song et al., "Score-based generative modeling through
stochastic differential equations", ICLR 2021, https://arxiv.org/abs/2011.13456. Times t are in
(0, T]; alpha in the step sizes of correctors is `SDE.langevin_alpha`.
"""

import abc
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from runtime import parallelism
from runtime.array_types import Batch, Count, PerExample, RandomKey, Scalar, Scaler
from runtime.errors import UserError
from samplers.base import (
  Carry,
  Condition,
  Corrector,
  Predictor,
  Sampler,
  SamplingFn,
  check_last_time,
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
  """Euler-Maruyama for the reverse SDE (Eq. 6) with the step T / N."""

  def update_fn(self, rng: RandomKey, x: Batch, t: PerExample) -> tuple[Batch, Batch]:
    """x - drift T / N + diffusion sqrt(T / N) z, and the same without z; see the base class."""
    dt = -self.rsde.T / self.rsde.N
    z = jax.random.normal(rng, x.shape)
    drift, diffusion = self.rsde.sde(x, t)
    x_mean = x + drift * dt
    return x_mean + batch_mul(diffusion, (-dt) ** 0.5 * z), x_mean


@register_predictor(name='reverse_diffusion')
class ReverseDiffusionPredictor(Predictor):
  """The reverse diffusion sampler (Eq. 46), which is discretized as the forward SDE is."""

  def update_fn(self, rng: RandomKey, x: Batch, t: PerExample) -> tuple[Batch, Batch]:
    """x - f_i + G_i z, and the same without z; see the base class."""
    f, G = self.rsde.discretize(x, t)
    z = jax.random.normal(rng, x.shape)
    x_mean = x - f
    return x_mean + batch_mul(G, z), x_mean


@register_predictor(name='ancestral_sampling')
class AncestralSamplingPredictor(Predictor):
  """Ancestral sampling of the discrete chain: Eq. 4 for the VP SDE, Eq. 47 for the VE SDE.

  Raises:
    UserError: if it is to solve the probability flow ODE.
  """

  def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False):
    if probability_flow:
      raise UserError(
        'The predictor ancestral_sampling has no probability flow: set '
        'sampling.probability_flow=False, or choose reverse_diffusion or euler_maruyama.'
      )
    super().__init__(sde, score_fn, probability_flow)

  def update_fn(self, rng: RandomKey, x: Batch, t: PerExample) -> tuple[Batch, Batch]:
    """A sample of N(mean, std^2 I) of `SDE.ancestral_step`, and the mean; see the base class."""
    x_mean, std = self.sde.ancestral_step(self.score_fn, x, t)
    z = jax.random.normal(rng, x.shape)
    return x_mean + batch_mul(std, z), x_mean


@register_predictor(name='none')
class NonePredictor(Predictor):
  """Leaves x unchanged, for sampling with a corrector alone."""

  nfe = 0

  def update_fn(self, rng: RandomKey, x: Batch, t: PerExample) -> tuple[Batch, Batch]:
    """`x`, twice."""
    return x, x


class _LangevinSteps(Corrector):
  """Repeats x <- x + eps score + sqrt(2 eps) z; subclasses choose eps."""

  @abc.abstractmethod
  def step_size(self, x: Batch, t: PerExample, score: Batch, z: Batch) -> PerExample:
    """eps, (B,), for the score at `x` and `t` and the noise `z`."""

  def update_fn(self, rng: RandomKey, x: Batch, t: PerExample) -> tuple[Batch, Batch]:
    """x after `n_steps` steps at time `t`, and before the noise of the last one is added."""

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

  The norms are means over the whole batch on all devices. A sample therefore depends slightly on
  the batch that it is drawn in.
  """

  def step_size(self, x: Batch, t: PerExample, score: Batch, z: Batch) -> PerExample:
    """2 alpha (snr ||z|| / ||score||)^2, (B,)."""
    ratio = self.snr * _mean_norm(z) / _mean_norm(score)
    return 2 * self.sde.langevin_alpha(t) * ratio**2


@register_corrector(name='ald')
class AnnealedLangevinDynamics(_LangevinSteps):
  """Annealed Langevin dynamics, eps = 2 alpha (snr sigma_t)^2.

  It is the sampler of NCSN: Song and Ermon, "Generative modeling by estimating gradients of the
  data distribution", NeurIPS 2019, https://arxiv.org/abs/1907.05600, Algorithm 1.
  """

  def step_size(self, x: Batch, t: PerExample, score: Batch, z: Batch) -> PerExample:
    """2 alpha (snr sigma_t)^2, (B,)."""
    sigma = self.sde.alpha_sigma(t)[1]
    return 2 * self.sde.langevin_alpha(t) * (self.snr * sigma) ** 2


@register_corrector(name='none')
class NoneCorrector(Corrector):
  """Leaves x unchanged, for sampling with a predictor alone."""

  nfe = 0

  def update_fn(self, rng: RandomKey, x: Batch, t: PerExample) -> tuple[Batch, Batch]:
    """`x`, twice."""
    return x, x


def _mean_norm(x: Batch) -> Scalar:
  return jnp.mean(jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=-1))


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(Sampler):
  """The predictor-corrector sampler (Algorithm 1) over `sde.N` equidistant times from T to `eps`.

  Each step first corrects x_t at its time and then predicts the next one. This is the order of the
  2021 code, whose samples it reproduces; Algorithm 1 as printed has the opposite order. The NFE
  counts evaluations that take place: the 2021 code reports N (n_corrector_steps + 1) in all cases,
  while here a predictor or corrector 'none' adds nothing.

  Attributes:
    sde: the forward SDE; `sde.N` is the number of updates, of which the last is the denoising.
    predictor: a `Predictor` class.
    corrector: a `Corrector` class.
    snr: the signal-to-noise ratio of the corrector.
    n_corrector_steps: the number of corrector steps before each predictor step.
    probability_flow: whether the predictor solves the probability flow ODE (Eq. 13).
    denoise: whether to return the last update without its noise.
    eps: the last time.
  """

  sde: SDE
  predictor: type[Predictor]
  corrector: type[Corrector] = NoneCorrector
  _: dataclasses.KW_ONLY
  snr: float = 0.16
  n_corrector_steps: int = 1
  probability_flow: bool = False
  denoise: bool = True
  eps: float = 1e-3

  @property
  def n_steps(self) -> int:
    """The number of steps, one for each of the N times."""
    return self.sde.N

  @property
  def nfe_per_step(self) -> int:
    """The NFE of the corrector's steps and the predictor's."""
    corrections = self.n_corrector_steps * self.corrector.nfe
    return corrections + self.predictor.nfe

  def init(
    self,
    score_fn: ScoreFn,
    condition: Condition,
    rng: RandomKey,
    shape: tuple[int, ...],
    z: Batch | None,
  ) -> Carry:
    """x_T, twice, and a key; the arguments are those of `Sampler.init`."""
    rng, prior_rng = jax.random.split(rng)
    x = self.sde.prior_sampling(prior_rng, shape) if z is None else z
    x = condition.start(parallelism.shard_batch(x))
    return x, x, rng

  def step(self, score_fn: ScoreFn, condition: Condition, i: Count, carry: Carry) -> Carry:
    """x after correction and prediction, the same before the last noise is added, and a key."""
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

  def result(self, score_fn: ScoreFn, condition: Condition, carry: Carry) -> Batch:
    """The sample, (B, ...): with `denoise`, before the noise of the last update is added."""
    x, x_mean, _ = carry
    return x_mean if self.denoise else x


def get_pc_sampler(
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  predictor: type[Predictor] | None,
  corrector: type[Corrector] | None,
  inverse_scaler: Scaler,
  snr: float,
  n_steps: int = 1,
  probability_flow: bool = False,
  continuous: bool = False,
  denoise: bool = True,
  eps: float = 1e-3,
) -> SamplingFn:
  """The predictor-corrector sampler as a function `(rng, state) -> (samples, NFE)`.

  Args:
    sde: the forward SDE; `sde.N` is the number of steps.
    model: the network.
    shape: (B, H, W, C) over all devices.
    predictor: a `Predictor` class; None for `NonePredictor`.
    corrector: a `Corrector` class; None for `NoneCorrector`.
    inverse_scaler: from the network's range to [0, 1].
    snr: the signal-to-noise ratio of the corrector.
    n_steps: the number of corrector steps before each predictor step.
    probability_flow: whether the predictor solves the probability flow ODE (Eq. 13).
    continuous: whether the network was trained on continuous time.
    denoise: whether to return the last update without its noise.
    eps: the last time.

  Raises:
    UserError: if `eps` is out of range.
  """
  check_last_time(eps, sde.T)
  sampler = PredictorCorrector(
    sde,
    predictor or NonePredictor,
    corrector or NoneCorrector,
    snr=snr,
    n_corrector_steps=n_steps,
    probability_flow=probability_flow,
    denoise=denoise,
    eps=eps,
  )
  return compile_sampler(
    sampler, sde, model, shape=shape, inverse_scaler=inverse_scaler, continuous=continuous
  )


@register_sampler(name='pc')
def _pc_sampler(config: ConfigDict, sde: SDE, eps: float) -> Sampler:
  settings = config.sampling
  if settings.n_steps_each < 0:
    raise UserError(
      f'sampling.n_steps_each={settings.n_steps_each} must not be negative: set it to 0 or more.'
    )
  predictor, corrector = get_predictor(settings.predictor), get_corrector(settings.corrector)
  if not predictor.nfe + settings.n_steps_each * corrector.nfe:
    raise UserError(
      f'sampling.predictor={settings.predictor!r} and sampling.corrector={settings.corrector!r} '
      f'with sampling.n_steps_each={settings.n_steps_each} never evaluate the network, so that '
      f'samples would be those of the prior: choose another predictor or corrector.'
    )
  return PredictorCorrector(
    _with_steps(config, sde),
    predictor,
    corrector,
    snr=settings.snr,
    n_corrector_steps=settings.n_steps_each,
    probability_flow=settings.probability_flow,
    denoise=settings.noise_removal,
    eps=eps,
  )


def _with_steps(config: ConfigDict, sde: SDE) -> SDE:
  """The SDE with `sampling.n_steps` steps, unless that is 0."""
  n_steps = config.sampling.n_steps
  if n_steps < 0:
    raise UserError(f'sampling.n_steps={n_steps} must be at least 1, or 0 for model.num_scales.')
  if n_steps and not config.training.continuous:
    raise UserError(
      f'sampling.n_steps={n_steps} needs a network that was trained on continuous time, but this '
      f'one knows only the {sde.N} steps of model.num_scales: set sampling.n_steps=0.'
    )
  return dataclasses.replace(sde, N=n_steps) if n_steps else sde
