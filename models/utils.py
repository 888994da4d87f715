"""Registry and construction of networks, and the step from a network to a score."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from runtime import weights
from runtime.errors import UserError
from runtime.registry import Registry
from sde_lib import SDE, ScoreFn, batch_mul, default_of

_MODELS = Registry('model')
register_model = _MODELS.register
get_model = _MODELS.get

_CLASSIFIERS = Registry('classifier')
register_classifier = _CLASSIFIERS.register
get_classifier = _CLASSIFIERS.get

PyTree = Any
LogitFn = Callable[[jax.Array, jax.Array], jax.Array]

# Of the pixels of CIFAR-10's training images in [0, 1].
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)


def create_model(config: Any) -> nn.Module:
  """The network that `config.model.name` names, its fields read from the configuration.

  A field is taken from the key of the same name in `config.model`, and `image_size`,
  `num_channels` and `centered` from `config.data`; others keep their defaults. A network with a
  method `check()` may refuse its fields there.

  Raises:
    UserError: for an unknown name, or what `check` finds.
  """
  cls = get_model(config.model.name)
  data = {key: config.data[key] for key in ('image_size', 'num_channels', 'centered')}
  settings = {**data, **config.model}
  model = cls(**{key: settings[key] for key in model_fields(config.model.name) if key in settings})
  if hasattr(model, 'check'):
    model.check()
  return model


def model_fields(name: str) -> dict[str, Any]:
  """The fields of the network registered as `name`, with their defaults."""
  fields = dataclasses.fields(get_model(name))
  return {f.name: default_of(f) for f in fields if f.name not in ('parent', 'name')}


def all_model_fields() -> set[str]:
  """The fields of all registered networks."""
  return set().union(*(model_fields(name) for name in _MODELS.names()))


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


def create_classifier(
  prng_key: jax.Array,
  batch_size: int,
  ckpt_path: str | pathlib.Path | None = None,
  name: str = 'wideresnet_noise_conditional',
  image_shape: Sequence[int] = (32, 32, 3),
  **fields: Any,
) -> tuple[nn.Module, PyTree]:
  """A noise-conditional classifier of images and its parameters.

  Args:
    prng_key: for fresh parameters.
    batch_size: of the batch that they are initialized with; they do not depend on it.
    ckpt_path: a file of parameters, as `--mode=train_classifier` writes it, which knows the name,
      the shape and the fields itself, or as `flax.serialization.to_bytes` does; None draws them.
    name: of a registered classifier.
    image_shape: (H, W, C).
    **fields: of the classifier, such as `num_classes`.

  Raises:
    UserError: for an unknown name or field, or a file that is not there or holds something else.
  """
  if ckpt_path is not None and is_classifier_file(ckpt_path):
    params, info = read_classifier_file(ckpt_path)
    name, image_shape = info['name'], info['image_shape']
    trained = info['fields']
    if differing := {key: fields[key] for key in fields if fields[key] != trained.get(key)}:
      raise UserError(
        f'{ckpt_path} holds a classifier with {trained}, not {differing}: '
        f'create it with the fields that it was trained with, or with none.'
      )
    fields = trained
  elif ckpt_path is not None:
    params = _read_flax_file(ckpt_path)
  cls = get_classifier(name)
  known = classifier_fields(name)
  if unknown := set(fields) - set(known):
    raise UserError(
      f'The classifier {name} has no fields {sorted(unknown)}: choose from {", ".join(known)}.'
    )
  classifier = cls(**fields)

  def init(rng):
    images, sigmas = jnp.zeros((batch_size, *image_shape)), jnp.ones(batch_size)
    return classifier.init(rng, images, sigmas, train=False)['params']

  if ckpt_path is None:
    return classifier, jax.jit(init)(prng_key)
  try:
    params = weights.fit(weights.flatten(params), jax.eval_shape(init, prng_key))
  except Exception as error:  # fields and parameters can be anything too
    raise UserError(
      f'{ckpt_path} does not fit the classifier {name} with {fields} ({_reason(error)}): '
      f'create it with the fields that it was trained with.'
    ) from error
  return classifier, jax.tree.map(jnp.asarray, params)


def classifier_fields(name: str) -> list[str]:
  """The fields of the classifier registered as `name`."""
  fields = dataclasses.fields(get_classifier(name))
  return [f.name for f in fields if f.name not in ('parent', 'name')]


def is_classifier_file(path: str | pathlib.Path) -> bool:
  """Whether `path` is a file in safetensors, as `--mode=train_classifier` writes them."""
  try:
    with open(path, 'rb') as file:
      head = file.read(9)
  except OSError:
    return False
  return head[4:] == b'\0\0\0\0{'  # the length of the JSON header, and the header


def read_classifier_file(path: str | pathlib.Path) -> tuple[PyTree, dict[str, Any]]:
  """The parameters in a file of `--mode=train_classifier`, and what it says of them.

  Returns:
    The parameters, and `name`, `fields`, `image_shape`, `sigma_min`, `sigma_max`, `accuracy`, ...

  Raises:
    UserError: if it is not there, or no such file.
  """
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      info = _classifier_info(file.metadata() or {})
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return flax.traverse_util.unflatten_dict(arrays, sep='/'), info
  except Exception as error:  # a hostile file can make a parser raise anything
    raise UserError(
      f'{path} is not a classifier ({_reason(error)}): give the classifier.safetensors of a run of '
      f'--mode=train_classifier.'
    ) from error


def _classifier_info(metadata: Mapping[str, str]) -> dict[str, Any]:
  """What the metadata of a file says of its classifier.

  Raises:
    ValueError: if it is not what `--mode=train_classifier` writes.
  """
  if 'classifier' not in metadata:
    found = weights.enumerate_names(metadata)
    raise ValueError(f'its metadata has no "classifier", but {found}')
  try:
    info = json.loads(metadata['classifier'])
  except (ValueError, RecursionError) as error:
    raise ValueError('its metadata is not JSON') from error
  if not isinstance(info, dict):
    raise ValueError('its metadata is not a JSON object')
  if missing := {'name', 'fields', 'image_shape', 'sigma_min', 'sigma_max'} - info.keys():
    raise ValueError(f'its metadata lacks {weights.enumerate_names(missing)}')
  registered = info['name'] in _CLASSIFIERS.names()
  fields = classifier_fields(info['name']) if registered else info['fields']
  fits = {
    'name': registered,
    'fields': isinstance(info['fields'], dict) and info['fields'].keys() <= {*fields},
    'image_shape': _is_image_shape(info['image_shape']),
    'sigma_min': _is_number(info['sigma_min']) and info['sigma_min'] > 0,
    'sigma_max': _is_number(info['sigma_max']) and info['sigma_max'] > 0,
  }
  if wrong := [f'{name}={ascii(info[name])[:50]}' for name, fit in fits.items() if not fit]:
    raise ValueError(f'its metadata says {", ".join(wrong)}, which cannot be')
  if info['sigma_min'] >= info['sigma_max']:
    raise ValueError(f'its sigma_min is {info["sigma_min"]}, its sigma_max {info["sigma_max"]}')
  return info


def _is_number(x: Any) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _is_image_shape(x: Any) -> bool:
  return (
    isinstance(x, list) and len(x) == 3 and all(isinstance(n, int) and 0 < n < 2**16 for n in x)
  )


def _read_flax_file(path: str | pathlib.Path) -> PyTree:
  """The parameters in a file of `flax.serialization.to_bytes`."""
  try:
    return weights.restore_flax(pathlib.Path(path).read_bytes())
  except Exception as error:  # as above
    raise UserError(
      f'{path} is not a file of parameters ({_reason(error)}): give the classifier.safetensors of '
      f'a run of --mode=train_classifier, or the flax.serialization.to_bytes of the parameters.'
    ) from error


def _reason(error: Exception) -> str:
  return ' '.join(str(error).split())[:200].rstrip('.') or type(error).__name__


def write_classifier_file(params: PyTree, info: dict[str, Any]) -> bytes:
  """The content of a file that `read_classifier_file` reads."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  arrays = {name: np.ascontiguousarray(x) for name, x in flat.items()}
  return safetensors.numpy.save(arrays, {'classifier': json.dumps(info)})


def get_logit_fn(
  classifier: nn.Module,
  params: PyTree,
  mean: Sequence[float] = CIFAR10_MEAN,
  std: Sequence[float] = CIFAR10_STD,
) -> LogitFn:
  """The classifier as a function (x_t, sigma (B,)) -> logits of noisy images of the range [0, 1].

  Args:
    classifier: a noise-conditional classifier.
    params: its parameters.
    mean: of each channel of the images that it was trained with.
    std: their standard deviation.
  """

  def logit_fn(data: jax.Array, noise_level: jax.Array) -> jax.Array:
    data = (data - jnp.asarray(mean)) / jnp.asarray(std)
    return classifier.apply({'params': params}, data, noise_level, train=False)

  return logit_fn


def get_classifier_grad_fn(
  logit_fn: LogitFn,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """The gradient of log p(y | x_t) in x_t, `(x_t, sigma (B,), labels (B,)) -> (B, H, W, C)`.

  Added to the score it makes the score of p(x_t | y) (Eq. 14).
  """

  def log_likelihood(data: jax.Array, noise_level: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logit_fn(data, noise_level))
    return jnp.sum(jnp.take_along_axis(log_p, labels[:, None], axis=-1))

  return jax.grad(log_likelihood)
