"""A predictor of your own: the midpoint rule for the probability flow.

python main.py --mode=sample --config=docs/extending/predictor.py --workdir=runs/demo
"""

import jax.numpy as jnp
import ml_collections

import sampling
from configs.vp import mnist_ddpmpp_continuous


@sampling.register_predictor(name='midpoint')
class Midpoint(sampling.Predictor):
  """x + f~(x + f~(x, t) dt / 2, t + dt / 2) dt, where f~ is the drift of Eq. 13 and dt < 0."""

  nfe = 2  # calls of `score_fn` in an update

  def update_fn(self, rng, x, t):
    """x at the next, earlier time; and the same before noise is added, of which there is none."""
    flow = self.sde.reverse(self.score_fn, probability_flow=True)
    dt = -self.sde.T / self.sde.N
    middle = x + 0.5 * dt * flow.sde(x, t)[0]
    x = x + dt * flow.sde(middle, jnp.maximum(t + 0.5 * dt, self.sde.sampling_eps))[0]
    return x, x


def get_config() -> ml_collections.ConfigDict:
  config = mnist_ddpmpp_continuous.get_config()
  config.sampling.predictor = 'midpoint'
  config.sampling.corrector = 'none'
  config.sampling.n_steps = 50
  return config
