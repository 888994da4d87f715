"""Running samplers: chunks, watching, keys per image, devices, and `--mode=sample`."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import controllable_generation as control
import datasets
import run_lib
import sampling
import sde_lib
from configs.default_cifar10_configs import get_default_configs
from modes.preparation import prepare
from runtime.errors import UserError
from tests import tiny_config
from tests.exact_scores import ConvolutionalGaussianNetwork
from train_state import State

pytestmark = pytest.mark.usefixtures('quickly_compiled')

METHODS = {
  'pc': {'predictor': 'reverse_diffusion', 'corrector': 'langevin'},
  'ode': {'rtol': 1e-6, 'atol': 1e-6},
  'ddim': {'n_steps': 6, 'eta': 0.5},
  'heun': {'n_steps': 6, 'churn': 2.0},
  'dpm_solver++': {'n_steps': 6, 'eta': 1.0},
}
SHAPE = (8, 4, 4, 1)


NETWORK = ConvolutionalGaussianNetwork(sde_lib.VPSDE())


@functools.cache
def sampler_of(method, steps_per_call=1):
  """Compiled once for all tests."""
  config = tiny_config.get_config()
  config.model.num_scales = 30
  config.sampling.method = method
  config.sampling.update(METHODS[method])
  sde = sde_lib.get_sde(config)
  config = prepare(config)
  method = sampling.get_sampler(config, sde)
  return sampling.compile_sampler(
    method, sde, NETWORK, shape=SHAPE, inverse_scaler=lambda x: x, steps_per_call=steps_per_call
  )


@pytest.fixture(scope='module')
def state():
  params = NETWORK.init(jax.random.PRNGKey(0), jnp.zeros(SHAPE), jnp.zeros(8))['params']
  return State(0, params, params, None, {})


@pytest.mark.parametrize(
  'method', ['pc', *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != 'pc')]
)
def test_steps_in_one_call_or_many_give_the_same_samples(method, state):
  rng = jax.random.PRNGKey(1)
  one, nfe = sampler_of(method)(rng, state)
  many, nfe_many = sampler_of(method, steps_per_call=4)(rng, state)
  np.testing.assert_allclose(many, one, atol=1e-5)
  assert nfe == nfe_many
  if method == 'pc':
    np.testing.assert_allclose(one.std(), 0.3, rtol=0.5)


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_with_a_key_per_image_an_image_does_not_depend_on_its_batch(method, state):
  keys = jax.random.split(jax.random.PRNGKey(2), 8)
  sampler = sampler_of(method)
  x, _ = sampler(keys, state)
  assert x.shape == SHAPE
  np.testing.assert_allclose(sampler(keys[4:6], state)[0], x[4:6], atol=1e-5)
  # Conditions go with their images.
  images = jax.random.normal(jax.random.PRNGKey(3), SHAPE)
  mask = jnp.ones((1, 4, 4, 1)).at[:, 2:].set(0)
  inpainting = lambda i: control.inpainting(sde_lib.VPSDE(), images[i], mask)
  x, _ = sampler(keys, state, condition=inpainting(slice(0, 8)))
  y, _ = sampler(keys[4:6], state, condition=inpainting(slice(4, 6)))
  np.testing.assert_allclose(y, x[4:6], atol=1e-5)
  np.testing.assert_array_equal(x[:, :2], images[:, :2])


def test_a_sampler_is_watched_with_its_state_and_stopped_from_there(state):
  sampler = sampler_of('pc', steps_per_call=4)
  seen = []
  x, nfe = sampler(jax.random.PRNGKey(1), state, callback=lambda *args: seen.append(args))
  assert [done for done, _, _ in seen] == [4, 8, 12, 16, 20, 24, 28, 30]
  assert nfe == 60
  deviations = [float(x().std()) for _, _, x in seen[-1:]]
  np.testing.assert_allclose(deviations, x.std(), rtol=0.2)

  def stop(done, total, x):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    sampler(jax.random.PRNGKey(1), state, callback=stop)


def draws():
  """A line of numbers for each sampler, with one key and with a key per image."""
  params = NETWORK.init(jax.random.PRNGKey(0), jnp.zeros(SHAPE), jnp.zeros(8))['params']
  state = State(0, params, params, None, {})
  keys = jax.random.split(jax.random.PRNGKey(2), 8)
  samples = [sampler_of(m)(rng, state)[0] for m in METHODS for rng in (keys[0], keys)]
  return np.stack([np.asarray(x).ravel() for x in samples])


@pytest.mark.slow
def test_samples_are_the_same_on_one_and_eight_devices(tmp_path):
  flags = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
  }
  code = (
    'import sys, jax, numpy as np\n'
    'from tests.test_sample_mode import draws\n'
    'assert jax.device_count() == 8\n'
    'np.save(sys.argv[1], draws())\n'
  )
  path = tmp_path / 'eight.npy'
  subprocess.run([sys.executable, '-c', code, str(path)], env=os.environ | flags, check=True)
  assert jax.device_count() == 1
  one = draws()
  assert one.shape == (2 * len(METHODS), 128)
  np.testing.assert_allclose(np.load(path), one, atol=2e-5)


@pytest.mark.parametrize(
  'sde',
  ['vpsde', *(pytest.param(sde, marks=pytest.mark.slow) for sde in ('subvpsde', 'vesde'))],
)
@pytest.mark.parametrize(
  'task',
  [
    'inpaint',
    *(pytest.param(t, marks=pytest.mark.slow) for t in ('unconditional', 'colorize', 'superres')),
  ],
)
def test_every_combination_of_sde_and_solvers_and_task_is_traced_or_refused(sde, task):
  """Tracing is what stands before compilation: what passes it runs."""
  config = tiny_config.get_config()
  config.data.num_channels = 3
  config.data.image_size = 8
  config.training.sde = sde
  config.model.num_scales = 30
  config.sampling.task = task
  settings = [{'method': method} for method in METHODS if method != 'pc']
  for predictor in ('euler_maruyama', 'reverse_diffusion', 'ancestral_sampling', 'none'):
    for corrector in ('langevin', 'ald', 'none'):
      for flow in (False, True):
        settings.append({'predictor': predictor, 'corrector': corrector, 'probability_flow': flow})
  sde = sde_lib.get_sde(config)
  refused = []
  for setting in settings:
    candidate = config.copy_and_resolve_references()
    candidate.sampling.update(setting)
    candidate = merge_defaults(candidate)
    sampling_task = control.get_task(candidate, sde, lambda x: x)
    condition = sampling_task.condition(jnp.zeros((2, 8, 8, 3)), jnp.zeros(2, int))
    try:
      sampling.check(candidate, sde, condition)
    except UserError as error:
      refused.append(str(error))
  # Ancestral sampling has no probability flow, with any corrector; 'none' and 'none' do nothing.
  reasons = ['ancestral_sampling has no probability flow'] * 3 + ['never evaluate the network'] * 2
  assert len(refused) == len(reasons)
  for reason in set(reasons):
    assert sum(reason in message for message in refused) == reasons.count(reason)


def merge_defaults(config):
  complete = get_default_configs()
  with complete.unlocked():
    for section, values in config.items():
      if hasattr(values, 'items'):
        complete[section].update(values)
  return complete


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run of the tiny network, 10 steps old."""
  workdir = tmp_path_factory.mktemp('run')
  config = tiny_config.get_config()
  config.training.n_iters = 10
  config.training.snapshot_sampling = False
  run_lib.train(config, str(workdir))
  return workdir


def sample(workdir, **overrides):
  config = tiny_config.get_config()
  config.sampling.num_samples = 6
  config.sampling.batch_size = 4
  config.sampling.update(overrides)
  run_lib.sample(config, str(workdir))
  (directory,) = (workdir / 'samples').glob(
    f'{config.sampling.task}_{config.sampling.method}_step_10_seed_*'
  )
  return directory


def test_sample_mode_writes_what_was_given_the_results_and_a_report(trained):
  directory = sample(trained, task='inpaint', trajectory_every=2)
  config = prepare(tiny_config.get_config())
  source = datasets.get_source(config, 'test')
  with np.load(directory / 'samples_1.npz') as file:
    assert file['samples'].shape == (2, 28, 28, 1)  # of six in rounds of four
    fifth = source[np.random.RandomState(config.seed).permutation(len(source))[4]]
    np.testing.assert_array_equal(file['originals'][0], fifth['image'])
    np.testing.assert_array_equal(file['labels'][0], fifth['label'])
    left = np.s_[:, :, :14]
    np.testing.assert_array_equal(file['given'][left], file['originals'][left])
    assert not file['given'][:, :, 14:].any()
    np.testing.assert_array_equal(file['samples'][left], file['originals'][left])
  report = json.loads((directory / 'report_1.json').read_text())
  assert report['nfe'] == 5
  assert report['task'] == 'inpaint'
  assert report['seconds'] > 0
  grid = Image.open(directory / 'grid.png')
  assert grid.size == (3 * 30 + 2, 6 * 30 + 2)
  assert Image.open(directory / 'trajectory.gif').n_frames == 3


def test_sample_mode_goes_on_where_it_was_killed(trained):
  directory = sample(trained, method='ddim', n_steps=4)
  before = {path.name: path.read_bytes() for path in directory.iterdir()}
  with np.load(directory / 'samples_1.npz') as file:
    expected = file['samples']
  (directory / 'report_1.json').unlink()
  (directory / 'samples_1.npz').write_bytes(b'half a file')
  sample(trained, method='ddim', n_steps=4)
  with np.load(directory / 'samples_1.npz') as file:
    np.testing.assert_array_equal(file['samples'], expected)
  for name in ('samples_0.npz', 'report_0.json', 'grid.png'):
    assert (directory / name).read_bytes() == before[name]


@pytest.mark.slow
def test_samples_with_seeds_per_image_do_not_depend_on_the_batch_size(trained):
  images = []
  for batch_size in (2, 3):
    directory = sample(
      trained, method='heun', n_steps=3, per_image_seeds=True, batch_size=batch_size
    )
    rounds = sorted(directory.glob('samples_*.npz'))
    images.append(np.concatenate([np.load(path)['samples'] for path in rounds]))
    for path in directory.iterdir():
      path.unlink()
  np.testing.assert_allclose(images[0].astype(int), images[1].astype(int), atol=1)


def test_samples_of_other_settings_are_not_mixed_in(trained):
  sample(trained, method='dpm_solver++', n_steps=3)
  with pytest.raises(UserError, match=r'other settings: sampling.n_steps \(was 3, is 4\)'):
    sample(trained, method='dpm_solver++', n_steps=4)


def test_a_negative_number_of_steps_between_frames_is_refused(trained):
  with pytest.raises(UserError, match='sampling.trajectory_every=-1 must not be negative'):
    sample(trained, trajectory_every=-1)


def test_sampling_without_a_checkpoint_is_refused(tmp_path):
  with pytest.raises(UserError, match='holds no checkpoint: train there first'):
    sample(tmp_path)


def test_a_damaged_round_is_drawn_again(trained):
  directory = sample(trained, method='heun', n_steps=3)
  path = directory / 'samples_0.npz'
  expected = path.read_bytes()
  for content in (
    expected[: len(expected) // 2]
    + bytes([expected[len(expected) // 2] ^ 1])
    + expected[len(expected) // 2 + 1 :],
    (trained / 'checkpoints').name.encode(),
  ):
    path.write_bytes(content)
    sample(trained, method='heun', n_steps=3)
    assert path.read_bytes() == expected
  np.savez(path, others=np.zeros(3))
  sample(trained, method='heun', n_steps=3)
  assert path.read_bytes() == expected
