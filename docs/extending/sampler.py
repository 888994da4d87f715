"""A sampling method of your own: Euler's method for the probability flow, on equidistant times.

python main.py --mode=sample --config=docs/extending/sampler.py --workdir=runs/demo
"""

import dataclasses

import jax.numpy as jnp
import ml_collections

import sampling
import sde_lib
from configs.vp import mnist_ddpmpp_continuous
from runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class EulerFlow(sampling.Sampler):
  """n - 1 steps from T to eps, then the denoised image E[x_0 | x_eps].

  The steps pass the carry (x_t,) on. The number of updates and the NFE of each are attributes, from
  which progress bars and reports count.

  Attributes:
    sde: the forward SDE.
    n_steps: the number n of updates, of which the last is the denoising.
    eps: the last time.
  """

  sde: sde_lib.SDE
  n_steps: int
  eps: float

  def init(self, score_fn, condition, rng, shape, z):
    """x_T, from the prior unless it is given."""
    x = self.sde.prior_sampling(rng, shape) if z is None else z
    return (condition.start(x),)

  def step(self, score_fn, condition, i, carry):
    """Euler's step from time number i to the next; the last step denoises."""
    (x,) = carry
    score_fn = condition.flow_score(score_fn)
    times = jnp.linspace(self.sde.T, self.eps, self.n_steps)
    t = jnp.full((len(x),), times[i])
    score = score_fn(x, t)
    drift, _ = self.sde.reverse(lambda *_: score, probability_flow=True).sde(x, t)
    dt = (self.eps - self.sde.T) / (self.n_steps - 1)
    last = i == self.n_steps - 1
    return (jnp.where(last, self.sde.denoise(x, t, score), x + drift * dt),)

  def result(self, score_fn, condition, carry):
    """The sample."""
    return carry[0]


@sampling.register_sampler(name='euler_flow')
def euler_flow(config, sde, eps):
  """Reads the settings and refuses what the sampler cannot do."""
  n_steps = config.sampling.n_steps or sde.N
  if n_steps < 2:
    raise UserError(f'sampling.n_steps={n_steps} must be at least 2 for euler_flow.')
  return EulerFlow(sde, n_steps, eps)


def get_config() -> ml_collections.ConfigDict:
  config = mnist_ddpmpp_continuous.get_config()
  config.sampling.method = 'euler_flow'
  config.sampling.n_steps = 50
  return config
