"""What every sampler is made of: predictors, correctors and conditions, and what runs samplers.

A `Predictor` or `Corrector` is one kind of update. A `Sampler` is a whole way of sampling, cut into
steps. A `Condition` conditions it. `compile_sampler` makes a sampler a function that draws batches
under any condition.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax

from models import utils as mutils
from runtime import parallelism
from runtime.errors import UserError
from runtime.registry import Registry
from runtime.rng import key_shape
from sde_lib import SDE, ScoreFn
from train_state import State

_PREDICTORS = Registry('predictor')
_CORRECTORS = Registry('corrector')
SAMPLERS = Registry('sampling method')
register_predictor = _PREDICTORS.register
register_corrector = _CORRECTORS.register
register_sampler = SAMPLERS.register
get_predictor = _PREDICTORS.get
get_corrector = _CORRECTORS.get

PyTree = Any
UpdateFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Callback = Callable[[int, int, Callable[[], jax.Array]], None]


class Predictor(abc.ABC):
  """One step of a numerical solver of the reverse SDE.

  Attributes:
    nfe: how often `update_fn` calls `score_fn`; a subclass that does so more or less
      often than once says so.

  Args:
    sde: the forward SDE.
    score_fn: (x, t) -> score.
    probability_flow: solve the probability flow ODE (Eq. 13) instead.
  """

  nfe: ClassVar[int] = 1

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

  Attributes:
    nfe: how often each of the steps calls `score_fn`.

  Args:
    sde: the forward SDE.
    score_fn: (x, t) -> score.
    snr: signal-to-noise ratio that sets the step size.
    n_steps: number of steps.
  """

  nfe: ClassVar[int] = 1

  def __init__(self, sde: SDE, score_fn: ScoreFn, snr: float, n_steps: int):
    self.sde = sde
    self.score_fn = score_fn
    self.snr = snr
    self.n_steps = n_steps

  @abc.abstractmethod
  def update_fn(self, rng: jax.Array, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`n_steps` steps at the fixed time `t`; arguments and returns as `Predictor.update_fn`."""


class Condition(flax.struct.PyTreeNode):
  """What samples shall fulfil. This one asks for nothing; see `controllable_generation`.

  Its arrays have the batch as leading axis. A method uses `start`, `score` and `update` if it
  proceeds by updates as predictors and correctors are, and `flow_score` if it follows the
  probability flow.

  Fields that are not arrays are compiled into the sampler, which is compiled anew when they differ:
  give the same function for every batch, or an object that compares by value, not a new lambda.
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
    """The sample with what is known of it exactly, whatever the method."""
    return x


class Sampler(abc.ABC):
  """A way of sampling, cut into steps so that a long run can be watched and stopped.

  What it carries from step to step is a tuple whose first element is x_t.

  Attributes:
    n_steps: number of calls of `step`.
    nfe_per_step: network calls in each.
  """

  n_steps: int
  nfe_per_step: int = 1

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
    """The sample, in the network's range; `condition.finish` is applied to it afterwards."""

  def nfe(self, carry: tuple[Any, ...]) -> int:
    """Network calls of a whole run."""
    del carry
    return self.n_steps * self.nfe_per_step


def run(
  method: Sampler,
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
  carry = jax.lax.fori_loop(0, method.n_steps, step, carry)
  return condition.finish(method.result(score_fn, condition, carry))


@runtime_checkable
class SamplingFn(Protocol):
  """What `compile_sampler` returns."""

  def __call__(
    self,
    rng: jax.Array,
    state: State,
    z: jax.Array | None = None,
    condition: Condition | None = None,
    callback: Callback | None = None,
  ) -> tuple[jax.Array, int]:
    """Draws a batch with the EMA parameters.

    Args:
      rng: one key from which the whole batch is drawn; or an array of B keys, one for each image,
        for images that do not depend on the batch that they are drawn in (Langevin norms and step
        sizes of an ODE solver are then those of the single image). `jax.random.key` and
        `jax.random.PRNGKey` give the same images.
      state: of training.
      z: x_T, (B, H, W, C); drawn from the prior by default.
      condition: what the samples shall fulfil.
      callback: called now and then as `callback(steps done, all steps, function that returns x_t)`;
        the function may be kept and called at any time.

    Returns:
      Images (B, H, W, C) behind the inverse scaler, and the number of network calls.

    Raises:
      UserError: if `rng` holds no keys.
    """


def compile_sampler(
  method: Sampler,
  sde: SDE,
  model: nn.Module,
  shape: tuple[int, ...],
  inverse_scaler: Callable[[jax.Array], jax.Array],
  continuous: bool = True,
  frame_every: int = 0,
  steps_per_call: int | None = None,
) -> SamplingFn:
  """A function that draws batches by `method`.

  Args:
    method: the way of sampling.
    sde: the forward SDE.
    model: the network.
    shape: (B, H, W, C) over all devices.
    inverse_scaler: from the network's range to [0, 1].
    continuous: whether the network was trained on continuous time.
    frame_every: steps between the calls of `callback`; 0 leaves that to `steps_per_call`.
    steps_per_call: steps in one compiled call. By default 1 on CPU, where a call costs nothing and
      XLA slows convolutions in loops down; elsewhere `frame_every` or a twentieth of all steps.
  """
  if steps_per_call is None:
    on_cpu = jax.default_backend() == 'cpu'
    steps_per_call = 1 if on_cpu else frame_every or max(1, method.n_steps // 20)

  def score_fn_of(params, model_state):
    return mutils.get_score_fn(sde, model, params, model_state, False, continuous)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def init(per_image, shape, network, condition, rng, z):
    score_fn = score_fn_of(*network)
    if not per_image:
      return method.init(score_fn, condition, rng, shape, z)
    one = functools.partial(method.init, score_fn)
    start = lambda condition, rng, z: one(condition, rng, (1, *shape[1:]), z)
    carry = jax.vmap(start)(_single(condition), rng, _single(z))
    return jax.tree.map(parallelism.shard_batch, carry)

  # Without donation of the carry: `callback` may keep x_t.
  @functools.partial(jax.jit, static_argnums=(0,))
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
    def result(condition, carry):
      return condition.finish(method.result(score_fn_of(*network), condition, carry))

    if per_image:
      return inverse_scaler(jax.vmap(result)(_single(condition), carry)[:, 0])
    return inverse_scaler(result(condition, carry))

  def sampler(rng, state, z=None, condition=None, callback=None):
    condition = condition or Condition()
    keys = key_shape(rng)
    if len(keys) > 1:
      raise UserError(f'rng holds keys of shape {keys}: pass one key, or one for each image, (B,).')
    network, per_image = (state.params_ema, state.model_state), bool(keys)
    carry = init(per_image, (*(keys or shape[:1]), *shape[1:]), network, condition, rng, z)
    for begin in range(0, method.n_steps, steps_per_call):
      end = min(begin + steps_per_call, method.n_steps)
      carry = advance(per_image, network, condition, begin, end, carry)
      # On CPU, several calls in flight may deadlock, each with a share of XLA's threads.
      jax.block_until_ready(carry)
      if callback is not None:
        x = carry[0][:, 0] if per_image else carry[0]
        callback(end, method.n_steps, functools.partial(inverse_scaler, x))
    return finish(per_image, network, condition, carry), method.nfe(carry)

  return sampler


def _single(batch: PyTree) -> PyTree:
  """Every example as a batch of one, (B, 1, ...)."""
  return jax.tree.map(lambda x: x[:, None], batch)
