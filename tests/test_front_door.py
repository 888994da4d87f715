"""The front door: what `score_sde.load` opens, against the functions behind it."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import likelihood
import run_lib
import sampling
import score_sde
import sde_lib
from configs.vp import mnist_ddpmpp_continuous
from models import utils as mutils
from runtime.errors import UserError
from runtime.files import REPOSITORY
from runtime.reporting import to_uint8
from runtime.rng import stream
from tests import tiny_config
from tests.exact_scores import ConvolutionalGaussianNetwork
from train_state import State

pytestmark = pytest.mark.usefixtures('quickly_compiled')

CONFIG = str(REPOSITORY / 'tests' / 'tiny_config.py')
CLASSIFIER = 'assets/mnist5k_classifier.safetensors'


def tiny(**sampling_settings):
  config = tiny_config.get_config()
  config.training.n_iters = 10
  config.training.snapshot_sampling = False
  config.sampling.update(sampling_settings)
  return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of the tiny network, 10 steps old."""
  directory = tmp_path_factory.mktemp('door') / 'run'
  run_lib.train(tiny(), directory)
  return directory


@pytest.fixture(scope='module')
def export(workdir):
  return run_lib.export_checkpoint(tiny(), workdir)


@pytest.fixture(scope='module')
def trained(workdir):
  return score_sde.load(workdir)


@pytest.fixture(scope='module')
def gaussian():
  """A model whose score is exact: pixels are correlated Gaussians."""
  config = score_sde.load_config(CONFIG)
  config.data.image_size = 4
  network = ConvolutionalGaussianNetwork(sde_lib.VPSDE())
  params = network.init(jax.random.PRNGKey(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))['params']
  state = State(np.int32(7), None, params, None, {})
  return score_sde.TrainedModel(config, network, state)


def grey_levels(count=3, size=28):
  return np.random.RandomState(0).randint(0, 256, (count, size, size, 1), np.uint8)


def floats(count=3, size=28):
  return np.random.RandomState(1).rand(count, size, size, 1).astype(np.float32)


def compilations(capfd_or_caplog):
  return [r for r in capfd_or_caplog.messages if r.startswith('Finished XLA compilation')]


def test_a_run_an_export_and_a_published_file_are_the_same_model(workdir, export, trained):
  assert trained.step == 10
  assert trained.image_shape == (28, 28, 1)
  assert trained.config.model.name == 'tiny'
  numbered = score_sde.load(workdir, checkpoint_number=1)
  exported = score_sde.load(str(export))
  given = score_sde.load(export, config=CONFIG)
  expected = jax.tree.leaves(trained.state.params_ema)
  for other in (numbered, exported, given):
    for leaf, same in zip(jax.tree.leaves(other.state.params_ema), expected, strict=True):
      np.testing.assert_array_equal(leaf, same)
  assert exported.config.to_dict() == trained.config.to_dict()


def test_samples_are_those_of_sample_mode(workdir, trained):
  config = tiny(num_samples=6, batch_size=4, method='ddim', n_steps=3)
  config.seed = 5
  run_lib.sample(config, workdir)
  (directory,) = (workdir / 'samples').glob('unconditional_ddim_*_seed_5')
  rounds = [np.load(directory / f'samples_{i}.npz')['samples'] for i in (0, 1)]
  images, nfe = trained.sample(6, seed=5, method='ddim', n_steps=3, batch_size=4)
  assert nfe == 3
  assert images.dtype == np.float32
  np.testing.assert_array_equal(to_uint8(images), np.concatenate(rounds))


def test_samples_are_those_of_the_2021_functions(trained):
  config, sde, model = trained.config, trained.sde, trained.model
  shape = (2, *trained.image_shape)
  draw = sampling.get_sampling_fn(config, sde, model, shape, trained.inverse_scaler)
  rng = jax.random.fold_in(stream(0, 'sample_mode'), 0)
  expected, _ = draw(rng, trained.state)
  images, _ = trained.sample(2)
  np.testing.assert_array_equal(images, np.clip(expected, 0, 1))


def test_bits_and_scores_are_those_of_the_2021_functions(gaussian):
  config, sde, model, state = gaussian.config, gaussian.sde, gaussian.model, gaussian.state
  likelihood_fn = likelihood.from_config(config, sde, model, inverse_scaler=gaussian.inverse_scaler)
  rng = jax.random.fold_in(stream(3, 'bpd'), 0)
  expected, _, _ = likelihood_fn(rng, state, grey_levels(size=4))
  np.testing.assert_array_equal(gaussian.bits_per_dim(grey_levels(size=4), seed=3), expected)
  expected, _, _ = likelihood_fn(rng, state, gaussian.scaler(floats(size=4)))
  np.testing.assert_array_equal(gaussian.bits_per_dim(floats(size=4), seed=3), expected)

  x, t = 2 * floats(size=4) - 1, np.asarray([0.1, 0.5, 1.0], np.float32)
  score_fn = mutils.get_score_fn(sde, model, state.params_ema, {}, continuous=True)
  np.testing.assert_allclose(gaussian.score_fn(x, t), score_fn(x, t), rtol=1e-4, atol=1e-5)


def test_images_in_several_batches_are_those_of_one(gaussian):
  images = floats(5, 4)
  settings = {'rtol': 1e-5, 'atol': 1e-5}
  whole = gaussian.encode(images, **settings)
  config = gaussian.config.copy_and_resolve_references()
  config.sampling.batch_size = 2
  parts = score_sde.TrainedModel(config, gaussian.model, gaussian.state).encode(images, **settings)
  np.testing.assert_allclose(parts, whole, atol=2e-3)


def test_decoding_inverts_encoding(gaussian):
  settings = {'rtol': 1e-5, 'atol': 1e-5, 'eps': 1e-3}
  images = 0.25 + floats(3, 4) / 2
  z = gaussian.encode(images, **settings)
  np.testing.assert_allclose(gaussian.decode(z, **settings), images, atol=1e-3)
  levels = np.uint8(images * 255)
  spread = gaussian.decode(gaussian.encode(levels, seed=1, **settings), **settings)
  assert (spread * 256 - levels > -0.3).all()
  assert (spread * 256 - levels < 1.3).all()
  assert (spread * 256 - levels).std() > 0.2  # uniform: 0.29


def test_known_pixels_of_an_inpainted_image_come_back(trained):
  images, nfe = trained.sample(images=floats(), task='inpaint', mask='right')
  assert nfe == 5
  np.testing.assert_allclose(images[:, :, :14], floats()[:, :, :14], atol=1e-6)
  assert np.abs(images[:, :, 14:] - floats()[:, :, 14:]).mean() > 0.1
  levels, _ = trained.sample(images=grey_levels(), task='inpaint', mask='right')
  np.testing.assert_array_equal(to_uint8(levels[:, :, :14]), grey_levels()[:, :, :14])


@pytest.mark.slow
def test_a_classifier_of_the_repository_guides_from_any_folder(trained, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  settings = {'task': 'class', 'classifier': CLASSIFIER, 'method': 'ddim', 'n_steps': 2}
  three, _ = trained.sample(2, label=3, **settings)
  eight, _ = trained.sample(2, label=8, **settings)
  assert np.abs(three - eight).max() > 1e-3


def test_a_second_call_compiles_nothing(gaussian, caplog):
  images, z = floats(size=4), floats(size=4)
  calls = [
    lambda seed: gaussian.sample(3, seed=seed, method='ddim', n_steps=2),
    lambda seed: gaussian.sample(images=images, seed=seed, task='inpaint'),
    lambda seed: gaussian.bits_per_dim(images, seed=seed),
    lambda seed: gaussian.encode(images, seed=seed),
    lambda seed: gaussian.decode(z),
    lambda seed: gaussian.score_fn(z, np.full(3, 0.5)),
  ]
  for call in calls:
    call(0)
  with jax.log_compiles(True), caplog.at_level('WARNING'):
    for call in calls:
      call(1)
    assert compilations(caplog) == []
    gaussian.sample(2, method='ddim', n_steps=2)
  assert compilations(caplog)


def test_it_opens_on_fewer_devices_than_it_was_trained_on(export, tmp_path):
  arrays = safetensors.numpy.load_file(export)
  with safetensors.safe_open(export, 'numpy') as file:
    metadata = file.metadata()
  metadata['config'] = metadata['config'].replace('"parallel.fsdp": 1', '"parallel.fsdp": 4096')
  path = tmp_path / 'large.safetensors'
  path.write_bytes(safetensors.numpy.save(arrays, metadata))
  assert score_sde.load(path).step == 10


REFUSED = {
  'count': (lambda m: m.sample(), 'needs the number of images'),
  'none': (lambda m: m.sample(0), 'n=0 must be a whole number'),
  'half': (lambda m: m.sample(2.5), 'n=2.5 must be a whole number'),
  'other count': (
    lambda m: m.sample(2, images=floats(), task='inpaint'),
    'n=2, but there are 3 images',
  ),
  'keyword': (lambda m: m.sample(2, n_step=2), "'n_step': choose one of .*Did you mean n_steps"),
  'keyword of files': (lambda m: m.sample(2, num_samples=2), "'num_samples': choose one of atol"),
  'type': (lambda m: m.sample(2, n_steps='2'), "n_steps='2' is of type str"),
  'method': (lambda m: m.sample(2, method='euler'), "Unknown sampler 'euler': choose one of"),
  'value': (lambda m: m.sample(2, n_steps=-1), 'sampling.n_steps=-1 must be at least 1'),
  'batch': (lambda m: m.sample(2, batch_size=0), 'sampling.batch_size=0 must be at least 1'),
  'seed': (lambda m: m.sample(2, seed=-1), 'seed=-1 must be a whole number in'),
  'missing images': (lambda m: m.sample(2, task='inpaint'), "task='inpaint' is conditioned on"),
  'useless images': (lambda m: m.sample(images=floats()), "'unconditional' uses no images"),
  'no classifier': (lambda m: m.sample(2, task='class', classifier=''), 'names no file'),
  'grey levels': (lambda m: m.encode(255 * floats()), 'not in .0, 1.: divide by 255'),
  'range': (lambda m: m.encode(2 * floats() - 1), 'not in .0, 1.: map them with inverse_scaler'),
  'integers': (lambda m: m.encode(grey_levels().astype(int)), 'of type int64: pass uint8'),
  'one image': (lambda m: m.encode(floats()[0]), r'single image of 28x28x1.*images\[None\]'),
  'shape': (lambda m: m.encode(floats(3, 27)), r'shape \(3, 27, 27, 1\), but the network'),
  'ragged': (lambda m: m.encode([[0.0], [1.0, 2.0]]), 'images is no array'),
  'empty': (lambda m: m.encode(floats()[:0]), 'images has no images'),
  'nan': (lambda m: m.encode(np.where(floats() > 0.9, np.nan, floats())), 'NaN or infinite'),
  'discrete': (lambda m: m.bits_per_dim(grey_levels() / 255), 'multiples of 1/255: pass grey'),
  'probes': (lambda m: m.bits_per_dim(floats(), num_probes=0), 'num_probes=0 must be at least 1'),
  'start': (lambda m: m.encode(floats(), eps=1.0), r'eps=1.0 must be a time in \(0, 1'),
  'tolerance': (lambda m: m.encode(floats(), rtol=-1.0), 'rtol=-1.0 and atol=0.1 must not be neg'),
  'probe': (lambda m: m.bits_per_dim(floats(), hutchinson_type='x'), 'Unknown probe'),
  'solver': (lambda m: m.decode(floats(), ode_solver='x'), "'x'"),
  'latents': (lambda m: m.decode(grey_levels()), 'z is of type uint8'),
  'infinite latents': (lambda m: m.decode(floats() / 0.0), 'z has values that are NaN or inf'),
  'score': (lambda m: m.score_fn(floats(), 0.5), r't of shape \(\): pass x_t of shape \(B, 28'),
  'score at 0': (
    lambda m: m.score_fn(floats(), np.zeros(3)),
    r'value 0, but .* in \(0, 1\]',
  ),
  'score at 500': (lambda m: m.score_fn(floats(), np.full(3, 500)), 't has the value 500, but'),
  'score at nan': (lambda m: m.score_fn(floats(), np.array([1, 1, np.nan])), 'the value nan, but'),
  'score of levels': (
    lambda m: m.score_fn(grey_levels(), np.ones(3)),
    'x_t is of type uint8',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.filterwarnings('ignore:divide by zero')
def test_a_mistake_is_one_sentence(name, trained):
  call, message = REFUSED[name]
  with pytest.raises(UserError, match=message) as caught:
    call(trained)
  assert '\n' not in str(caught.value)


def test_paths_that_hold_no_model_are_refused(workdir, export, tmp_path):
  program = tmp_path / 'program.py'
  program.write_text('raise SystemExit(1)')
  for path, settings, message in [
    (tmp_path / 'absent', {}, 'absent does not exist: name the directory of a run or a file'),
    (tmp_path, {}, 'has no config.json'),
    (REPOSITORY / 'README.md', {}, 'does not record a configuration, as exports do'),
    (CLASSIFIER, {}, 'does not record a configuration, as exports do'),
    (REPOSITORY / 'README.md', {'config': CONFIG}, 'is of no known format'),
    (workdir, {'checkpoint_number': 9}, '9 is not in .*it has'),
    (export, {'checkpoint_number': 1}, 'is a file: leave it out'),
    (export, {'config': mnist_ddpmpp_continuous.get_config()}, 'model.name=tiny'),
    (export, {'config': 'absent.py'}, 'absent.py does not exist'),
    (export, {'config': str(REPOSITORY / 'losses.py')}, 'no function get_config'),
    (export, {'config': str(program)}, r'program.py exits \(1\): name a configuration file'),
  ]:
    with pytest.raises(UserError, match=message):
      score_sde.load(path, **settings)
  (tmp_path / 'config.json').write_text('{"training": {}, "data": {}, "model": {"nam": "tiny"}}')
  with pytest.raises(UserError, match=r"Unknown config.model key 'nam'.*Did you mean name"):
    score_sde.load(tmp_path)


def test_importing_configures_nothing_and_works_from_any_folder(tmp_path):
  script = (
    'import jax; before = dict(jax.config.values); import score_sde; '
    'assert dict(jax.config.values) == before; '
    'from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized(); '
    "print(score_sde.load_config('configs/vp/mnist_ddpmpp_continuous.py').model.name)"
  )
  path = os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')])
  result = subprocess.run(
    [sys.executable, '-c', script],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == 'ncsnpp'


def test_bits_per_dim_below_zero_come_with_a_warning(trained, monkeypatch, caplog):
  below_zero = lambda rng, state, x: (jnp.full(len(x), -0.5), x, 1)
  monkeypatch.setattr(likelihood, 'from_config', lambda *args, **kwargs: below_zero)
  bpd = trained.bits_per_dim(grey_levels(2), rtol=0.5)
  assert bpd.mean() == -0.5
  assert '-0.5 bits/dim cannot be: set likelihood.rtol and likelihood.atol lower.' in caplog.text


def test_a_setting_without_effect_is_refused(trained):
  with pytest.raises(UserError, match="^label has no effect with task='unconditional' and method="):
    trained.sample(1, label=3)
