"""Noise-conditional classifiers: creation, files, and their gradient for every SDE.

A classifier of p(y | x_t) depends on the SDE only through the scale of x_t. Divided by alpha_t, and
in the range [0, 1],

  y_t = inverse_scaler(x_t / alpha_t) = image + sigma' z,  sigma' = (sigma_t / alpha_t) slope,

where slope is the derivative of the inverse scaler. So one classifier that is told sigma' serves
the VE, VP and sub-VP SDEs and those of users. It is trained at noise levels sigma' that are uniform
in the logarithm, as uniform times of the VE SDE make them. Uniform times of the VP SDE would put
half of all examples above sigma' = 1.7, where there is little left to see: after 1,000 steps on the
digits they gave 94.4 % instead of 97.0 % on clean ones, and 28.6 % instead of 25.0 % at sigma' = 3.
"""

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
from sde_lib import SDE, batch_mul

CLASSIFIERS = Registry('classifier')
register_classifier = CLASSIFIERS.register
get_classifier = CLASSIFIERS.get

PyTree = Any
LogitFn = Callable[[jax.Array, jax.Array], jax.Array]

# Of the pixels of CIFAR-10's training images in [0, 1].
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)


@dataclasses.dataclass(frozen=True)
class NoiseConditionalClassifier:
  """A trained classifier of images of the range [0, 1] with Gaussian noise.

  Attributes:
    module: the network, called as `module.apply({'params': params}, images, sigmas)`.
    params: its parameters.
    sigma_min: smallest noise level of its training, in units of images in [0, 1].
    sigma_max: the largest.
    image_shape: (H, W, C).
    info: what its file says of it, with the accuracy on the test split.
  """

  module: Any
  params: PyTree
  sigma_min: float
  sigma_max: float
  image_shape: tuple[int, int, int]
  info: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

  def logits(self, images: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Logits (B, num_classes) of noisy images (B, H, W, C) with noise levels (B,)."""
    return self.module.apply({'params': self.params}, images, self._clamp(sigmas), train=False)

  def features(self, images: jax.Array, sigmas: jax.Array) -> jax.Array:
    """What the last layer sees, (B, D); zero noise levels are those of clean images."""
    return self.module.apply(
      {'params': self.params}, images, self._clamp(sigmas), method='features'
    )

  def _clamp(self, sigmas: jax.Array) -> jax.Array:
    """Noise levels that it was not trained with become the nearest that it was."""
    return jnp.clip(sigmas, self.sigma_min, self.sigma_max)


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
  cls, known = get_classifier(name), CLASSIFIERS.fields(name)
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


def load_classifier(path: str | pathlib.Path) -> NoiseConditionalClassifier:
  """The classifier in a file `classifier.safetensors` of `--mode=train_classifier`.

  Raises:
    UserError: if the file is not there, or holds something else.
  """
  if not path:
    raise UserError(
      "config.classifier.checkpoint='' names no file: give the classifier.safetensors "
      'of a run of --mode=train_classifier.'
    )
  path = pathlib.Path(path).expanduser()
  _, info = read_classifier_file(path)
  module, params = create_classifier(jax.random.PRNGKey(0), 1, path)
  return NoiseConditionalClassifier(
    module, params, info['sigma_min'], info['sigma_max'], tuple(info['image_shape']), info
  )


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


def classifier_score(
  sde: SDE, logit_fn: LogitFn, inverse_scaler: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """The function `(x_t, t (B,), labels (B,)) -> ` gradient of log p(y | x_t) in x_t, as `x_t`.

  Added to the score it makes the score of p(x_t | y) (Eq. 14).

  Args:
    sde: the forward SDE; its marginals must be linear in x_0.
    logit_fn: `(y, sigma' (B,)) -> logits` of images of the range [0, 1] with noise, such as
      `NoiseConditionalClassifier.logits`.
    inverse_scaler: from the network's range to [0, 1]; affine.
  """
  grad_fn = get_classifier_grad_fn(logit_fn)
  slope = inverse_scaler(1.0) - inverse_scaler(0.0)

  def score(x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
    alpha, sigma = sde.alpha_sigma(t)
    images = inverse_scaler(batch_mul(1 / alpha, x))
    return batch_mul(slope / alpha, grad_fn(images, slope * sigma / alpha, labels))

  return score


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
  registered = info['name'] in CLASSIFIERS.names()
  fields = CLASSIFIERS.fields(info['name']) if registered else info['fields']
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
