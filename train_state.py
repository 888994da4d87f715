"""The training state (parameters, their moving average, the optimizer) and one update of it.

Optimizers: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015,
https://arxiv.org/abs/1412.6980; Loshchilov and Hutter, "Decoupled weight decay regularization",
ICLR 2019, https://arxiv.org/abs/1711.05101.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from models import utils as mutils
from models.layers import is_frequency
from runtime import parallelism
from runtime.array_types import Count, Flag, RandomKey, Scalar
from runtime.registry import Registry

PyTree = Any

_OPTIMIZERS = Registry('optimizer')
register_optimizer = _OPTIMIZERS.register


@flax.struct.dataclass
class State:
  """Everything that training changes.

  Attributes:
    step: the number of optimizer steps taken, a scalar.
    params: the parameters.
    params_ema: their exponential moving average, which sampling and evaluation use.
    opt_state: the moments and counters of the optimizer.
    model_state: the mutable collections of the network other than the parameters.
    ema_rate: the decay of the moving average per step.
  """

  # All but `ema_rate` are trees, whose leaves JAX replaces by shapes, shardings and the like.
  step: PyTree
  params: PyTree
  params_ema: PyTree
  opt_state: PyTree
  model_state: PyTree
  ema_rate: float = flax.struct.field(pytree_node=False, default=0.9999)


Observer = Callable[[State, PyTree], dict[str, Scalar]]


def init_state(rng: RandomKey, config: ConfigDict) -> tuple[nn.Module, State]:
  """The network that `config` describes, and the initial training state drawn with `rng`."""
  model = mutils.create_model(config)
  return model, parallelism.draw(functools.partial(fresh_state, config), rng)


def abstract_state(config: ConfigDict) -> tuple[nn.Module, State]:
  """The network and the state of `init_state`, with shapes in place of arrays."""
  model = mutils.create_model(config)
  key = jax.ShapeDtypeStruct((2,), jnp.uint32)
  return model, jax.eval_shape(functools.partial(fresh_state, config), key)


def fresh_state(config: ConfigDict, rng: RandomKey) -> State:
  """The state of `init_state`, for use inside `jax.jit`."""
  model_state, params = mutils.initializer(mutils.create_model(config), config)(rng)
  return first_state(config, model_state, params)


def first_state(config: ConfigDict, model_state: PyTree, params: PyTree) -> State:
  """The initial training state with these parameters and other collections of the network."""
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    params_ema=jax.tree.map(jnp.copy, params),
    opt_state=get_optimizer(config).init(params),
    model_state=model_state,
    ema_rate=config.model.ema_rate,
  )


@register_optimizer(name='Adam')
def adam(learning_rate: optax.Schedule, optim: ConfigDict) -> optax.GradientTransformation:
  """The Adam of `flax.optim`, which the published models were trained with.

  p <- p - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p). The weight decay is decoupled, as in
  AdamW, and applies to all parameters but the Fourier frequencies, which are never trained.

  Args:
    learning_rate: lr as a function of the step.
    optim: `config.optim`, of which beta1, eps and weight_decay are read.
  """
  return _adam(learning_rate, optim, decayed=lambda path, x: not is_frequency(path, x))


@register_optimizer(name='AdamW')
def adamw(learning_rate: optax.Schedule, optim: ConfigDict) -> optax.GradientTransformation:
  """AdamW, whose weight decay leaves out biases, scales and Fourier frequencies.

  The update is that of `adam`. The arguments are those of `adam`.
  """
  return _adam(learning_rate, optim, decayed=lambda path, x: x.ndim > 1)


def _adam(
  learning_rate: optax.Schedule, optim: ConfigDict, decayed: Callable[[Any, jax.Array], bool]
) -> optax.GradientTransformation:
  return optax.adamw(
    learning_rate,
    b1=optim.beta1,
    b2=0.999,
    eps=optim.eps,
    weight_decay=optim.weight_decay,
    mask=lambda params: jax.tree_util.tree_map_with_path(decayed, params),
  )


def get_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Gradient clipping, then the configured optimizer with linear warm-up of its learning rate.

  The learning rate of step k, counted from 0, is lr min(k / warmup, 1). A gradient whose norm
  exceeds `optim.grad_clip` is scaled down to it; a negative value turns clipping off.

  Raises:
    UserError: if the name of the optimizer is unknown.
  """
  optim = config.optim
  make = _OPTIMIZERS.get(optim.optimizer)
  schedule = learning_rate(config)
  clip = optax.identity()
  if optim.grad_clip >= 0:
    clip = optax.clip_by_global_norm(optim.grad_clip)
  return optax.chain(clip, make(schedule, optim))


def learning_rate(config: ConfigDict) -> optax.Schedule:
  """The learning rate of step k, counted from 0: lr min(k / warmup, 1)."""
  optim = config.optim
  if optim.warmup > 0:
    return optax.linear_schedule(0.0, optim.lr, optim.warmup)
  return optax.constant_schedule(optim.lr)


def observer(config: ConfigDict) -> Observer:
  """The function `(state, gradient) -> numbers of the step by name` that a training logs.

  They are the norm of the gradient, before it is clipped, and the learning rate. The clip computes
  the same norm, so in a compiled step it costs nothing.
  """
  schedule = learning_rate(config)

  def observe(state: State, grad: PyTree) -> dict[str, Scalar]:
    rate = jnp.asarray(schedule(updates(state)), jnp.float32)
    return {'gradient_norm': optax.tree.norm(grad), 'learning_rate': rate}

  return observe


def updates(state: State) -> Count:
  """How many updates the schedule of the optimizer has seen, which leaves out skipped steps."""
  of_schedule = lambda path, _: getattr(path[-1], 'tuple_name', '') == 'ScaleByScheduleState'
  counts = optax.tree.get_all_with_path(state.opt_state, 'count', filtering=of_schedule)
  return counts[0][1] if counts else state.step  # an optimizer of a user may have none


def optimization_manager(config: ConfigDict) -> Callable[[State, PyTree], State]:
  """The function `optimize_fn(state, grad) -> state` that does one step of the optimizer.

  It updates the parameters, then their moving average,
  params_ema <- rate params_ema + (1 - rate) params, and the counter of steps.

  Raises:
    UserError: if the name of the optimizer is unknown.
  """
  optimizer = get_optimizer(config)

  def optimize_fn(state: State, grad: PyTree) -> State:
    updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # In single precision, because rate and 1 - rate then add up to one exactly.
    rate = jnp.asarray(state.ema_rate, jnp.float32)
    params_ema = jax.tree.map(lambda e, p: e * rate + p * (1 - rate), state.params_ema, params)
    return state.replace(
      step=state.step + 1, params=params, params_ema=params_ema, opt_state=opt_state
    )

  return optimize_fn


def is_finite(loss: Scalar, grad: PyTree) -> Flag:
  """Whether the loss and the norm of the gradient are finite."""
  return jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grad))


def skip_unless(finite: Flag, new: State, old: State) -> State:
  """`new` if `finite`, else `old` one step later: batches and draws are functions of the step."""
  kept = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
  return kept.replace(step=new.step)


def weights_only(like: State) -> State:
  """The state that sampling and evaluation use: only the EMA parameters, no optimizer state."""
  return like.replace(params=None, opt_state=None)
