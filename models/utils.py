"""Registry and construction of networks, and the step from a network to a score."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.classifier import (
  create_classifier,
  get_classifier,
  get_classifier_grad_fn,
  get_logit_fn,
  register_classifier,
)
from runtime.registry import Registry
from sde_lib import SDE, ScoreFn, batch_mul

__all__ = [
  'MODELS',
  'abstract_model',
  'create_classifier',
  'create_model',
  'get_classifier',
  'get_classifier_grad_fn',
  'get_logit_fn',
  'get_model',
  'get_model_fn',
  'get_score_fn',
  'init_model',
  'register_classifier',
  'register_model',
]

MODELS = Registry('model')
register_model = MODELS.register
get_model = MODELS.get

PyTree = Any


def create_model(config: Any) -> nn.Module:
  """The network that `config.model.name` names, its fields read from the configuration.

  A field is taken from the key of the same name in `config.model`, and `image_size`,
  `num_channels` and `centered` from `config.data`; others keep their defaults. A network with a
  method `check()` may refuse its fields there.

  Raises:
    UserError: for an unknown name, or what `check` finds.
  """
  data = {key: config.data[key] for key in ('image_size', 'num_channels', 'centered')}
  model = MODELS.build(config.model.name, {**data, **config.model})
  if hasattr(model, 'check'):
    model.check()
  return model


def init_model(rng: jax.Array, config: Any) -> tuple[nn.Module, PyTree, PyTree]:
  """Builds the configured network and draws its parameters.

  Returns:
    The module, its mutable collections other than the parameters (often empty), the parameters.
  """
  model = create_model(config)
  # Hundreds of small random draws that run once: on CPU they take longer to optimize than to run.
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  init = jax.jit(_initializer(model, config), compiler_options=options)
  return model, *init(rng)


def abstract_model(config: Any) -> tuple[nn.Module, PyTree, PyTree]:
  """What `init_model` returns, with shapes in place of arrays and without computing anything."""
  model = create_model(config)
  return model, *jax.eval_shape(_initializer(model, config), jax.random.PRNGKey(0))


def _initializer(model: nn.Module, config: Any) -> Callable[[jax.Array], tuple[PyTree, PyTree]]:
  """The function `rng -> (other collections, parameters)`."""
  size = config.data.image_size

  def init(rng):
    params_rng, dropout_rng = jax.random.split(rng)
    image = jnp.zeros((1, size, size, config.data.num_channels))
    rngs = {'params': params_rng, 'dropout': dropout_rng}
    model_state = dict(model.init(rngs, image, jnp.ones((1,)), train=False))
    params = model_state.pop('params')
    return model_state, params

  return init


def get_model_fn(
  model: nn.Module, params: PyTree, states: PyTree, train: bool = False
) -> Callable[..., tuple[jax.Array, PyTree]]:
  """The network as a function (x, labels, rng=None) -> (output, new model state)."""

  def model_fn(x: jax.Array, labels: jax.Array, rng: jax.Array | None = None):
    variables = {'params': params, **states}
    rngs = None if rng is None else {'dropout': rng}
    if not train:
      return model.apply(variables, x, labels, train=False, rngs=rngs), states
    return model.apply(variables, x, labels, train=True, mutable=list(states), rngs=rngs)

  return model_fn


def get_score_fn(
  sde: SDE,
  model: nn.Module,
  params: PyTree,
  states: PyTree,
  train: bool = False,
  continuous: bool = False,
  return_state: bool = False,
) -> ScoreFn:
  """The score estimate (x_t, t, rng=None) -> score of a network trained under `sde`.

  Args:
    sde: gives the label for time t and the factor from network output to score.
    model: the network.
    params: its parameters.
    states: its other collections.
    train: whether dropout is on; then pass an `rng`.
    continuous: whether the network was trained on continuous time.
    return_state: return (score, new model state).
  """
  model_fn = get_model_fn(model, params, states, train)

  def score_fn(x: jax.Array, t: jax.Array, rng: jax.Array | None = None):
    output, new_states = model_fn(x, sde.time_label(t, continuous), rng)
    score = batch_mul(sde.score_scale(t, continuous), output)
    return (score, new_states) if return_state else score

  return score_fn
