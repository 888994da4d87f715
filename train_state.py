"""The training state: parameters, their moving average, the optimizer, and one update of all."""

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
from runtime.registry import Registry

PyTree = Any

_OPTIMIZERS = Registry('optimizer')
register_optimizer = _OPTIMIZERS.register


@flax.struct.dataclass
class State:
  """Everything that training changes.

  Attributes:
    step: optimizer steps taken.
    params: parameters.
    params_ema: their exponential moving average; sampling and evaluation use these.
    opt_state: moments and counters of the optimizer.
    model_state: mutable collections of the network.
    ema_rate: decay of the moving average per step.
  """

  step: PyTree  # an array, or its shape
  params: PyTree
  params_ema: PyTree
  opt_state: PyTree
  model_state: PyTree
  ema_rate: float = flax.struct.field(pytree_node=False, default=0.9999)


def init_state(rng: jax.Array, config: ConfigDict) -> tuple[nn.Module, State]:
  """The network that `config` describes and the state that training starts from."""
  model, model_state, params = mutils.init_model(rng, config)
  return model, first_state(config, model_state, params)


def abstract_state(config: ConfigDict) -> tuple[nn.Module, State]:
  """What `init_state` returns, with shapes in place of arrays."""
  model, model_state, params = mutils.abstract_model(config)
  return model, jax.eval_shape(functools.partial(first_state, config), model_state, params)


def first_state(config: ConfigDict, model_state: PyTree, params: PyTree) -> State:
  """The state that training starts from, with these parameters."""
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

  p <- p - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p): its decay is decoupled, as AdamW's is,
  and takes all parameters but the Fourier frequencies, which no training changes.
  """
  return _adam(learning_rate, optim, decayed=lambda path, x: not is_frequency(path, x))


@register_optimizer(name='AdamW')
def adamw(learning_rate: optax.Schedule, optim: ConfigDict) -> optax.GradientTransformation:
  """Adam with decoupled weight decay of the kernels: no biases, scales or Fourier frequencies.

  Loshchilov and Hutter, "Decoupled weight decay regularization",
  https://arxiv.org/abs/1711.05101.
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

  The learning rate of step k, counted from 0, is lr min(k / warmup, 1).
  """
  optim = config.optim
  make = _OPTIMIZERS.get(optim.optimizer)
  schedule = optax.constant_schedule(optim.lr)
  if optim.warmup > 0:
    schedule = optax.linear_schedule(0.0, optim.lr, optim.warmup)
  clip = optax.identity()
  if optim.grad_clip >= 0:
    clip = optax.clip_by_global_norm(optim.grad_clip)
  return optax.chain(clip, make(schedule, optim))


def optimization_manager(config: ConfigDict) -> Callable[[State, PyTree], State]:
  """The function `optimize_fn(state, grad) -> state` that moves parameters, EMA and step by one."""
  optimizer = get_optimizer(config)

  def optimize_fn(state: State, grad: PyTree) -> State:
    updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # In single precision, so that the two weights add up to one exactly.
    rate = jnp.asarray(state.ema_rate, jnp.float32)
    params_ema = jax.tree.map(lambda e, p: e * rate + p * (1 - rate), state.params_ema, params)
    return state.replace(
      step=state.step + 1, params=params, params_ema=params_ema, opt_state=opt_state
    )

  return optimize_fn


def weights_only(like: State) -> State:
  """The part of a state that sampling and evaluation use: the EMA, without optimizer state."""
  return like.replace(params=None, opt_state=None)
