"""Feature extractors: networks whose features of images the metrics of sample quality compare.

An extractor is registered as a function from a configuration to an `Extractor`:

    @register_extractor(name='mine')
    def mine(config) -> Extractor: ...

The FID Inception network is that of Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update
Rule Converge to a Local Nash Equilibrium", https://arxiv.org/abs/1706.08500.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree, Shaped
from ml_collections import ConfigDict

from models import inception
from models.classifier import load_classifier
from runtime import parallelism, torch_file
from runtime.array_types import Array, GreyLevels
from runtime.errors import UserError
from runtime.registry import Registry
from sources.base import ASSETS

# 'pool_3', (B, num_features), and 'logits', (B, K).
Outputs = dict[str, Float[Array, 'B _']]

_EXTRACTORS = Registry('extractor')
register_extractor = _EXTRACTORS.register

INCEPTION_VARIABLE = 'SCORE_SDE_INCEPTION'
INCEPTION_FILE = 'weights-inception-2015-12-05-6726825d.pth'
_INCEPTION_SHA256 = '6726825d'  # its first digits
_INCEPTION_URL = (
  f'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}'
)

MNIST5K_FILE = ASSETS / 'mnist5k_classifier.safetensors'


@dataclasses.dataclass(frozen=True)
class Extractor:
  """A network that computes features and logits of images.

  Attributes:
    name: its registered name, which is part of the name of every number.
    scaling: name of the map from grey levels to the input of the network.
    fingerprint: of the weights; features of other weights cannot be compared with these.
    num_features: length of a feature vector.
    params: the weights.
    forward: a function `(params, images) -> outputs`, which is compiled. The images are uint8
      (B, H, W, C), and the outputs {'pool_3': (B, num_features), 'logits': (B, K)}.
    batch_size: the number of images that one device processes at a time.
  """

  name: str
  scaling: str
  fingerprint: str
  num_features: int
  params: PyTree = dataclasses.field(repr=False)
  forward: Callable[[PyTree, GreyLevels], Outputs] = dataclasses.field(repr=False)
  batch_size: int = 16

  def global_batch_size(self) -> int:
    """The number of images that all devices process at a time."""
    return self.batch_size * jax.device_count()

  @functools.cached_property
  def _compiled(self) -> Callable[[GreyLevels], Outputs]:
    forward = jax.jit(lambda params, x: self.forward(params, parallelism.shard_batch(x)))
    return functools.partial(forward, parallelism.replicate(self.params))

  def extract_global(self, images: Shaped[Array, 'B H W C']) -> dict[str, Float[np.ndarray, 'B _']]:
    """Features and logits of a global array of images; every process gets the whole result.

    Args:
      images: grey levels, uint8 (B, H, W, C).

    Returns:
      'pool_3', (B, num_features), and 'logits', (B, K), in single precision.

    Raises:
      UserError: if the images are not uint8, or the outputs do not have the declared shapes.
    """
    if images.dtype != np.uint8:
      raise UserError(
        f'The extractor {self.name!r} takes grey levels of type uint8, not {images.dtype}: scale '
        f'the images to 0...255 and round them.'
      )
    outputs = self._compiled(images)
    pool_3, logits = (np.float32(parallelism.to_host(outputs[k])) for k in ('pool_3', 'logits'))
    expected = (len(images), self.num_features)
    if pool_3.shape != expected or logits.ndim != 2 or len(logits) != len(images):
      raise UserError(
        f'The extractor {self.name!r} gives pool_3 of shape {pool_3.shape} and logits of shape '
        f'{logits.shape}, which must be {expected} and ({len(images)}, K): correct its forward or '
        f'its num_features.'
      )
    return {'pool_3': pool_3, 'logits': logits}

  def __call__(self, images: Shaped[np.ndarray, 'B H W C']) -> dict[str, Float[np.ndarray, 'B _']]:
    """Features and logits of any number of images that every process holds.

    Args:
      images: grey levels, uint8 (B, H, W, C).

    Returns:
      As `extract_global`.

    Raises:
      UserError: as `extract_global`, or if B is zero.
    """
    if not len(images):
      raise UserError(f'The extractor {self.name!r} was given no images: pass at least one.')
    size = self.global_batch_size()
    padding = -len(images) % size
    padded = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
    parts = [
      self.extract_global(parallelism.split(padded[start : start + size]))
      for start in range(0, len(padded), size)
    ]
    return {key: np.concatenate([p[key] for p in parts])[: len(images)] for key in parts[0]}


def get_extractor(config: ConfigDict) -> Extractor:
  """Creates the extractor that `config.eval.extractor` names.

  Raises:
    UserError: if the name is unknown or the weights are missing.
  """
  return _EXTRACTORS.get(config.eval.extractor)(config)


@register_extractor(name='inception')
def _inception(config: ConfigDict) -> Extractor:
  """The FID Inception network with the scaling of Song et al. 2021, (x - 127.5) / 127.5."""
  return get_inception_model(config.eval.inception_path)


@register_extractor(name='inception_ttur')
def _inception_ttur(config: ConfigDict) -> Extractor:
  """The FID Inception network with the scaling of Heusel et al. 2017, (x - 128) / 128."""
  return get_inception_model(config.eval.inception_path, 'ttur')


def get_inception_model(path: str | pathlib.Path = '', scaling: str = 'tfgan') -> Extractor:
  """Loads the FID Inception network.

  It has 2048 features and 1008 logits; the logits are without bias, as for the Inception score.

  Args:
    path: of the weights; if it is empty, the environment variable SCORE_SDE_INCEPTION gives it, and
      if that is not set either, the file is looked for in `assets/`.
    scaling: 'tfgan' for (x - 127.5) / 127.5, 'ttur' for (x - 128) / 128.

  Raises:
    UserError: if the file is missing or is not the published one.
  """
  path = pathlib.Path(
    path or os.environ.get(INCEPTION_VARIABLE) or ASSETS / INCEPTION_FILE
  ).expanduser()
  try:
    digest = _sha256(path)
  except OSError as error:
    raise UserError(
      f'The weights of the Inception network are not at {path} ({error.strerror}): get '
      f'{_INCEPTION_URL} and set --config.eval.inception_path or {INCEPTION_VARIABLE} to its path, '
      f'or set eval.extractor to another one.'
    ) from error
  if not digest.startswith(_INCEPTION_SHA256):
    raise UserError(
      f'{path} is not the published file: its SHA-256 begins with {digest[:8]}, not '
      f'{_INCEPTION_SHA256}; download it again from {_INCEPTION_URL}.'
    )
  return inception_extractor(inception.params_from_torch(torch_file.load(path)), scaling, digest)


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def inception_extractor(params: PyTree, scaling: str, fingerprint: str) -> Extractor:
  """Makes an extractor of the parameters of the FID Inception network.

  Args:
    params: as `inception.params_from_torch` returns them.
    scaling: a name in `inception.SCALINGS`.
    fingerprint: of the parameters.
  """

  def forward(params: PyTree, images: GreyLevels) -> Outputs:
    outputs = inception.forward(params, images, scaling)
    return {'pool_3': outputs['pool_3'], 'logits': outputs['logits_unbiased']}

  return Extractor(
    name='inception' if scaling == 'tfgan' else f'inception_{scaling}',
    scaling=scaling,
    fingerprint=fingerprint,
    num_features=inception.NUM_FEATURES,
    params=params,
    forward=forward,
  )


@register_extractor(name='mnist5k')
def _mnist5k(config: ConfigDict) -> Extractor:
  """The classifier of MNIST5K that comes with this repository, at its smallest noise level.

  Raises:
    UserError: if the images do not have the shape of those that it was trained on.
  """
  trained = load_classifier(MNIST5K_FILE)
  data = config.data
  shape = (data.image_size, data.image_size, data.num_channels)
  if shape != trained.image_shape:
    raise UserError(
      f"eval.extractor='mnist5k' knows images of shape {trained.image_shape}, not {shape}: "
      f"use 'inception'."
    )

  def forward(params: PyTree, images: GreyLevels) -> Outputs:
    network = dataclasses.replace(trained, params=params)
    images, clean = images / 255.0, jnp.zeros(len(images))
    return {'pool_3': network.features(images, clean), 'logits': network.logits(images, clean)}

  return Extractor(
    name='mnist5k',
    scaling='unit',
    fingerprint=_sha256(MNIST5K_FILE),
    num_features=64 * trained.module.channel_multiplier,
    params=trained.params,
    forward=forward,
    batch_size=50,
  )


@register_extractor(name='pixels')
def _pixels(config: ConfigDict) -> Extractor:
  """The mean grey levels, in [0, 1], of 8 x 8 blocks: they need no weights, and miss all detail.

  Raises:
    UserError: if the images cannot be cut into 8 x 8 blocks of one size.
  """
  size, channels, blocks = config.data.image_size, config.data.num_channels, 8
  if size % blocks:
    raise UserError(
      f"eval.extractor='pixels' cuts images into {blocks} x {blocks} blocks, which "
      f'data.image_size={size} does not allow: choose a multiple of {blocks}, or another extractor.'
    )

  def forward(params: PyTree, images: GreyLevels) -> Outputs:
    del params
    cut = images.reshape(-1, blocks, size // blocks, blocks, size // blocks, channels)
    features = cut.astype(jnp.float32).mean((2, 4)).reshape(len(images), -1) / 255
    return {'pool_3': features, 'logits': jnp.zeros((len(images), 2))}

  return Extractor(
    name='pixels',
    scaling='unit',
    fingerprint='means of 8 x 8 blocks',
    num_features=blocks**2 * channels,
    params={},
    forward=forward,
    batch_size=50,
  )
