"""What extensions can rely on: SDEs that are one process, registries that read fields."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sde_lib
import train_state
from configs.vp import mnist_ddpmpp_continuous
from modes.preparation import prepare
from runtime import configuration
from runtime.errors import UserError
from runtime.registry import Registry
from tests.exact_scores import RECORDED_SDES, ConstantBetaSDE, correlated_gaussian_score

SDES = [
  *RECORDED_SDES.values(),
  sde_lib.VPSDE(0.0, 1e-3, 2),
  sde_lib.subVPSDE(0.0, 0.1, 2),
  sde_lib.VESDE(0.5, 0.5001, 2),
  sde_lib.VESDE(0.01, 1348.0, 2000),
  ConstantBetaSDE(),
]


@dataclasses.dataclass(frozen=True)
class OrnsteinUhlenbeck(ConstantBetaSDE):
  """dx = b/2 (1 - x) dt + sqrt(b) dw, whose mean is not linear but affine in x_0."""

  def sde(self, x, t):
    return 0.5 * self.b * (1 - x), jnp.full_like(t, self.b**0.5)

  def marginal_prob(self, x, t):
    mean, std = super().marginal_prob(x - 1, t)
    return 1 + mean, std


@dataclasses.dataclass(frozen=True)
class TwiceTheDrift(ConstantBetaSDE):
  def sde(self, x, t):
    return -self.b * x, jnp.full_like(t, self.b**0.5)


@dataclasses.dataclass(frozen=True)
class RootForgotten(ConstantBetaSDE):
  def sde(self, x, t):
    return -0.5 * self.b * x, jnp.full_like(t, self.b)


@pytest.mark.parametrize('sde', [*SDES, OrnsteinUhlenbeck()], ids=str)
def test_an_sde_whose_marginals_are_its_own_is_accepted(sde):
  sde_lib.check_consistency(sde)


@pytest.mark.parametrize(
  ('cls', 'message'),
  [(TwiceTheDrift, 'the mean of x_t.*-5.739 by sde'), (RootForgotten, 'the variance of x_t')],
)
def test_an_sde_that_is_not_the_process_of_its_marginals_is_refused(cls, message, monkeypatch):
  monkeypatch.setitem(sde_lib.SDES._entries, 'mine', ('mine', cls))
  config = mnist_ddpmpp_continuous.get_config()
  config.training.sde = 'mine'
  with pytest.raises(UserError, match=f'{cls.__name__} is inconsistent: at t=0.1 {message}'):
    prepare(config)


@pytest.mark.parametrize('sde', SDES, ids=str)
def test_alpha_and_sigma_are_those_of_the_marginals(sde):
  t = jnp.linspace(0.1, 1.0, 4) * sde.T
  x = jax.random.normal(jax.random.key(0), (4, 2, 3))
  mean, std = sde.marginal_prob(x, t)
  alpha, sigma = sde.alpha_sigma(t)
  np.testing.assert_allclose(mean, sde_lib.batch_mul(alpha, x), rtol=1e-6)
  np.testing.assert_array_equal(std, sigma)


@pytest.mark.parametrize('sde', SDES, ids=str)
def test_denoising_gives_the_posterior_mean_of_a_correlated_gaussian(sde):
  """E[x_0 | x_t] = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha m)."""
  mean, covariance = np.array([1.0, -2.0]), np.array([[1.0, 0.6], [0.6, 0.5]])
  t = jnp.asarray([0.2, 0.5, 0.9])
  alpha, sigma = (np.float64(v) for v in sde.alpha_sigma(t))
  x = np.random.RandomState(0).randn(3, 2) * np.sqrt(alpha**2 + sigma**2)[:, None]
  score = correlated_gaussian_score(sde, mean, covariance)(jnp.float32(x), t)
  denoised = sde.denoise(jnp.float32(x), t, score)
  for i in range(3):
    gain = (
      alpha[i] * covariance @ np.linalg.inv(alpha[i] ** 2 * covariance + sigma[i] ** 2 * np.eye(2))
    )
    expected = mean + gain @ (x[i] - alpha[i] * mean)
    np.testing.assert_allclose(denoised[i], expected, rtol=2e-3, atol=2e-3)


def test_a_registry_reads_fields_of_dataclasses_modules_and_functions():
  registry = Registry('thing', keys={'N': 'num_scales'})

  @registry.register(name='Data')
  @dataclasses.dataclass(frozen=True)
  class Data:
    size: int
    N: int = 3

  @registry.register
  class Network(nn.Module):
    width: int = 8

  @registry.register(name='function')
  def function(config, *, path='here', depth):
    return config, path, depth

  assert registry.fields('data') == {'size': None, 'num_scales': 3}
  assert registry.fields('NETWORK') == {'width': 8}
  assert registry.fields('function') == {'path': 'here', 'depth': None}
  assert registry.all_fields() == {'size', 'num_scales', 'width', 'path', 'depth'}
  settings = {'size': 5, 'num_scales': 7, 'depth': 2, 'other': 1}
  assert registry.build('data', settings) == Data(5, N=7)
  assert registry.build('network', settings).width == 8
  assert registry.build('function', settings, 'config') == ('config', 'here', 2)


@pytest.mark.parametrize('optimizer', ['Adam', 'AdamW'])
def test_weight_decay_leaves_fourier_frequencies_and_moves_kernels(optimizer):
  config = mnist_ddpmpp_continuous.get_config()
  config.optim.update({'optimizer': optimizer, 'weight_decay': 0.5, 'lr': 0.1, 'warmup': 0})
  params = {
    'GaussianFourierProjection_0': {'W': jnp.ones(3)},
    'NIN_0': {'W': jnp.ones((3, 3)), 'b': jnp.ones(3)},
  }
  optimizer = train_state.get_optimizer(config)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  stepped = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(stepped['GaussianFourierProjection_0']['W'], 1)
  np.testing.assert_allclose(stepped['NIN_0']['W'], 1 - 0.1 * 0.5, rtol=1e-6)


def test_settings_of_another_method_are_named_only_where_nothing_else_differs():
  both = configuration.differences({'a': 1, 'b': 2}, {'a': 3, 'c': 4})
  assert both == 'a (was 1, is 3)'
  one = configuration.differences({'a': 1, 'b': 2}, {'a': 1, 'c': 4})
  assert one == 'b (was 2, is None), c (was None, is 4)'
  assert configuration.differences({'a': 1}, {'a': 2}, lambda name: name != 'a') == ''
