"""A corrector of your own: Langevin dynamics whose step is chosen for each image by itself.

python main.py --mode=sample --config=docs/extending/corrector.py --workdir=runs/demo
"""

import jax
import jax.numpy as jnp
import ml_collections

import sampling
from configs.vp import mnist_ddpmpp_continuous
from sde_lib import batch_mul


@sampling.register_corrector(name='langevin_alone')
class LangevinAlone(sampling.Corrector):
  """x + eps score + sqrt(2 eps) z with eps = 2 alpha (snr ||z|| / ||score||)^2.

  The built-in corrector averages the norms over the batch. Here an image has norms of its own, and
  so does not depend on the images that it is drawn with.
  """

  def update_fn(self, rng, x, t):
    """x after `self.n_steps` steps at the time t, and before the noise of the last is added."""
    x_mean = x
    for step_rng in jax.random.split(rng, self.n_steps):
      score = self.score_fn(x, t)
      z = jax.random.normal(step_rng, x.shape)
      ratio = self.snr * norms(z) / norms(score)
      eps = 2 * self.sde.langevin_alpha(t) * ratio**2
      x_mean = x + batch_mul(eps, score)
      x = x_mean + batch_mul(jnp.sqrt(2 * eps), z)
    return x, x_mean


def norms(x):
  """The Euclidean norm of each example, (B,)."""
  return jnp.linalg.norm(x.reshape(len(x), -1), axis=-1)


def get_config() -> ml_collections.ConfigDict:
  config = mnist_ddpmpp_continuous.get_config()
  config.sampling.predictor = 'reverse_diffusion'
  config.sampling.corrector = 'langevin_alone'
  return config
