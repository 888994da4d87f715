"""The registry of networks, their construction, and the step from a network to a score.

The score of a network is that of Song et al. 2021, "Score-Based Generative Modeling through
Stochastic Differential Equations", https://arxiv.org/abs/2011.13456.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from models.classifier import (
  create_classifier,
  get_classifier,
  get_classifier_grad_fn,
  get_logit_fn,
  register_classifier,
)
from runtime import parallelism
from runtime.array_types import Batch, PerExample, RandomKey, TimeLabels
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


def create_model(config: ConfigDict) -> nn.Module:
  """Creates the network that `config.model.name` names, its fields read from the configuration.

  A field takes the value of the key of the same name in `config.model`; `image_size`,
  `num_channels` and `centered` come from `config.data`. Other fields keep their defaults. If the
  network has a method `check()`, it is called and may refuse the fields.

  Raises:
    UserError: if no network has this name, or if `check` refuses the fields.
  """
  data = {key: config.data[key] for key in ('image_size', 'num_channels', 'centered')}
  model = MODELS.build(config.model.name, {**data, **config.model})
  if hasattr(model, 'check'):
    model.check()
  return model


def init_model(rng: RandomKey, config: ConfigDict) -> tuple[nn.Module, PyTree, PyTree]:
  """Builds the configured network and draws its parameters.

  Returns:
    The module, its mutable collections other than the parameters (often empty), the parameters.

  Raises:
    UserError: as `create_model`.
  """
  model = create_model(config)
  return model, *parallelism.draw(initializer(model, config), rng)


def abstract_model(config: ConfigDict, anew: bool = False) -> tuple[nn.Module, PyTree, PyTree]:
  """Returns what `init_model` does, with shapes in place of arrays and without computing anything.

  Args:
    config: the configuration.
    anew: whether to trace the network even if it was traced before, for who observes its calls.

  Raises:
    UserError: as `create_model`.
  """
  model = create_model(config)
  return model, *jax.eval_shape(initializer(model, config, anew), jax.random.PRNGKey(0))


def initializer(
  model: nn.Module, config: ConfigDict, anew: bool = False
) -> Callable[[RandomKey], tuple[PyTree, PyTree]]:
  """The compiled function `rng -> (other collections, parameters)`; see `abstract_model`."""
  size = config.data.image_size
  shape = (1, size, size, config.data.num_channels)
  if anew:
    return _initializer.__wrapped__(model, shape)
  try:
    return _initializer(model, shape)
  except TypeError:  # a field of the network has no hash
    return _initializer.__wrapped__(model, shape)


# Kept, so that a process that asks for shapes and then for parameters traces the network once.
@functools.cache
def _initializer(
  model: nn.Module, shape: tuple[int, ...]
) -> Callable[[RandomKey], tuple[PyTree, PyTree]]:
  @jax.jit
  def init(rng: RandomKey) -> tuple[PyTree, PyTree]:
    params_rng, dropout_rng = jax.random.split(rng)
    image = jnp.zeros(shape)
    rngs = {'params': params_rng, 'dropout': dropout_rng}
    model_state = dict(model.init(rngs, image, jnp.ones((1,)), train=False))
    params = model_state.pop('params')
    return model_state, params

  return init


def get_model_fn(
  model: nn.Module, params: PyTree, states: PyTree, train: bool = False
) -> Callable[..., tuple[Batch, PyTree]]:
  """Returns the network as a function `(x, labels, rng=None) -> (output, new model state)`.

  Here `x` and the output are (B, ...), `labels` are the times or noise levels that the network is
  conditioned on, (B,), and `rng` is the key of dropout.

  Args:
    model: the network, called as `model.apply(variables, x, labels, train=train)`.
    params: its parameters.
    states: its other collections, which only a call with `train=True` changes.
    train: whether dropout is on; then pass an `rng`.
  """

  def model_fn(x: Batch, labels: TimeLabels, rng: RandomKey | None = None) -> tuple[Batch, PyTree]:
    variables = {'params': parallelism.gather_parameters(params), **states}
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
  """Returns the score estimate `(x_t, t, rng=None) -> score` of a network trained under `sde`.

  It computes score(x_t, t) = c(t) network(x_t, l(t)), where the label l(t) is `sde.time_label` and
  the factor c(t) is `sde.score_scale`: -1 / sigma_t for a network that predicts the noise. `x_t`
  and the score are (B, ...), and t is (B,), in [0, T].

  Args:
    sde: the forward SDE that the network was trained under.
    model: the network.
    params: its parameters.
    states: its other collections.
    train: whether dropout is on; then pass an `rng`.
    continuous: whether the network was trained on continuous time.
    return_state: return the pair (score, new model state) instead of the score.
  """
  model_fn = get_model_fn(model, params, states, train)

  def score_fn(
    x: Batch, t: PerExample, rng: RandomKey | None = None
  ) -> Batch | tuple[Batch, PyTree]:
    output, new_states = model_fn(x, sde.time_label(t, continuous), rng)
    score = batch_mul(sde.score_scale(t, continuous), output)
    return (score, new_states) if return_state else score

  return score_fn
