"""A task of your own: draws test images of which a blurred, noisy version is known.

python main.py --mode=sample --config=docs/extending/task.py --workdir=runs/demo
"""

import jax
import ml_collections
from jax import lax

import controllable_generation as control
from configs.vp import mnist_ddpmpp_continuous

WIDTH = 5  # pixels of the blur


def blur(images):
  """The mean over windows of WIDTH x WIDTH pixels, shaped as `images`, (B, H, W, C)."""
  window = (1, WIDTH, WIDTH, 1)
  return lax.reduce_window(images, 0.0, lax.add, window, (1, 1, 1, 1), 'SAME') / WIDTH**2


@control.register_task(name='deblur')
class Deblur(control.SamplingTask):
  """Observes y = blur(x) + noise, of which the standard deviation is `self.noise_std`."""

  uses_images = True
  noise_std = 0.02  # in the network's range

  def condition(self, images, labels):
    """The condition from `images`, (B, H, W, C), in the network's range."""
    noise = self.noise_std * jax.random.normal(jax.random.key(0), images.shape)
    # `blur` is a function of this module, the same for every batch: another lambda for each would
    # compile the sampler anew.
    return control.PosteriorGuidance(
      sde=self.sde, y=blur(images) + noise, A=blur, noise_std=self.noise_std
    )

  def observed(self, condition, images):
    """What `grid.png` shows beside the samples."""
    return condition.y


def get_config() -> ml_collections.ConfigDict:
  config = mnist_ddpmpp_continuous.get_config()
  config.sampling.task = 'deblur'
  config.sampling.method = 'ddim'
  config.sampling.eta = 1.0
  config.sampling.n_steps = 100
  return config
