"""An SDE of your own: the VP SDE with a constant beta.

python main.py --mode=train --config=docs/extending/sde.py --workdir=runs/constant_beta
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

import sde_lib
from configs.vp import mnist_ddpmpp_continuous


@sde_lib.register_sde(name='constant')
@dataclasses.dataclass(frozen=True)
class ConstantBeta(sde_lib.SDE):
  """dx = -b/2 x dt + sqrt(b) dw, with the marginals N(alpha_t x_0, (1 - alpha_t^2) I).

  Here alpha_t = exp(-b t / 2). The fields are read from `config.model`: `b` from the key `b`, and
  `N` from `num_scales`.
  """

  b: float = 9.0
  N: int = 1000

  def sde(self, x, t):
    """The drift f(x, t), shaped as `x`, and the diffusion coefficient g(t), (B,)."""
    return -0.5 * self.b * x, jnp.full_like(t, self.b**0.5)

  def marginal_prob(self, x, t):
    """The mean, shaped as `x`, and the standard deviation, (B,), of p(x_t | x_0 = x)."""
    alpha = jnp.exp(-0.5 * self.b * t)
    return sde_lib.batch_mul(alpha, x), jnp.sqrt(1 - alpha**2)

  def prior_sampling(self, rng, shape):
    """A sample of the prior, N(0, I)."""
    return jax.random.normal(rng, shape)

  def prior_logp(self, z):
    """The log-density of the prior, (B,), in nats."""
    return jax.scipy.stats.norm.logpdf(z).reshape(len(z), -1).sum(-1)


def get_config() -> ml_collections.ConfigDict:
  config = mnist_ddpmpp_continuous.get_config()
  config.training.sde = 'constant'
  config.model.b = 9.0
  return config
