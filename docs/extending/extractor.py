"""A feature extractor of your own: local contrasts, seen through a fixed random projection.

python main.py --mode=stats --config=docs/extending/extractor.py
python main.py --mode=eval --config=docs/extending/extractor.py --workdir=runs/demo \
    --config.eval.enable_sampling=True --config.eval.num_samples=1000
"""

import hashlib

import jax.numpy as jnp
import ml_collections
import numpy as np

import evaluation
from configs.vp import mnist_ddpmpp_continuous

NUM_FEATURES = 32


@evaluation.register_extractor(name='contrasts')
def contrasts(config):
  """Features of differences between neighbouring pixels; every number names the extractor."""
  data = config.data
  size = 2 * (data.image_size - 1) ** 2 * data.num_channels
  weights = np.random.RandomState(0).randn(size, NUM_FEATURES).astype(np.float32) / size**0.5

  def forward(params, images):  # uint8 (B, H, W, C)
    x = images / 255.0
    rows = (x[:, 1:, 1:] - x[:, :-1, 1:]).reshape(len(x), -1)
    columns = (x[:, 1:, 1:] - x[:, 1:, :-1]).reshape(len(x), -1)
    features = jnp.tanh(jnp.concatenate([rows, columns], axis=1) @ params)
    # The Inception score needs logits of classes; these two are constant, so that it is 1.
    return {'pool_3': features, 'logits': jnp.zeros((len(x), 2))}

  return evaluation.Extractor(
    name='contrasts',
    scaling='unit',
    fingerprint=hashlib.sha256(weights.tobytes()).hexdigest(),  # features of others are refused
    num_features=NUM_FEATURES,
    params=weights,
    forward=forward,
  )


def get_config() -> ml_collections.ConfigDict:
  config = mnist_ddpmpp_continuous.get_config()
  config.eval.extractor = 'contrasts'
  return config
