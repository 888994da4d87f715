"""Samplers: predictors and correctors (Algorithm 1), the probability flow ODE, and what runs them.

A predictor or corrector is a class with `update_fn(rng, x, t) -> (x, x_mean)`, where `x_mean` is
`x` before the noise of the step is added. Register one and its name works in every configuration:

  @register_predictor(name='my_predictor')
  class MyPredictor(Predictor):
    def update_fn(self, rng, x, t): ...

A `Method` is a whole way of sampling, cut into steps; a `Condition` is what the samples shall
fulfil. `get_sampler` makes a function of a method that runs it with any condition.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

import ode
import parallelism
from errors import UserError
from losses import State
from models import utils as mutils
from registry import Registry
from sde_lib import SDE, ScoreFn, batch_mul

_PREDICTORS = Registry('predictor')
_CORRECTORS = Registry('corrector')
_METHODS = Registry('sampling method')
register_predictor = _PREDICTORS.register
register_corrector = _CORRECTORS.register
register_method = _METHODS.register
get_predictor = _PREDICTORS.get
get_corrector = _CORRECTORS.get

PyTree = Any
UpdateFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Watch = Callable[[int, int, Callable[[], jax.Array]], None]


class Predictor(abc.ABC):
  """One step of a numerical solver of the reverse SDE.

  Args:
    sde: the forward SDE.
    score_fn: (x, t) -> score.
    probability_flow: solve the probability flow ODE (Eq. 13) instead.
  """

  def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False):
    self.sde = sde
    self.rsde = sde.reverse(score_fn, probability_flow)
    self.score_fn = score_fn
    self.probability_flow = probability_flow

  @abc.abstractmethod
  def update_fn(self, rng: jax.Array, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From x_t to the next, earlier time.

    Args:
      rng: key of this step.
      x: (B, ...).
      t: (B,).

    Returns:
      The new state, and the same without its noise.
    """


class Corrector(abc.ABC):
  """Steps of a Markov chain that leaves p_t invariant.

  Args:
    sde: the forward SDE.
    score_fn: (x, t) -> score.
    snr: signal-to-noise ratio that sets the step size.
    n_steps: number of steps.
  """

  def __init__(self, sde: SDE, score_fn: ScoreFn, snr: float, n_steps: int):
    self.sde = sde
    self.score_fn = score_fn
    self.snr = snr
    self.n_steps = n_steps

  @abc.abstractmethod
  def update_fn(self, rng: jax.Array, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`n_steps` steps at the fixed time `t`; arguments and returns as `Predictor.update_fn`."""


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
    std = self.sde.marginal_prob(jnp.zeros_like(x), t)[1]
    return 2 * self.sde.langevin_alpha(t) * (self.snr * std) ** 2


@register_corrector(name='none')
class NoneCorrector(Corrector):
  """Leaves x as it is, for sampling with a predictor alone."""

  def update_fn(self, rng, x, t):
    return x, x


def _mean_norm(x: jax.Array) -> jax.Array:
  return jnp.mean(jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=-1))


class Condition(flax.struct.PyTreeNode):
  """What samples shall fulfil. This one asks for nothing; see `controllable_generation`.

  Its arrays have the batch as leading axis. A method uses `start`, `score` and `update` if it
  proceeds by updates as predictors and correctors are, and `flow_score` if it follows the
  probability flow.
  """

  def start(self, x: jax.Array) -> jax.Array:
    """The x_T to start from, given a sample of the prior."""
    return x

  def score(self, score_fn: ScoreFn) -> ScoreFn:
    """The score of p(x_t | condition), given that of p(x_t)."""
    return score_fn

  def update(self, update_fn: UpdateFn) -> UpdateFn:
    """An update of x_t that keeps the condition, given one that does not."""
    return update_fn

  def flow_score(self, score_fn: ScoreFn) -> ScoreFn:
    """As `score`, for methods without updates."""
    return self.score(score_fn)

  def finish(self, x: jax.Array) -> jax.Array:
    """The denoised image with what is known of it exactly."""
    return x


class Method(abc.ABC):
  """A way of sampling, cut into steps so that a long run can be watched and stopped.

  What it carries from step to step is a tuple whose first element is x_t.

  Attributes:
    n_steps: number of steps.
    calls_per_step: network calls in each.
  """

  n_steps: int
  calls_per_step: int = 1

  @abc.abstractmethod
  def init(
    self,
    score_fn: ScoreFn,
    condition: Condition,
    rng: jax.Array,
    shape: tuple[int, ...],
    z: jax.Array | None,
  ) -> tuple[Any, ...]:
    """What the first step gets: x_T = `z`, or a sample of the prior of `shape`."""

  @abc.abstractmethod
  def step(
    self, score_fn: ScoreFn, condition: Condition, i: jax.Array, carry: tuple[Any, ...]
  ) -> tuple[Any, ...]:
    """Step number `i`, from 0."""

  @abc.abstractmethod
  def result(self, score_fn: ScoreFn, condition: Condition, carry: tuple[Any, ...]) -> jax.Array:
    """The sample, in the network's range."""

  def nfe(self, carry: tuple[Any, ...]) -> int:
    """Network calls of a whole run."""
    del carry
    return self.n_steps * self.calls_per_step


def run(
  method: Method,
  score_fn: ScoreFn,
  rng: jax.Array,
  shape: tuple[int, ...],
  z: jax.Array | None = None,
  condition: Condition | None = None,
) -> jax.Array:
  """All steps of a method in one loop, for use inside `jax.jit`; in the network's range."""
  condition = condition or Condition()
  carry = method.init(score_fn, condition, rng, shape, z)
  step = functools.partial(method.step, score_fn, condition)
  return method.result(score_fn, condition, jax.lax.fori_loop(0, method.n_steps, step, carry))


class Sampler(Protocol):
  """What `get_sampler` returns."""

  def __call__(
    self,
    rng: jax.Array,
    state: State,
    z: jax.Array | None = None,
    condition: Condition | None = None,
    watch: Watch | None = None,
  ) -> tuple[jax.Array, int]:
    """Draws a batch with the EMA parameters.

    Args:
      rng: one key, (2,), from which the whole batch is drawn; or a key per image, (B, 2), for
        images that do not depend on the batch that they are drawn in (Langevin norms and step
        sizes of an ODE solver are then those of the single image).
      state: of training.
      z: x_T, (B, H, W, C); drawn from the prior by default.
      condition: what the samples shall fulfil.
      watch: called as `watch(steps done, all steps, function that returns x_t)` now and then.

    Returns:
      Images (B, H, W, C) behind the inverse scaler, and the number of network calls.
    """


def get_sampler(
  method: Method,
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  inverse_scaler: Callable[[jax.Array], jax.Array],
  continuous: bool = True,
  frame_every: int = 0,
  steps_per_call: int | None = None,
) -> Sampler:
  """A function that draws batches by `method`.

  Args:
    method: the way of sampling.
    sde: the forward SDE.
    model: the network.
    shape: (B, H, W, C) over all devices.
    inverse_scaler: from the network's range to [0, 1].
    continuous: whether the network was trained on continuous time.
    frame_every: steps between the calls of `watch`; 0 leaves that to `steps_per_call`.
    steps_per_call: steps in one compiled call. By default 1 on CPU, where a call costs nothing and
      XLA slows convolutions in loops down; elsewhere `frame_every` or a twentieth of all steps.
  """
  if steps_per_call is None:
    on_cpu = jax.default_backend() == 'cpu'
    steps_per_call = 1 if on_cpu else frame_every or max(1, method.n_steps // 20)

  def score_fn_of(params, model_state):
    return mutils.get_score_fn(sde, model, params, model_state, False, continuous)

  @functools.partial(jax.jit, static_argnums=(0,))
  def init(shape, network, condition, rng, z):
    score_fn = score_fn_of(*network)
    if rng.ndim == 1:
      return method.init(score_fn, condition, rng, shape, z)
    one = functools.partial(method.init, score_fn)
    start = lambda condition, rng, z: one(condition, rng, (1, *shape[1:]), z)
    carry = jax.vmap(start)(_single(condition), rng, _single(z))
    return jax.tree.map(parallelism.shard_batch, carry)

  @functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(5,))
  def advance(per_image, network, condition, begin, end, carry):
    step = functools.partial(method.step, score_fn_of(*network))
    if per_image:
      step = jax.vmap(step, in_axes=(0, None, 0))
      condition = _single(condition)
    if steps_per_call == 1:
      return step(condition, begin, carry)
    return jax.lax.fori_loop(begin, end, functools.partial(step, condition), carry)

  @functools.partial(jax.jit, static_argnums=(0,))
  def finish(per_image, network, condition, carry):
    result = functools.partial(method.result, score_fn_of(*network))
    if per_image:
      return inverse_scaler(jax.vmap(result)(_single(condition), carry)[:, 0])
    return inverse_scaler(result(condition, carry))

  def sampler(rng, state, z=None, condition=None, watch=None):
    condition = condition or Condition()
    network, per_image = (state.params_ema, state.model_state), rng.ndim == 2
    size = (rng.shape[0],) if per_image else shape[:1]
    carry = init((*size, *shape[1:]), network, condition, rng, z)
    for begin in range(0, method.n_steps, steps_per_call):
      end = min(begin + steps_per_call, method.n_steps)
      carry = advance(per_image, network, condition, begin, end, carry)
      # On CPU, several calls in flight may deadlock, each with a share of XLA's threads.
      jax.block_until_ready(carry)
      if watch is not None:
        x = carry[0][:, 0] if per_image else carry[0]
        watch(end, method.n_steps, functools.partial(inverse_scaler, x))
    return finish(per_image, network, condition, carry), method.nfe(carry)

  return sampler


def _single(batch: PyTree) -> PyTree:
  """Every example as a batch of one, (B, 1, ...)."""
  return jax.tree.map(lambda x: x[:, None], batch)


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(Method):
  """Algorithm 1 over `sde.N` times from T to `eps`.

  Each step corrects at its time and then predicts the next: the order of the reference
  implementation, whose outputs these are. Algorithm 1 as printed has the two the other way about.
  A step counts n_corrector_steps + 1 network calls, as the reference does, also where the predictor
  or the corrector is 'none'.

  Attributes:
    sde: the forward SDE.
    predictor: a `Predictor` class.
    corrector: a `Corrector` class.
    snr: signal-to-noise ratio of the corrector.
    n_corrector_steps: corrector steps before each predictor step.
    probability_flow: solve the probability flow ODE with the predictor.
    denoise: return the last step without its noise.
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
  def calls_per_step(self) -> int:
    return self.n_corrector_steps + 1

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
    return condition.finish(x_mean) if self.denoise else x


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
) -> Sampler:
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
  return get_sampler(method, sde, model, shape, inverse_scaler, continuous)


@dataclasses.dataclass(frozen=True)
class ProbabilityFlow(Method):
  """The probability flow ODE (Eq. 13) from T to `eps`, by an adaptive solver.

  One step controller serves the whole batch. It is one `Method` step.

  Attributes:
    sde: the forward SDE.
    denoise: take one step of the reverse diffusion sampler, without its noise, at the end.
    rtol: relative tolerance of the solver.
    atol: absolute tolerance.
    solver: a name, see `ode.solve`.
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
    return ode.solve(drift, carry[0], self.sde.T, self.eps, self.rtol, self.atol, self.solver)

  def result(self, score_fn, condition, carry):
    x, _ = carry
    if self.denoise:
      predictor = ReverseDiffusionPredictor(self.sde, condition.flow_score(score_fn))
      t = jnp.full((x.shape[0],), self.eps)
      x = predictor.update_fn(jax.random.PRNGKey(0), x, t)[1]
    return condition.finish(x)

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
) -> Sampler:
  """A sampler `(rng, state, z=None) -> (samples, number of network calls)` by the flow of Eq. 13.

  Args:
    sde: the forward SDE.
    model: the network.
    shape: (B, H, W, C) over all devices.
    inverse_scaler: from the network's range to [0, 1].
    denoise: add one denoising step.
    rtol: relative tolerance of the solver.
    atol: absolute tolerance.
    method: of `ode.solve`.
    eps: the last time.
    continuous: whether the network was trained on continuous time.
  """
  flow = ProbabilityFlow(sde, denoise, rtol, atol, ode.check_method(method), eps)
  return get_sampler(flow, sde, model, shape, inverse_scaler, continuous)


@register_method(name='pc')
def _pc_method(config: Any, sde: SDE, eps: float) -> Method:
  settings = config.sampling
  return PredictorCorrector(
    _with_steps(config, sde),
    get_predictor(settings.predictor.lower()),
    get_corrector(settings.corrector.lower()),
    settings.snr,
    settings.n_steps_each,
    settings.probability_flow,
    settings.noise_removal,
    eps,
  )


@register_method(name='ode')
def _ode_method(config: Any, sde: SDE, eps: float) -> Method:
  settings = config.sampling
  solver = ode.check_method(settings.ode_solver)
  return ProbabilityFlow(sde, settings.noise_removal, settings.rtol, settings.atol, solver, eps)


def _with_steps(config: Any, sde: SDE) -> SDE:
  """The SDE in `sampling.n_steps` steps, where that is set."""
  n_steps = config.sampling.n_steps
  if n_steps and not config.training.continuous:
    raise UserError(
      f'sampling.n_steps={n_steps} needs a network that was trained on continuous time: this one '
      f'knows the {sde.N} steps of model.num_scales only; set sampling.n_steps=0.'
    )
  return dataclasses.replace(sde, N=n_steps) if n_steps else sde


def get_method(config: Any, sde: SDE, eps: float | None = None) -> Method:
  """The way of sampling that `config.sampling` describes; `eps` is as in `get_sampling_fn`."""
  make = _METHODS.get(config.sampling.method.lower())
  return make(config, sde, sde.sampling_eps if eps is None else eps)


def check(config: Any, sde: SDE, condition: Condition | None = None) -> None:
  """Raises `UserError` for names that do not exist or settings that do not go together.

  Nothing is computed: one step is traced with a score that is none.
  """
  data = config.data
  shape = (2, data.image_size, data.image_size, data.num_channels)
  method, score_fn = get_method(config, sde), lambda x, t: -x
  sample = functools.partial(run, method, score_fn, shape=shape, condition=condition)
  jax.eval_shape(sample, jax.random.PRNGKey(0))


def batch_rng(config: Any, root: jax.Array, number: int, size: int) -> jax.Array:
  """What a sampler gets for batch `number`: a key, or with `per_image_seeds` one for each image."""
  if not config.sampling.per_image_seeds:
    return jax.random.fold_in(root, number)
  return jax.vmap(jax.random.fold_in, (None, 0))(root, number * size + jnp.arange(size))


def get_sampling_fn(
  config: Any,
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  inverse_scaler: Callable[[jax.Array], jax.Array],
  eps: float | None = None,
) -> Sampler:
  """The sampler that `config.sampling` describes, `(rng, state) -> (samples, network calls)`.

  Args:
    config: reads `sampling` and `training.continuous`.
    sde: the forward SDE.
    model: the network.
    shape: (B, H, W, C) over all devices.
    inverse_scaler: from the network's range to [0, 1].
    eps: the last time; None takes the SDE's own.

  Raises:
    UserError: for an unknown method, predictor or corrector, or one that the SDE cannot serve.
  """
  return get_sampler(
    get_method(config, sde, eps),
    sde,
    model,
    shape,
    inverse_scaler,
    config.training.continuous,
    frame_every=config.sampling.trajectory_every,
  )
