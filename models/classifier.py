"""Noise-conditional classifiers: creation, files, and their gradient for every SDE.

A classifier of p(y | x_t) depends on the SDE only through the scale of x_t. Divided by alpha_t, and
in the range [0, 1],

    y_t = inverse_scaler(x_t / alpha_t) = image + sigma' z,  sigma' = (sigma_t / alpha_t) slope,

where slope is the derivative of the inverse scaler. So one classifier that is conditioned on sigma'
serves the VE, VP and sub-VP SDEs and those of users. It is trained at noise levels sigma' that are
uniform in the logarithm, like those of the VE SDE at uniform times. Uniform times of the VP SDE
would put half of all examples above sigma' = 1.7, where little of an image can be seen: after 1,000
steps on the digits they gave 94.4 % instead of 97.0 % on clean ones, and 28.6 % instead of 25.0 %
at sigma' = 3.

Equation numbers are those of Song et al. 2021, "Score-Based Generative Modeling through Stochastic
Differential Equations", https://arxiv.org/abs/2011.13456.
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
from jaxtyping import Float, PyTree

from runtime import weights
from runtime.array_types import (
  Array,
  Batch,
  Images,
  Labels,
  Logits,
  PerExample,
  RandomKey,
  Scalar,
  Scaler,
)
from runtime.errors import UserError
from runtime.files import locate
from runtime.registry import Registry
from sde_lib import SDE, batch_mul

CLASSIFIERS = Registry('classifier')
register_classifier = CLASSIFIERS.register
get_classifier = CLASSIFIERS.get

LogitFn = Callable[[Batch, PerExample], Logits]

# Of the pixels of CIFAR-10's training images in [0, 1].
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)


@dataclasses.dataclass(frozen=True)
class NoiseConditionalClassifier:
  """A trained classifier of images in [0, 1] with Gaussian noise.

  Attributes:
    module: the network, called as `module.apply({'params': params}, images, sigmas)`.
    params: its parameters.
    sigma_min: smallest noise level that it was trained at, in units of images in [0, 1].
    sigma_max: largest noise level that it was trained at.
    image_shape: (H, W, C).
    info: the metadata of its file, with the accuracy on the test split.
  """

  module: nn.Module
  params: PyTree
  sigma_min: float
  sigma_max: float
  image_shape: tuple[int, int, int]
  info: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

  def logits(self, images: Images, sigmas: PerExample) -> Logits:
    """Returns the logits, (B, num_classes), of noisy images.

    Args:
      images: images in [0, 1] plus noise, (B, H, W, C).
      sigmas: standard deviation of the noise, (B,), in units of images in [0, 1]. Values outside
        [sigma_min, sigma_max] are clipped.
    """
    return self.module.apply({'params': self.params}, images, self._clamp(sigmas), train=False)

  def features(self, images: Images, sigmas: PerExample) -> Float[Array, 'B D']:
    """Returns the input of the last layer, (B, D); arguments as of `logits`.

    The noise level of clean images is zero.
    """
    return self.module.apply(
      {'params': self.params}, images, self._clamp(sigmas), method='features'
    )

  def _clamp(self, sigmas: PerExample) -> PerExample:
    """The nearest noise levels that it was trained at."""
    return jnp.clip(sigmas, self.sigma_min, self.sigma_max)


def create_classifier(
  prng_key: RandomKey,
  batch_size: int,
  ckpt_path: str | pathlib.Path | None = None,
  name: str = 'wideresnet_noise_conditional',
  image_shape: Sequence[int] = (32, 32, 3),
  **fields: Any,
) -> tuple[nn.Module, PyTree]:
  """Creates a noise-conditional classifier of images, with its parameters.

  Args:
    prng_key: for fresh parameters.
    batch_size: of the batch that they are initialized with; they do not depend on it.
    ckpt_path: a file of parameters. If `--mode=train_classifier` wrote it, it also sets the name,
      the shape and the fields; if `flax.serialization.to_bytes` did, it has parameters only. None
      draws fresh ones.
    name: of a registered classifier.
    image_shape: (H, W, C).
    **fields: fields of the classifier, such as `num_classes`.

  Returns:
    The module and its parameters.

  Raises:
    UserError: if the name or a field is unknown, or the file is missing or holds something else.
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

  def init(rng: RandomKey) -> PyTree:
    images, sigmas = jnp.zeros((batch_size, *image_shape)), jnp.ones(batch_size)
    return classifier.init(rng, images, sigmas, train=False)['params']

  if ckpt_path is None:
    return classifier, jax.jit(init)(prng_key)
  try:
    params = weights.fit(weights.flatten(params), jax.eval_shape(init, prng_key))
  except Exception as error:  # fields and parameters can be of any type, too
    raise UserError(
      f'{ckpt_path} does not fit the classifier {name} with {fields} ({_reason(error)}): '
      f'create it with the fields that it was trained with.'
    ) from error
  return classifier, jax.tree.map(jnp.asarray, params)


def load_classifier(path: str | pathlib.Path) -> NoiseConditionalClassifier:
  """Loads the classifier in a file `classifier.safetensors` of `--mode=train_classifier`.

  Raises:
    UserError: if the file is missing or holds something else.
  """
  if not path:
    raise UserError(
      "config.classifier.checkpoint='' names no file: give the classifier.safetensors "
      'of a run of --mode=train_classifier.'
    )
  path = locate(path)
  _, info = read_classifier_file(path)
  module, params = create_classifier(jax.random.PRNGKey(0), 1, path)
  return NoiseConditionalClassifier(
    module=module,
    params=params,
    sigma_min=info['sigma_min'],
    sigma_max=info['sigma_max'],
    image_shape=tuple(info['image_shape']),
    info=info,
  )


def get_logit_fn(
  classifier: nn.Module,
  params: PyTree,
  *,
  mean: Sequence[float] = CIFAR10_MEAN,
  std: Sequence[float] = CIFAR10_STD,
) -> LogitFn:
  """Returns the classifier as a function `(x, sigma) -> logits` of noisy images.

  Here `x` is (B, H, W, C), images in [0, 1] plus noise; it enters the classifier as
  (x - mean) / std. sigma is the standard deviation of the noise, (B,), in units of images in
  [0, 1], and enters unchanged. The logits are (B, num_classes).

  Args:
    classifier: a noise-conditional classifier.
    params: its parameters.
    mean: mean of each channel of the images that it was trained on.
    std: standard deviation of each channel.
  """

  def logit_fn(data: Batch, noise_level: PerExample) -> Logits:
    data = (data - jnp.asarray(mean)) / jnp.asarray(std)
    return classifier.apply({'params': params}, data, noise_level, train=False)

  return logit_fn


def get_classifier_grad_fn(
  logit_fn: LogitFn,
) -> Callable[[Batch, PerExample, Labels], Batch]:
  """Returns the function `(x, sigma, y) -> ` gradient of log p(y | x) in x.

  Here x is (B, ...), sigma its noise level, (B,), y the class of each example, (B,), and the
  gradient is shaped as x. Added to the score it makes the score of p(x_t | y) (Eq. 14).

  Args:
    logit_fn: `(x, sigma) -> logits`, (B, num_classes).
  """

  def log_likelihood(data: Batch, noise_level: PerExample, labels: Labels) -> Scalar:
    log_p = jax.nn.log_softmax(logit_fn(data, noise_level))
    return jnp.sum(jnp.take_along_axis(log_p, labels[:, None], axis=-1))

  return jax.grad(log_likelihood)


def classifier_score(
  sde: SDE, logit_fn: LogitFn, inverse_scaler: Scaler
) -> Callable[[Batch, PerExample, Labels], Batch]:
  """Returns the function `(x_t, t, y) -> ` gradient of log p(y | x_t) in x_t.

  Here x_t is (B, ...), in the range of the scaled data, t is (B,), in [0, T], y has the class of
  each example, (B,), and the gradient is shaped as x_t. Added to the score it makes the score of
  p(x_t | y) (Eq. 14).

  Args:
    sde: the forward SDE; its marginals must be linear in x_0.
    logit_fn: `(y_t, sigma') -> logits`, (B, num_classes), of noisy images in [0, 1], such as
      `NoiseConditionalClassifier.logits`; y_t and sigma' are those of this module's docstring.
    inverse_scaler: the affine map from the range of the scaled data to [0, 1].
  """
  grad_fn = get_classifier_grad_fn(logit_fn)
  slope = inverse_scaler(1.0) - inverse_scaler(0.0)

  def score(x: Batch, t: PerExample, labels: Labels) -> Batch:
    alpha, sigma = sde.alpha_sigma(t)
    images = inverse_scaler(batch_mul(1 / alpha, x))
    return batch_mul(slope / alpha, grad_fn(images, slope * sigma / alpha, labels))

  return score


def is_classifier_file(path: str | pathlib.Path) -> bool:
  """Whether `path` is a readable file in safetensors, as `--mode=train_classifier` writes it."""
  try:
    with open(path, 'rb') as file:
      head = file.read(9)
  except OSError:
    return False
  return head[4:] == b'\0\0\0\0{'  # the length of the JSON header, and the header


def read_classifier_file(path: str | pathlib.Path) -> tuple[PyTree, dict[str, Any]]:
  """Reads the parameters and the metadata in a file of `--mode=train_classifier`.

  Returns:
    The parameters, and the metadata: `name`, `fields`, `image_shape`, `sigma_min`, `sigma_max`,
    `accuracy`, ...

  Raises:
    UserError: if the file is missing or holds something else.
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
  """The name, fields, shape and noise levels of a classifier from the metadata of its file.

  Raises:
    ValueError: if `--mode=train_classifier` cannot have written this metadata.
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


def _is_number(x: object) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _is_image_shape(x: object) -> bool:
  return (
    isinstance(x, list) and len(x) == 3 and all(isinstance(n, int) and 0 < n < 2**16 for n in x)
  )


def _read_flax_file(path: str | pathlib.Path) -> PyTree:
  """The parameters in a file of `flax.serialization.to_bytes`."""
  try:
    return weights.restore_flax(pathlib.Path(path).read_bytes())
  except Exception as error:  # a hostile file can make a parser raise anything
    raise UserError(
      f'{path} is not a file of parameters ({_reason(error)}): give the classifier.safetensors of '
      f'a run of --mode=train_classifier, or the flax.serialization.to_bytes of the parameters.'
    ) from error


def _reason(error: Exception) -> str:
  return ' '.join(str(error).split())[:200].rstrip('.') or type(error).__name__


def write_classifier_file(params: PyTree, info: dict[str, Any]) -> bytes:
  """Returns the content of a file that `read_classifier_file` reads.

  Args:
    params: arrays in nested dictionaries.
    info: the metadata, whose values JSON can hold.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  arrays = {name: np.ascontiguousarray(x) for name, x in flat.items()}
  return weights.to_safetensors(arrays, {'classifier': json.dumps(info)})
