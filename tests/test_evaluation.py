"""Extractors, statistics of data sets, and `sigma_max`."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import configuration
import datasets
import evaluation
import metrics
from errors import UserError
from tests import test_inception, tiny_config
from tests.golden_values import assert_close, load
from tests.test_import import write_pth


@pytest.fixture
def config(tmp_path):
  config = configuration.prepare(tiny_config.get_config())
  config.eval.stats_path = str(tmp_path / 'stats.npz')
  return config


@pytest.fixture
def extractor(config):
  return evaluation.get_extractor(config)


@pytest.fixture(scope='module')
def of_the_test_split(tmp_path_factory):
  """A file of statistics, 500 images."""
  config = configuration.prepare(tiny_config.get_config())
  config.eval.stats_split = 'test'
  config.eval.stats_path = str(tmp_path_factory.mktemp('stats') / 'stats.npz')
  return evaluation.write_stats(config)


@pytest.fixture
def test_split(config, of_the_test_split):
  """The configuration that goes with a copy of it."""
  config.eval.stats_split = 'test'
  shutil.copy(of_the_test_split, config.eval.stats_path)
  return config


def features_of(extractor, split):
  images = np.load(datasets.ASSETS / 'mnist5k.npz')[f'{split}_images']
  return extractor(images)['pool_3']


def test_features_do_not_depend_on_the_number_of_images_given(extractor):
  images = np.random.RandomState(0).randint(0, 256, (11, 28, 28, 1)).astype(np.uint8)
  whole, one = extractor(images), extractor(images[10:])
  assert whole['pool_3'].shape == (11, 8)
  assert whole['logits'].shape == (11, 4)
  np.testing.assert_allclose(whole['pool_3'][10:], one['pool_3'], rtol=1e-6)


def test_statistics_are_of_each_image_once_as_it_is(config, extractor):
  """4,500 images, which is no multiple of what the devices take at a time."""
  config.data.random_flip = True
  config.data.uniform_dequantization = True
  path = evaluation.write_stats(config)
  stats = evaluation.load_dataset_stats(config, extractor)
  features = np.float64(features_of(extractor, 'train'))
  assert stats.count == len(features) == 4500
  np.testing.assert_allclose(stats.pool_3, features, rtol=1e-6)
  np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-6)
  np.testing.assert_allclose(stats.covariance, np.cov(features.T), rtol=1e-5, atol=1e-9)
  assert stats.name == 'MNIST5K/train/4500'
  assert set(stats.floor) == {f'{name}_tiny_2250' for name in ('fid', 'kid', 'precision', 'recall')}
  # Its own keys are those of TTUR, and of the 2021 code.
  with np.load(path) as file:
    assert {'mu', 'sigma', 'pool_3'} <= set(file.files)


def test_numbers_name_their_extractor_and_count(test_split, extractor):
  stats = evaluation.load_dataset_stats(test_split, extractor)
  outputs = extractor(np.load(datasets.ASSETS / 'mnist5k.npz')['train_images'][:1000])
  numbers, warnings = evaluation.sample_metrics('tiny', stats, **outputs)
  assert set(numbers) == {
    f'{name}_tiny_1k' for name in ('fid', 'kid', 'inception_score', 'precision', 'recall')
  }
  assert not warnings
  few = {key: value[:8] for key, value in outputs.items()}
  numbers, warnings = evaluation.sample_metrics('tiny', stats, **few)
  assert np.isfinite(numbers['fid_tiny_8'])
  assert '8 samples are few for 8 features' in warnings[0]
  one = {key: value[:1] for key, value in outputs.items()}
  with pytest.raises(UserError, match='1 samples have no covariance'):
    evaluation.sample_metrics('tiny', stats, **one)


def test_the_statistics_score_zero_against_themselves(test_split, extractor):
  stats = evaluation.load_dataset_stats(test_split, extractor)
  logits = np.zeros((len(stats.pool_3), 2))
  numbers, _ = evaluation.sample_metrics('tiny', stats, stats.pool_3, logits)
  assert abs(numbers['fid_tiny_500']) <= 1e-6
  assert numbers['precision_tiny_500'] == numbers['recall_tiny_500'] == 1


@pytest.mark.parametrize('format', ['activations', 'TTUR', 'ADM'])
def test_statistics_of_other_programs_are_read(format, config, extractor):
  features = features_of(extractor, 'test')
  moments = metrics.moments(features)
  mu, sigma = moments.mean, moments.covariance()
  content = {
    'activations': {'pool_3': features},
    'TTUR': {'mu': mu, 'sigma': sigma},
    # The moments of all images; those in the file are a part of them.
    'ADM': {'mu': mu, 'sigma': sigma, 'mu_s': mu[:3], 'sigma_s': sigma[:3, :3], 'arr_0': mu},
  }[format]
  np.savez(config.eval.stats_path, **content)
  stats = evaluation.load_dataset_stats(config, extractor)
  np.testing.assert_allclose(stats.mean, mu, rtol=1e-9)
  np.testing.assert_allclose(stats.covariance, sigma, rtol=1e-9)
  numbers, warnings = evaluation.sample_metrics('tiny', stats, features, np.zeros((500, 2)))
  assert abs(numbers['fid_tiny_500']) <= 1e-6
  assert ('kid_tiny_500' in numbers) == (format == 'activations')
  assert 'does not say how it was made' in warnings[0]
  assert any('no KID' in warning for warning in warnings) == (format != 'activations')


def test_statistics_that_do_not_fit_are_refused(test_split, extractor, tmp_path):
  def refused(message, **changes):
    changed = dataclasses.replace(extractor, **changes)
    with pytest.raises(UserError, match=message):
      evaluation.load_dataset_stats(test_split, changed)

  refused("extractor .there 'tiny', here 'other'.", name='other')
  refused("scaling .there 'unit', here 'ttur'.", scaling='ttur')
  refused("fingerprint .there '0', here '1'.", fingerprint='1')
  whole = pathlib.Path(test_split.eval.stats_path).read_bytes()
  pathlib.Path(test_split.eval.stats_path).write_bytes(whole[: len(whole) // 2])
  refused('cannot be read')
  pathlib.Path(test_split.eval.stats_path).write_bytes(whole)
  test_split.data.image_size = 32
  refused('image_size .there 28, here 32.')
  np.savez(test_split.eval.stats_path, mu=np.zeros(3), sigma=np.eye(3))
  refused('number of features .there 3, here 8.')
  np.savez(test_split.eval.stats_path, features=np.zeros(3))
  refused('neither pool_3 nor mu and sigma')
  pathlib.Path(test_split.eval.stats_path).write_bytes(b'damaged')
  refused('cannot be read')
  test_split.eval.stats_path = str(tmp_path / 'missing.npz')
  refused('no statistics of the data at .*missing.npz: make them with --mode=stats')


def test_a_folder_that_cannot_be_written_is_refused_at_once(config, tmp_path):
  (tmp_path / 'file').write_text('')
  config.eval.stats_path = str(tmp_path / 'file' / 'stats.npz')
  with pytest.raises(UserError, match=r'nothing can be written to .*choose another folder'):
    evaluation.write_stats(config)


def test_missing_or_wrong_inception_weights_are_named(monkeypatch, tmp_path):
  monkeypatch.setenv('SCORE_SDE_INCEPTION', str(tmp_path / 'weights.pth'))
  with pytest.raises(UserError, match=r'not at .*weights.pth .*get https://.*6726825d.pth and'):
    evaluation.get_inception_model()
  (tmp_path / 'weights.pth').write_bytes(b'something else')
  with pytest.raises(UserError, match='is not the published file: its SHA-256 begins with'):
    evaluation.get_inception_model()


@pytest.mark.slow
def test_inception_features_come_from_the_file_of_pytorch(monkeypatch, tmp_path):
  recorded = load('inception')
  path = tmp_path / 'weights.pth'
  write_pth(path, test_inception.state_dict())
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  monkeypatch.setattr(evaluation, '_INCEPTION_SHA256', digest[:8])
  monkeypatch.setenv('SCORE_SDE_INCEPTION', str(path))
  ttur = evaluation.get_inception_model(scaling='ttur')
  assert (ttur.name, ttur.scaling, ttur.fingerprint) == ('inception_ttur', 'ttur', digest)
  outputs = ttur(recorded['images_32'])
  assert_close(outputs['pool_3'], recorded['2048_32'], 1e-3)
  assert_close(outputs['logits'], recorded['logits_unbiased_32'], 1e-3)

  paper = evaluation.get_inception_model(path)
  assert (paper.name, paper.scaling) == ('inception', 'tfgan')
  grey = recorded['images_32'][..., :1]
  features = paper(grey)['pool_3']
  np.testing.assert_allclose(features, paper(grey.repeat(3, -1))['pool_3'], rtol=1e-5, atol=1e-6)
  assert np.abs(features - ttur(grey)['pool_3']).max() > 1e-4


def test_the_classifier_of_the_digits_is_an_extractor_that_needs_no_download(config):
  config.eval.extractor = 'mnist5k'
  extractor = evaluation.get_extractor(config)
  source = datasets.get_source(config, 'test')
  outputs = extractor(source.images)
  assert outputs['pool_3'].shape == (500, 64)
  assert np.mean(outputs['logits'].argmax(1) == source.labels) > 0.95
  # The logits are linear in the features.
  design = np.concatenate([outputs['pool_3'], np.ones((500, 1))], 1)
  predicted = design @ np.linalg.lstsq(design, outputs['logits'])[0]
  np.testing.assert_allclose(predicted, outputs['logits'], atol=1e-3)
  config.data.image_size = 32
  with pytest.raises(UserError, match=r'knows images of shape \(28, 28, 1\), not \(32, 32, 1\)'):
    evaluation.get_extractor(config)


@pytest.mark.slow
def test_the_numbers_of_50000_features_fit_in_two_gibibytes():
  command = [sys.executable, '-m', 'benchmarks.inception', '--features']
  root = pathlib.Path(__file__).parent.parent
  output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
  report = json.loads(output)
  assert report['features'] == 50_000
  assert report['peak_memory_GiB'] < 2
  assert {'fid_random_50k', 'kid_random_50k', 'precision_random_10k'} <= set(report)


def test_sigma_max_is_the_largest_distance():
  """Against all pairs by brute force, in blocks that do not divide the number of images."""
  images = np.random.RandomState(0).randint(0, 256, (50, 6, 6, 2)).astype(np.uint8)
  source = datasets.ArraySource(images, np.zeros(50))
  flat = np.float64(images.reshape(50, -1))
  expected = np.sqrt(((flat[:, None] - flat[None]) ** 2).sum(-1).max())
  for block in (50, 7, 1):
    actual = evaluation.largest_distance(source, block_bytes=4 * 72 * block)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_sigma_max_is_in_the_scale_of_the_network(config):
  lines = []
  for config.data.centered in (False, True):
    lines.append(evaluation.sigma_max_line(config))
  distances = [float(line.split()[2]) for line in lines]
  assert lines[0].startswith('config.model.sigma_max = ')
  assert lines[0].endswith('largest distance between 4500 training images in [0, 1]')
  assert lines[1].endswith('in [-1, 1]')
  np.testing.assert_allclose(distances[1], 2 * distances[0], rtol=1e-3)
  assert 0 < distances[0] < 28


@pytest.mark.parametrize('size', [1, 7, 8, 9])
def test_the_evaluation_loader_gives_each_example_once(size):
  """Also where the split is smaller than the batch; and the parts of processes are disjoint."""
  images = np.arange(size, dtype=np.uint8).reshape(size, 1, 1, 1)
  source = datasets.ArraySource(images, np.zeros(size))
  dataset = datasets.Dataset(source, 8, 0, True, None)
  batches = list(dataset.once())
  assert len(batches) == len(dataset) == -(-size // 8)
  assert all(batch['image'].shape == (8, 1, 1, 1) for batch in batches)
  seen, weights = (np.concatenate([b[k] for b in batches]) for k in ('image', 'weight'))
  assert seen.reshape(-1)[weights == 1].tolist() == list(range(size))
  assert [int(batch['weight'].sum()) for batch in batches] == [
    dataset.count(i) for i in range(len(dataset))
  ]
  later = list(dataset.once(start=len(batches) - 1))
  np.testing.assert_array_equal(later[0]['image'], batches[-1]['image'])


def test_two_processes_get_the_halves_of_each_batch(monkeypatch):
  images = np.arange(13, dtype=np.uint8).reshape(13, 1, 1, 1)
  dataset = datasets.Dataset(datasets.ArraySource(images, np.zeros(13)), 8, 0, False, None)
  whole = [batch['image'] for batch in dataset.once()]
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  halves = []
  for process in range(2):
    monkeypatch.setattr(jax, 'process_index', lambda: process)  # noqa: B023
    halves.append([batch['image'] for batch in dataset.once()])
  for joined, parts in zip(whole, zip(*halves, strict=True), strict=True):
    np.testing.assert_array_equal(joined, np.concatenate(parts))
