"""What a sampling method reads of a configuration."""

import copy
import dataclasses

import jax
import pytest

import sampling
import sde_lib
from configs.vp import mnist_ddpmpp_continuous
from modes.preparation import prepare
from runtime import configuration
from runtime.settings import read_keys


@pytest.fixture
def config():
  return prepare(mnist_ddpmpp_continuous.get_config())


def sampling_keys(config):
  sde = sde_lib.get_sde(config)
  keys = read_keys(lambda config: sampling.check(config, sde), config)
  return {key.removeprefix('sampling.') for key in keys if key.startswith('sampling.')}


def test_each_sampling_method_reads_its_own_settings(config):
  expected = {
    'pc': 'predictor corrector n_steps snr n_steps_each probability_flow noise_removal',
    'ode': 'ode_solver rtol atol noise_removal',
    'ddim': 'n_steps time_grid rho eta churn noise_removal',
  }
  for config.sampling.method in expected:
    assert sampling_keys(config) == {'method', *expected[config.sampling.method].split()}


def test_what_a_registered_method_reads_while_it_samples_counts_too(config):
  @sampling.register_sampler(name='late')
  def late(config, sde, eps):
    return Late(config)

  @dataclasses.dataclass(frozen=True)
  class Late(sampling.Sampler):
    config: object
    n_steps = 1

    def init(self, score_fn, condition, rng, shape, z):
      return (jax.numpy.zeros(shape),)

    def step(self, score_fn, condition, i, carry):
      return (carry[0] * self.config.sampling.snr,)

    def result(self, score_fn, condition, carry):
      return carry[0] / self.config.sampling['rho']

  config.sampling.method = 'late'
  assert sampling_keys(config) == {'method', 'snr', 'rho'}


def test_every_way_of_reading_counts(config):
  def keys(read):
    return read_keys(read, config)

  assert keys(lambda c: None) == keys(lambda c: c.sampling) == ()
  assert keys(lambda c: (c.seed, c['data']['path'])) == ('data.path', 'seed')
  assert keys(lambda c: c.sampling.get('eta')) == ('sampling.eta',)
  assert keys(lambda c: c.sampling.get('mine', 3)) == ('sampling.mine',)
  assert keys(lambda c: 'mine' in c.sampling) == ('sampling.mine',)
  section = tuple(f'likelihood.{key}' for key in sorted(config.likelihood))
  for read in (
    lambda c: c.likelihood.to_dict(),
    lambda c: dict(**c.likelihood),
    lambda c: list(c.likelihood),
    lambda c: copy.deepcopy(c.likelihood),
  ):
    assert keys(read) == section
  assert set(keys(lambda c: c.to_dict())) == configuration.flatten(config).keys()


def test_values_are_those_of_the_configuration(config):
  def check(view):
    assert view.sampling.snr == config.sampling.snr
    assert view.sampling.get('mine', 3) == 3
    assert view.sampling.to_dict() == config.sampling.to_dict()
    assert copy.deepcopy(view) == config
    with pytest.raises(AttributeError):
      view.sampling.mine  # noqa: B018

  read_keys(check, config)
