"""Noise-conditional classifiers in use: loading them, and their gradient for every SDE.

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
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models import utils as mutils
from models.utils import LogitFn
from runtime.errors import UserError
from sde_lib import SDE, batch_mul

PyTree = Any


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
  _, info = mutils.read_classifier_file(path)
  module, params = mutils.create_classifier(jax.random.PRNGKey(0), 1, path)
  return NoiseConditionalClassifier(
    module, params, info['sigma_min'], info['sigma_max'], tuple(info['image_shape']), info
  )


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
  grad_fn = mutils.get_classifier_grad_fn(logit_fn)
  slope = inverse_scaler(1.0) - inverse_scaler(0.0)

  def score(x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
    alpha, sigma = sde.marginal_prob(jnp.ones_like(t), t)
    images = inverse_scaler(batch_mul(1 / alpha, x))
    return batch_mul(slope / alpha, grad_fn(images, slope * sigma / alpha, labels))

  return score
