"""Base classes of predictors, correctors, samplers and conditions, and the functions that run them.

A `Predictor` or a `Corrector` is one kind of update of x_t. A `Sampler` draws samples in a sequence
of steps. A `Condition` conditions them. `compile_sampler` turns a `Sampler` into a function that
draws batches under any condition.

x_t is (B, ...), for images (B, H, W, C), in the network's range. The time t is (B,) and runs from T
down to an `eps` > 0. NFE is the number of function evaluations, that is, of calls of the network.
Equation and algorithm numbers are those of Song et al., "Score-based generative modeling through
stochastic differential equations", ICLR 2021, https://arxiv.org/abs/2011.13456.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from absl import logging

from models import utils as mutils
from runtime import parallelism
from runtime.array_types import Array, Batch, Count, Images, PerExample, RandomKey, Scaler
from runtime.errors import UserError
from runtime.registry import Registry
from runtime.rng import key_shape
from sde_lib import SDE, ScoreFn
from train_state import State

_PREDICTORS = Registry('predictor')
_CORRECTORS = Registry('corrector')
SAMPLERS = Registry('sampler')
register_predictor = _PREDICTORS.register
register_corrector = _CORRECTORS.register
register_sampler = SAMPLERS.register
get_predictor = _PREDICTORS.get
get_corrector = _CORRECTORS.get

PyTree = Any
Carry = tuple[PyTree, ...]
UpdateFn = Callable[[RandomKey, Batch, PerExample], tuple[Batch, Batch]]
Callback = Callable[[int, int, Callable[[], Array]], None]


class Predictor(abc.ABC):
  """One step of a numerical solver of the reverse SDE.

  Attributes:
    nfe: the number of calls of `score_fn` in `update_fn`; a subclass sets it if it is not 1.

  Args:
    sde: the forward SDE.
    score_fn: (x, t) -> score, shaped as `x`.
    probability_flow: whether to solve the probability flow ODE (Eq. 13) instead.
  """

  nfe: ClassVar[int] = 1

  def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False):
    self.sde = sde
    self.rsde = sde.reverse(score_fn, probability_flow)
    self.score_fn = score_fn
    self.probability_flow = probability_flow

  @abc.abstractmethod
  def update_fn(self, rng: RandomKey, x: Batch, t: PerExample) -> tuple[Batch, Batch]:
    """Moves x_t from the time t to the next, earlier time.

    Args:
      rng: the key of this step.
      x: x_t, (B, ...).
      t: the time in (0, T], (B,).

    Returns:
      The updated x, and the same before the noise of the step is added; both shaped as `x`.
    """


class Corrector(abc.ABC):
  """Steps of a Markov chain whose stationary distribution is p_t.

  Attributes:
    nfe: the number of calls of `score_fn` in each step; a subclass sets it if it is not 1.

  Args:
    sde: the forward SDE.
    score_fn: (x, t) -> score, shaped as `x`.
    snr: the signal-to-noise ratio, which sets the step size.
    n_steps: the number of steps in `update_fn`.
  """

  nfe: ClassVar[int] = 1

  def __init__(self, sde: SDE, score_fn: ScoreFn, snr: float, n_steps: int):
    self.sde = sde
    self.score_fn = score_fn
    self.snr = snr
    self.n_steps = n_steps

  @abc.abstractmethod
  def update_fn(self, rng: RandomKey, x: Batch, t: PerExample) -> tuple[Batch, Batch]:
    """`n_steps` steps at the fixed time `t`; arguments and returns as `Predictor.update_fn`."""


class Condition(flax.struct.PyTreeNode):
  """The conditioning of samples. This base class leaves them unconditional.

  The leading axis of its arrays is that of the batch. A sampler that updates x_t by predictors and
  correctors uses `start`, `score` and `update`; one that follows the probability flow uses
  `flow_score`; all use `finish`. `samplers/conditions.py` has the conditions of the paper.

  Fields that are not arrays are compiled into the sampler, and other values compile it again: pass
  the same function for every batch, or an object that compares by value, not a new lambda.
  """

  def start(self, x: Batch) -> Batch:
    """The conditional x_T, (B, ...), from `x`, a sample of the prior of that shape."""
    return x

  def score(self, score_fn: ScoreFn) -> ScoreFn:
    """The score of p(x_t | condition), from `score_fn`, that of p(x_t)."""
    return score_fn

  def update(self, update_fn: UpdateFn) -> UpdateFn:
    """An update of x_t that keeps the condition, from `update_fn`, which does not know of it."""
    return update_fn

  def flow_score(self, score_fn: ScoreFn) -> ScoreFn:
    """The score for samplers without updates; by default that of `score`."""
    return self.score(score_fn)

  def finish(self, x: Batch) -> Batch:
    """The sample `x`, (B, ...), with everything that is known exactly put in its place."""
    return x


def check_last_time(eps: float, end: float) -> None:
  """Checks the time at which sampling from the time `end` stops.

  Raises:
    UserError: if it is not in [0, end).
  """
  if not 0 <= eps < end:
    raise UserError(
      f'eps={eps} must be a time in [0, {end}), at which sampling stops: set it to 1e-3.'
    )


def check_floats(x: Any, what: str) -> None:
  """Checks that an array can be in the range of the network; `what` begins the sentence if not.

  Raises:
    UserError: if it is of whole numbers, such as grey levels.
  """
  if not jnp.issubdtype(dtype := jnp.result_type(x), jnp.floating):
    raise UserError(
      f'{what} of type {dtype}: pass floats in the range of the network, such as '
      f'scaler(images / 255).'
    )


class Sampler(abc.ABC):
  """A sampling algorithm in steps, between which a long run can show x_t and can be stopped.

  The steps pass a tuple on to each other, the carry, whose first element is x_t, (B, ...).

  Attributes:
    n_steps: the number of calls of `step`.
    nfe_per_step: the NFE of each of them.
  """

  n_steps: int
  nfe_per_step: int = 1

  @abc.abstractmethod
  def init(
    self,
    score_fn: ScoreFn,
    condition: Condition,
    rng: RandomKey,
    shape: tuple[int, ...],
    z: Batch | None,
  ) -> Carry:
    """The carry of the first step.

    Args:
      score_fn: (x, t) -> score, shaped as `x`.
      condition: the conditioning.
      rng: the key of the whole batch.
      shape: the shape of x_T, (B, ...).
      z: x_T of that shape, before conditioning; None draws it from the prior.
    """

  @abc.abstractmethod
  def step(self, score_fn: ScoreFn, condition: Condition, i: Count, carry: Carry) -> Carry:
    """The carry after the step number `i`, counted from 0."""

  @abc.abstractmethod
  def result(self, score_fn: ScoreFn, condition: Condition, carry: Carry) -> Batch:
    """The sample, (B, ...), in the network's range; `condition.finish` is applied afterwards."""

  def nfe(self, carry: Carry) -> int:
    """The NFE of a whole run that ended with `carry`."""
    del carry
    return self.n_steps * self.nfe_per_step


def run(
  sampler: Sampler,
  score_fn: ScoreFn,
  rng: RandomKey,
  *,
  shape: tuple[int, ...],
  z: Batch | None = None,
  condition: Condition | None = None,
) -> Batch:
  """Runs all steps of a sampler in one loop, for use inside `jax.jit`.

  Args:
    sampler: the sampler.
    score_fn: (x, t) -> score, shaped as `x`.
    rng: one key for the whole batch.
    shape: the shape of the samples, (B, ...).
    z: x_T of that shape; drawn from the prior by default.
    condition: the conditioning; none by default.

  Returns:
    Samples of `shape`, in the network's range.
  """
  condition = condition or Condition()
  carry = sampler.init(score_fn, condition, rng, shape, z)
  step = functools.partial(sampler.step, score_fn, condition)
  carry = jax.lax.fori_loop(0, sampler.n_steps, step, carry)
  return condition.finish(sampler.result(score_fn, condition, carry))


@runtime_checkable
class SamplingFn(Protocol):
  """A compiled sampler, as `compile_sampler` returns it."""

  def __call__(
    self,
    rng: RandomKey,
    state: State,
    z: Images | None = None,
    *,
    condition: Condition | None = None,
    callback: Callback | None = None,
  ) -> tuple[Images, int]:
    """Draws a batch with the EMA parameters.

    Args:
      rng: one key from which the whole batch is drawn; or an array of B keys, one for each image,
        for images that do not depend on the batch that they are drawn in (Langevin norms and step
        sizes of an ODE solver are then those of the single image). `jax.random.key` and
        `jax.random.PRNGKey` give the same images.
      state: the training state, of which the EMA parameters are used.
      z: x_T, (B, H, W, C); drawn from the prior by default.
      condition: the conditioning; none by default.
      callback: called after every compiled call, as `callback(steps done, all steps, get_x)`, where
        `get_x()` returns x_t behind the inverse scaler, now or at any later time.

    Returns:
      Images (B, H, W, C) behind the inverse scaler, and the NFE.

    Raises:
      UserError: if `rng` is neither a key nor a one-dimensional array of keys.
    """


def compile_sampler(
  sampler: Sampler,
  sde: SDE,
  model: nn.Module,
  *,
  shape: tuple[int, ...],
  inverse_scaler: Scaler,
  continuous: bool = True,
  frame_every: int = 0,
  steps_per_call: int | None = None,
) -> SamplingFn:
  """A function that draws batches by `sampler`.

  Args:
    sampler: the sampler.
    sde: the forward SDE.
    model: the network.
    shape: (B, H, W, C) over all devices.
    inverse_scaler: from the network's range to [0, 1].
    continuous: whether the network was trained on continuous time.
    frame_every: the number of steps after which a frame is wanted; 0 if none are. It sets the
      default of `steps_per_call`.
    steps_per_call: the number of steps in one compiled call, after which `callback` is called. By
      default it is 1 on CPU; elsewhere it is `frame_every`, or else a twentieth of all steps.
  """
  if steps_per_call is None:
    # On CPU a call costs next to nothing, while XLA slows down convolutions in loops. On an
    # accelerator single steps would leave the device idle between calls; a twentieth of all steps
    # still lets a callback show progress.
    on_cpu = jax.default_backend() == 'cpu'
    steps_per_call = 1 if on_cpu else frame_every or max(1, sampler.n_steps // 20)

  def score_fn_of(params: PyTree, model_state: PyTree) -> ScoreFn:
    return mutils.get_score_fn(sde, model, params, model_state, False, continuous)

  # The parameters are arguments of the three compiled functions below, not constants of a closure:
  # one compilation serves every checkpoint, and XLA does not fold the weights into the program.
  # `per_image` is static, because the two cases are different programs.

  # The shape is static too. With a key per image the batch has as many images as there are keys,
  # whatever the configured shape says.
  @functools.partial(jax.jit, static_argnums=(0, 1))
  def init(per_image, shape, network, condition, rng, z):
    score_fn = score_fn_of(*network)
    if not per_image:
      return sampler.init(score_fn, condition, rng, shape, z)
    # Every image is a batch of one under `vmap`, so that nothing a sampler takes over its batch,
    # such as the mean norm of a Langevin step or the step size of an ODE solver, mixes images.
    start = lambda condition, rng, z: sampler.init(score_fn, condition, rng, (1, *shape[1:]), z)
    carry = jax.vmap(start)(_single(condition), rng, _single(z))
    # Under `vmap` a sampler cannot shard the batch itself: it sees a batch of one.
    return jax.tree.map(parallelism.shard_batch, carry)

  # The carry is not donated, because `callback` may keep x_t after the next call.
  @functools.partial(jax.jit, static_argnums=(0,))
  def advance(per_image, network, condition, begin, end, carry):
    step = functools.partial(sampler.step, score_fn_of(*network))
    if per_image:
      step = jax.vmap(step, in_axes=(0, None, 0))
      condition = _single(condition)
    if steps_per_call == 1:
      return step(condition, begin, carry)  # no loop, see above
    # `begin` and `end` are traced, so that the last call, which may have fewer steps, and all
    # others are one program.
    return jax.lax.fori_loop(begin, end, functools.partial(step, condition), carry)

  @functools.partial(jax.jit, static_argnums=(0,))
  def finish(per_image, network, condition, carry):
    def result(condition, carry):
      return condition.finish(sampler.result(score_fn_of(*network), condition, carry))

    if per_image:
      return inverse_scaler(jax.vmap(result)(_single(condition), carry)[:, 0])
    return inverse_scaler(result(condition, carry))

  @jax.jit
  def count_not_finite(images):
    return jnp.sum(~jnp.isfinite(images).all(axis=(1, 2, 3)))

  def sample(
    rng: Any,  # `key_shape` refuses anything but keys, with an error for users
    state: State,
    z: Images | None = None,
    *,
    condition: Condition | None = None,
    callback: Callback | None = None,
  ) -> tuple[Images, int]:
    condition = condition or Condition()
    keys = key_shape(rng)
    if len(keys) > 1:
      raise UserError(f'rng holds keys of shape {keys}: pass one key, or one for each image, (B,).')
    network, per_image = (state.params_ema, state.model_state), bool(keys)
    carry = init(per_image, (*(keys or shape[:1]), *shape[1:]), network, condition, rng, z)
    for begin in range(0, sampler.n_steps, steps_per_call):
      end = min(begin + steps_per_call, sampler.n_steps)
      carry = advance(per_image, network, condition, begin, end, carry)
      # On CPU, several calls in flight may deadlock, each with a share of XLA's threads.
      jax.block_until_ready(carry)
      if callback is not None:
        x = carry[0][:, 0] if per_image else carry[0]
        # A partial, not a closure over `x`, which the next round of the loop would rebind.
        callback(end, sampler.n_steps, functools.partial(inverse_scaler, x))
    images = finish(per_image, network, condition, carry)
    if bad := int(count_not_finite(images)):
      logging.warning(
        '%d of %d samples have values that are not finite: has the training diverged? Otherwise '
        'take more steps, or less of sampling.snr or of the guidance.',
        bad,
        len(images),
      )
    return images, sampler.nfe(carry)

  return sample


def _single(batch: PyTree) -> PyTree:
  """Every example of a tree of arrays as a batch of one, (B, 1, ...)."""
  return jax.tree.map(lambda x: x[:, None], batch)
