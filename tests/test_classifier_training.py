"""Training of the noise-conditional classifier, its file, and its gradient under every SDE."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datasets
import run_lib
import sde_lib
from models import classifier, utils
from modes import train_classifier as training
from modes.preparation import prepare
from runtime.errors import UserError
from runtime.workdir import check_run
from tests import golden_values as golden
from tests import processes, tiny_config
from tests.tiny_config import TinyClassifier

SDES = [sde_lib.VESDE(N=10), sde_lib.VPSDE(N=30), sde_lib.subVPSDE(N=30)]
CENTERED = [False, True]

pytestmark = pytest.mark.usefixtures('quickly_compiled')


@datasets.register_dataset(name='HALVES')
def halves(config, split, *, num_labels=2):
  """Images that are bright above (label 0) or below (label 1)."""
  rng = np.random.RandomState(split == 'test')
  count, size = 64, config.data.image_size
  labels = np.arange(count) % 2
  images = rng.randint(0, 100, (count, size, size, 1)).astype(np.uint8)
  rows = np.arange(size)[None, :, None, None] // (size // 2) == labels[:, None, None, None]
  return datasets.ArraySource(images + np.uint8(100) * rows, labels % num_labels)


def small_config():
  config = tiny_config.get_config()
  with config.unlocked():
    config.data.num_labels = 2
    config.classifier.width = 6
  config.data.dataset = 'HALVES'
  config.data.image_size = 8
  config.model.num_scales = 30
  config.training.eval_freq = 10
  section = config.classifier
  section.name = 'tiny'
  section.num_classes = 2
  section.batch_size = 16
  section.n_iters = 20
  section.lr = 1e-2
  section.warmup = 2
  section.ema_rate = 0.5
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('classifier')
  run_lib.train_classifier(small_config(), workdir)
  return workdir


def test_classifier_learns_two_classes_and_its_file_says_how_well(trained):
  loaded = classifier.load_classifier(trained / training.FILE)
  assert loaded.info['step'] == 20
  assert loaded.info['accuracy']['0.0'] > 0.95
  assert loaded.info['accuracy']['3.0'] < 0.95  # hardly anything is left to see
  config = small_config()
  source = datasets.get_source(config, 'test')
  images = source.images / np.float32(255)
  correct = np.argmax(loaded.logits(images, jnp.zeros(len(images))), axis=-1) == source.labels
  assert correct.mean() == loaded.info['accuracy']['0.0']


@pytest.mark.slow
def test_continued_training_ends_in_the_same_bits(trained, tmp_path):
  config = small_config()
  config.classifier.n_iters = 13
  run_lib.train_classifier(config, tmp_path)
  part = (tmp_path / training.FILE).read_bytes()
  run_lib.train_classifier(small_config(), tmp_path)
  whole = (tmp_path / training.FILE).read_bytes()
  assert part != whole
  assert whole == (trained / training.FILE).read_bytes()
  assert processes.history(tmp_path) == processes.history(trained)
  names = {name for _, name in processes.history(tmp_path)}
  assert names == {
    'training_loss',
    'gradient_norm',
    'learning_rate',
    'eval_loss',
    'eval_accuracy',
  }


@pytest.mark.slow
def test_killed_run_ends_in_the_same_file(tmp_path):
  overrides = ['name=tiny', 'n_iters=60', 'batch_size=16']
  overrides = [f'--config.classifier.{override}' for override in overrides]
  run = lambda workdir: processes.start(workdir, *overrides, mode='train_classifier', devices=2)
  processes.finish(run(tmp_path / 'whole'))
  process = run(tmp_path / 'killed')
  metrics = tmp_path / 'killed' / 'metrics.jsonl'
  processes.wait_for(lambda: metrics.exists() and '"step": 12' in metrics.read_text(), process)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  output = processes.finish(run(tmp_path / 'killed'))
  assert 'Resuming from' in output
  files = [(tmp_path / name / training.FILE).read_bytes() for name in ('whole', 'killed')]
  assert files[0] == files[1]
  assert processes.history(tmp_path / 'killed') == processes.history(tmp_path / 'whole')


@pytest.mark.parametrize('centered', CENTERED)
def test_training_noise_is_uniform_in_the_logarithm_and_added_to_images_of_the_unit_range(centered):
  seen = {}

  class Recorder:
    def apply(self, variables, images, sigmas):
      del variables
      seen.update(images=images, sigmas=sigmas)
      return jnp.zeros((len(images), 2))

  config = small_config()
  config.data.centered = centered
  config = training._own_config(prepare(config))
  dataset, _, source = datasets.get_dataset(config)
  loss_fn = training._loss_fn(config, Recorder(), dataset.preprocess)
  images, labels = np.tile(source.images, (16, 1, 1, 1)), np.tile(source.labels, 16)
  loss, accuracy = loss_fn({}, jax.random.PRNGKey(0), {'image': images, 'label': labels})
  np.testing.assert_allclose([loss, accuracy], [np.log(2), 0.5], rtol=1e-6)

  position = np.log(seen['sigmas'] / 0.01) / np.log(80 / 0.01)
  uniform = (np.arange(1024) + 0.5) / 1024
  assert np.abs(np.sort(position) - uniform).max() < 1.63 / 32  # Kolmogorov and Smirnov at 1 %
  z = (seen['images'] - images / 255) / np.asarray(seen['sigmas'])[:, None, None, None]
  deviation = z.std(axis=(1, 2, 3))
  assert z.std() == pytest.approx(1, abs=0.01)  # 65,536 draws: a deviation of 0.003
  assert np.abs(deviation - 1).max() < 0.5  # 64 draws each: five deviations of 0.09
  assert abs(z.mean()) < 0.02


def mixture():
  """Means (3, H, W, C) and deviation of three Gaussian classes of images in [0, 1]."""
  return jax.random.uniform(jax.random.PRNGKey(0), (3, 4, 4, 1)), 0.2


def mixture_logits(y, sigma):
  """The logits of the mixture with noise: what a perfect classifier would have."""
  means, deviation = mixture()
  squares = jnp.sum((y[:, None] - means) ** 2, axis=(2, 3, 4))
  return -squares / (2 * (deviation**2 + sigma[:, None] ** 2))


@pytest.mark.parametrize('centered', CENTERED)
@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
def test_gradient_is_that_of_the_posterior_of_a_gaussian_mixture(sde, centered):
  """p(x_t | y) = N(alpha scaler(m_y), (alpha slope s)^2 + sigma^2), in double precision."""
  config = tiny_config.get_config()
  config.data.centered = centered
  scaler = datasets.get_data_scaler(config)
  inverse_scaler = datasets.get_data_inverse_scaler(config)
  t = jnp.asarray([1e-3, 0.1, 0.3, 0.6, 1.0])
  labels = jnp.asarray([0, 1, 2, 0, 1])
  images, deviation = mixture()
  mean, sigma = sde.marginal_prob(scaler(images[(labels + 1) % 3]), t)
  x = mean + sde_lib.batch_mul(sigma, jax.random.normal(jax.random.PRNGKey(1), mean.shape))
  score = jax.jit(classifier.classifier_score(sde, mixture_logits, inverse_scaler))(x, t, labels)

  alpha = np.asarray(sde.marginal_prob(jnp.ones(5), t)[0], np.float64)
  slope = 2.0 if centered else 1.0
  variance = (alpha * slope * deviation) ** 2 + np.asarray(sigma, np.float64) ** 2
  centers = alpha[:, None, None, None, None] * np.asarray(scaler(images), np.float64)
  offsets = centers - np.asarray(x, np.float64)[:, None]
  grads = offsets / variance[:, None, None, None, None]  # of log p(x_t | y)
  logits = -np.sum(offsets**2, axis=(2, 3, 4)) / (2 * variance[:, None])
  posterior = np.exp(logits - logits.max(axis=1, keepdims=True))
  posterior /= posterior.sum(axis=1, keepdims=True)
  expected = grads[np.arange(5), labels] - np.einsum('bk,bkhwc->bhwc', posterior, grads)
  for i in range(5):
    # Rounding of x_t / alpha_t in single precision, times the gradient's own slope.
    golden.assert_close(score[i], expected[i], 1e-4)


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
def test_gradient_is_that_of_the_network_in_x_t(sde):
  module, params = utils.create_classifier(
    jax.random.PRNGKey(0), 1, name='tiny', image_shape=(8, 8, 1), num_classes=3
  )
  info = classifier.NoiseConditionalClassifier(module, params, 0.01, 20.0, (8, 8, 1))
  inverse_scaler = lambda x: (x + 1.0) / 2.0
  t, labels = jnp.asarray([0.01, 0.4, 1.0]), jnp.asarray([0, 1, 2])

  def log_p(x):
    alpha, sigma = sde.marginal_prob(jnp.ones(3), t)
    alpha_image = alpha[:, None, None, None]
    level = jnp.clip(sigma / alpha / 2, 0.01, 20.0)
    logits = module.apply({'params': params}, (x / alpha_image + 1) / 2, level, train=False)
    return jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(3), labels])

  _, sigma = sde.marginal_prob(jnp.ones(3), t)
  x = sde_lib.batch_mul(1 + sigma, jax.random.normal(jax.random.PRNGKey(1), (3, 8, 8, 1)))
  score = jax.jit(classifier.classifier_score(sde, info.logits, inverse_scaler))(x, t, labels)
  expected = jax.jit(jax.grad(log_p))(x)
  for i in range(3):
    golden.assert_close(score[i], expected[i], 1e-4)


def test_features_are_what_the_last_layer_sees_and_noise_levels_are_clamped(trained):
  loaded = classifier.load_classifier(trained / training.FILE)
  x = jax.random.uniform(jax.random.PRNGKey(0), (3, 8, 8, 1))
  last = loaded.params['Dense_0']
  sigmas = jnp.asarray([0.02, 1.0, 50.0])
  features = loaded.features(x, sigmas)
  assert features.shape == (3, 96)
  logits = features @ last['kernel'] + last['bias']
  np.testing.assert_allclose(logits, loaded.logits(x, sigmas), rtol=1e-5, atol=1e-5)
  beyond = loaded.logits(x, jnp.asarray([0.0, 1.0, 1e4]))
  at_ends = loaded.logits(x, jnp.asarray([0.01, 1.0, 80.0]))
  np.testing.assert_array_equal(beyond, at_ends)
  assert np.abs(at_ends - loaded.logits(x, sigmas))[0].max() > 1e-4


def test_file_brings_its_own_fields_and_wrong_files_are_refused(trained, tmp_path):
  path = trained / training.FILE
  key = jax.random.PRNGKey(3)
  module, params = utils.create_classifier(key, 2, path)
  assert module == TinyClassifier(num_classes=2, width=6)
  loaded = classifier.load_classifier(path)
  jax.tree.map(np.testing.assert_array_equal, params, loaded.params)
  with pytest.raises(UserError, match=r"not {'num_classes': 10}: create it with the fields"):
    utils.create_classifier(key, 2, path, num_classes=10)
  with pytest.raises(UserError, match='names no file'):
    classifier.load_classifier('')
  with pytest.raises(UserError, match='is not a classifier'):
    classifier.load_classifier(tmp_path / 'nowhere')
  broken = tmp_path / training.FILE
  broken.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match='is not a classifier'):
    classifier.load_classifier(broken)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(trained, tmp_path):
  workdir = tmp_path / 'run'
  config = small_config()
  config.data.num_labels = 1
  with pytest.raises(UserError, match='All labels in the first batch of HALVES are 0'):
    run_lib.train_classifier(config, workdir)
  config = small_config()
  config.data.dataset = 'MNIST5K'
  del config.data.num_labels
  config.data.image_size = 28
  with pytest.raises(UserError, match=r'has the label \d, but classifier.num_classes=2'):
    run_lib.train_classifier(config, workdir)
  config = small_config()
  config.classifier.name = 'wideresnet_noise_conditional'
  del config.classifier.width
  config.data.image_size = 10
  with pytest.raises(UserError, match='cannot halve images of 10x10 pixels twice'):
    run_lib.train_classifier(config, workdir)
  assert not workdir.exists()

  config = small_config()
  config.classifier.lr = 1e-4
  with pytest.raises(UserError, match=r'another configuration: classifier.lr \(was 0.01'):
    run_lib.train_classifier(config, trained)
  with pytest.raises(UserError, match='holds a run of a classifier, not of a score network'):
    check_run(prepare(small_config()), trained)


def test_digit_classifier_that_comes_with_the_repository_has_its_recorded_accuracy():
  path = datasets.ASSETS / 'mnist5k_classifier.safetensors'
  assert path.stat().st_size < 2**20
  loaded = classifier.load_classifier(path)
  source = datasets.get_source(tiny_config.get_config(), 'test')
  logits_fn = jax.jit(loaded.logits)
  logits = logits_fn(jnp.asarray(source.images / np.float32(255)), jnp.zeros(500))
  correct = np.argmax(logits, axis=-1) == source.labels
  assert correct.mean() == pytest.approx(loaded.info['accuracy']['0.0'], abs=0.002)  # one digit
  assert correct.mean() >= 0.97
  assert json.dumps(loaded.info)  # plain numbers and names
