"""Extractors, statistics of data sets, and `sigma_max`."""

import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

import datasets
import evaluation
import metrics
from models import extractors
from modes import stats as stats_mode
from modes.preparation import prepare
from runtime.errors import UserError
from tests import tiny_config
from tests.golden_values import assert_close, load
from tests.inception_weights import state_dict
from tests.torch_files import write_pth


@pytest.fixture
def config(tmp_path):
  config = prepare(tiny_config.get_config())
  config.eval.stats_path = str(tmp_path / 'stats.npz')
  return config


@pytest.fixture
def extractor(config):
  return evaluation.get_extractor(config)


@pytest.fixture(scope='module')
def of_the_test_split(tmp_path_factory):
  """A file of statistics, 500 images."""
  config = prepare(tiny_config.get_config())
  config.eval.stats_split = 'test'
  config.eval.sigma_max_images = 0
  config.eval.stats_path = str(tmp_path_factory.mktemp('stats') / 'stats.npz')
  return stats_mode.write_stats(config)


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
  config.eval.sigma_max_images = 0
  path = stats_mode.write_stats(config)
  stats = evaluation.load_dataset_stats(config, extractor)
  features = np.float64(features_of(extractor, 'train'))
  assert stats.count == len(features) == 4500
  np.testing.assert_allclose(stats.pool_3, features, rtol=1e-6)
  np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-6)
  np.testing.assert_allclose(stats.covariance, np.cov(features.T), rtol=1e-5, atol=1e-9)
  assert stats.name == 'MNIST5K/train/4500'
  assert set(stats.split_half) == {
    f'{name}_tiny_2250' for name in ('fid', 'kid', 'precision', 'recall')
  }
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
  numbers, _ = evaluation.sample_metrics('tiny', stats, pool_3=stats.pool_3, logits=logits)
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
  numbers, warnings = evaluation.sample_metrics(
    'tiny', stats, pool_3=features, logits=np.zeros((500, 2))
  )
  assert abs(numbers['fid_tiny_500']) <= 1e-6
  assert ('kid_tiny_500' in numbers) == (format == 'activations')
  assert 'does not record its provenance' in warnings[0]
  assert any('no KID' in warning for warning in warnings) == (format != 'activations')


def test_statistics_that_do_not_fit_are_refused(test_split, extractor, tmp_path):
  def refused(message, **changes):
    changed = dataclasses.replace(extractor, **changes)
    with pytest.raises(UserError, match=message):
      evaluation.load_dataset_stats(test_split, changed)

  refused("extractor .recorded 'tiny', configured 'other'.", name='other')
  refused("scaling .recorded 'unit', configured 'ttur'.", scaling='ttur')
  refused("fingerprint .recorded '0', configured '1'.", fingerprint='1')
  whole = pathlib.Path(test_split.eval.stats_path).read_bytes()
  pathlib.Path(test_split.eval.stats_path).write_bytes(whole[: len(whole) // 2])
  refused('cannot be read')
  pathlib.Path(test_split.eval.stats_path).write_bytes(whole)
  test_split.data.image_size = 32
  refused('image_size .recorded 28, configured 32.')
  np.savez(test_split.eval.stats_path, mu=np.zeros(3), sigma=np.eye(3))
  refused('number of features .recorded 3, configured 8.')
  np.savez(test_split.eval.stats_path, features=np.zeros(3))
  refused('neither pool_3 nor mu and sigma')
  pathlib.Path(test_split.eval.stats_path).write_bytes(b'damaged')
  refused('cannot be read')
  test_split.eval.stats_path = str(tmp_path / 'missing.npz')
  refused('no statistics of the data at .*missing.npz: make them with --mode=stats')


def content(**changes):
  """Statistics of eight features, changed."""
  sigma = np.cov(np.random.RandomState(0).randn(8, 20))
  return {'mu': np.zeros(8), 'sigma': sigma, **changes}


def changed(array, index, value):
  array = array.copy()
  array[index] = value
  return array


FEATURES = np.random.RandomState(0).randn(20, 8)
UNUSABLE = {
  'mu has values that are not finite': content(mu=np.full(8, np.nan)),
  'sigma has values that are not finite': content(sigma=np.full((8, 8), np.inf)),
  'pool_3 has values that are not finite': {'pool_3': changed(FEATURES, 3, np.nan)},
  'mu holds Python objects': content(mu=np.array([None] * 8)),
  'sigma has values that are not finite numbers': content(sigma=np.full((8, 8), 'one')),
  'the covariance is not symmetric': content(sigma=changed(content()['sigma'], (0, 1), 3.0)),
  'the covariance has negative eigenvalues': content(sigma=-np.eye(8)),
  r'the covariance \(3, 8\), which must be': content(sigma=np.zeros((3, 8))),
  r'the mean has the shape \(2, 4\)': content(mu=np.zeros((2, 4))),
  r'pool_3 has the shape \(20,\)': {'pool_3': np.zeros(20)},
  r'pool_3 has the shape \(1, 8\)': {'pool_3': np.zeros((1, 8))},
  r'pool_3 has the shape \(0, 8\)': {'pool_3': np.zeros((0, 8))},
  r'pool_3 has the shape \(\)': {'pool_3': np.zeros(())},
  r'but count and mu say \(9, 8\)': content(pool_3=FEATURES, count=9),
  r'but count and mu say \(20, 8\)': content(pool_3=FEATURES[:, :4]),
  'count is -3': content(count=-3),
  'count is 0, not 2 or more': content(count=0),
  r'count is of shape \(\) and type float64, not one whole number': content(count=20.0),
  r'count is of shape \(2,\)': content(count=np.arange(2)),
  r'made_image_size is of shape \(\) and type <U2': content(made_image_size='28'),
  r'made_dataset is of shape \(3,\)': content(made_dataset=['a', 'b', 'c']),
  'floor_fid_tiny_10 is nan': content(floor_fid_tiny_10=np.nan),
  'floor_fid_tiny_10 is of shape .* not one number': content(floor_fid_tiny_10='small'),
  'but neither pool_3 nor mu and sigma': {'mu': np.zeros(8), 'a\nb': np.zeros(2)},
}


def assert_unusable(config, extractor, message):
  """One sentence, which names the file and what to do."""
  whole = f'stats.npz cannot be read as statistics.*{message}.*again with --mode=stats, or give'
  with pytest.raises(UserError, match=whole) as caught:
    evaluation.load_dataset_stats(config, extractor)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('message', UNUSABLE)
def test_statistics_that_make_no_sense_are_refused(message, config, extractor):
  np.savez(config.eval.stats_path, **UNUSABLE[message])
  assert_unusable(config, extractor, message)


def test_what_else_a_file_of_statistics_has_is_not_looked_at(config, extractor):
  odd = {'arr_0': np.array([{}]), 'made_by': np.array([None]), 'x/../y': np.zeros(2), '': 3}
  np.savez(config.eval.stats_path, **content(), **odd)
  stats = evaluation.load_dataset_stats(config, extractor)
  assert (stats.count, stats.provenance, stats.pool_3) == (0, {}, None)


def test_files_that_are_something_else_are_refused(config, extractor):
  path = pathlib.Path(config.eval.stats_path)
  array = io.BytesIO()
  np.save(array, FEATURES)
  np.savez_compressed(path, **content(pool_3=FEATURES))
  whole = path.read_bytes()
  middle = whole[:300] + bytes(200) + whole[500:]  # a hole, as a crash may leave it
  for data in (b'', b'mu: 3\nsigma: 4\n', array.getvalue(), whole[:-30], middle, whole[40:]):
    path.write_bytes(data)
    assert_unusable(config, extractor, '')


@pytest.mark.parametrize('claimed', [None, 8 * 2048 * 10**9 + 128], ids=['short', 'forged'])
@pytest.mark.parametrize('name', ['pool_3', 'mu'])
def test_a_tiny_file_that_declares_a_huge_array_is_not_given_its_memory(
  name, claimed, config, extractor
):
  header = io.BytesIO()
  fields = {'descr': '<f8', 'fortran_order': False, 'shape': (10**9, 2048)}
  np.lib.format.write_array_header_1_0(header, fields)
  np.savez(config.eval.stats_path, **{k: v for k, v in content().items() if k != name})
  with zipfile.ZipFile(config.eval.stats_path, 'a', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(f'{name}.npy', header.getvalue() + bytes(1000))
    if claimed:
      archive.filelist[-1].file_size = claimed
  assert_unusable(config, extractor, f'{name} is shorter or longer than its shape')


class CountedImages:
  """Random images that are made when they are read, and counts of that."""

  def __init__(self, count, size=28):
    self.reads, self.size = np.zeros(count, int), size

  def __len__(self):
    return len(self.reads)

  def __getitem__(self, i):
    self.reads[i] += 1
    shape = (self.size, self.size, 1)
    return {'image': np.random.RandomState(i).randint(0, 256, shape, np.uint8), 'label': 0}


@pytest.fixture
def counted(config, monkeypatch):
  """Makes both splits of the data such images; returns them."""

  def make(**counts):
    splits = {split: CountedImages(count) for split, count in counts.items()}
    monkeypatch.setattr(datasets, 'get_source', lambda config, split: splits[split])
    return splits

  return make


def arrays(path):
  with np.load(path) as file:
    return dict(file)


def logged(caplog):
  return [record.getMessage() for record in caplog.records]


def test_statistics_and_sigma_max_share_one_pass_over_the_training_images(config, counted, caplog):
  caplog.set_level('INFO')
  train = counted(train=400)['train']
  stats_mode.write_stats(config)
  # The loader reads ahead, past the end, and so the first images again; the very first one is also
  # looked at to see that all others are like it.
  assert train.reads.min() == 1
  assert train.reads[1:].max() <= 2
  assert train.reads[0] <= 3
  shared = logged(caplog)[-1]
  assert shared == stats_mode.sigma_max_line(config)
  assert shared.endswith('# largest distance between 400 training images in [-1, 1]')


def test_sigma_max_of_a_part_of_the_images_says_so(config, counted, monkeypatch):
  """The part is bounded in number and in bytes, drawn by the seed, and read alone."""
  train = counted(train=400)['train']
  exact = float(stats_mode.sigma_max_line(config).split()[2])
  train.reads[:] = 0
  for number, most, expected in ((50, 2**28, 50), (400, 28 * 28 * 70, 70)):
    config.eval.sigma_max_images = number
    monkeypatch.setattr(stats_mode, '_SIGMA_MAX_BYTES', most)
    line = stats_mode.sigma_max_line(config)
    assert line.endswith(
      f'largest distance between {expected} of 400 training images in [-1, 1]; '
      f'that of all may be larger'
    )
    assert 0.8 * exact < float(line.split()[2]) <= exact
    assert train.reads.sum() == expected
    assert line == stats_mode.sigma_max_line(config)
    train.reads[:] = 0
  config.seed += 1
  stats_mode.sigma_max_line(config)
  config.seed -= 1
  stats_mode.sigma_max_line(config)
  assert (train.reads == 1).any()  # another seed, other images


def test_statistics_of_the_test_split_read_only_the_sample_of_the_training_images(
  config, counted, caplog
):
  caplog.set_level('INFO')
  config.eval.stats_split = 'test'
  config.eval.sigma_max_images = 30
  splits = counted(train=400, test=64)
  stats_mode.write_stats(config)
  assert splits['train'].reads.sum() == 30
  assert 'between 30 of 400 training images' in logged(caplog)[-1]
  config.eval.sigma_max_images = 0
  stats_mode.write_stats(config)
  assert splits['train'].reads.sum() == 30
  assert 'sigma_max' not in logged(caplog)[-1]


def test_without_features_the_numbers_are_the_same_and_memory_does_not_grow(
  config, counted, extractor, monkeypatch
):
  """With 512 bytes of features of each image."""

  def forward(params, images):
    outputs = extractor.forward(params, images)
    return outputs | {'pool_3': jax.numpy.tile(outputs['pool_3'], (1, 16))}

  wide = dataclasses.replace(extractor, num_features=128, forward=forward, batch_size=50)
  monkeypatch.setattr(stats_mode, 'get_extractor', lambda config: wide)
  monkeypatch.setattr(stats_mode, '_BLOCK', 64)
  config.eval.sigma_max_images = 0

  def made(count, keep):
    config.eval.stats_features = keep
    counted(train=count)
    return arrays(stats_mode.write_stats(config))

  def peak(count):
    tracemalloc.start()
    made(count, False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

  kept, streamed = made(500, True), made(500, False)
  assert peak(1000) - peak(200) < 100 * 1024
  of_features = {f'floor_{name}_tiny_250' for name in ('kid', 'precision', 'recall')}
  assert kept.keys() - streamed.keys() == {'pool_3', *of_features}
  assert kept['pool_3'].shape == (500, 128)
  for key in streamed:
    np.testing.assert_array_equal(streamed[key], kept[key])


def test_the_split_half_baseline_compares_every_second_image_with_the_others():
  """Also where a batch ends in between."""
  features = np.random.RandomState(0).randn(301, 8).astype(np.float32)
  streamed = stats_mode._Features(8, 301, False)
  for part in np.split(features, [3, 4, 150, 299]):
    streamed.add(part)
    streamed.finish()
  for half, start in zip(streamed.halves, (0, 1), strict=True):
    expected = metrics.moments(features[start::2])
    assert half.count == expected.count
    np.testing.assert_allclose(half.mean, expected.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(half.covariance(), expected.covariance(), rtol=1e-9, atol=1e-12)


def test_what_statistics_cannot_be_made_of_is_refused(config, counted, tmp_path):
  def refused(message, key='stats_split', value='test'):
    with config.unlocked():
      before, config.eval[key] = config.eval[key], value
    with pytest.raises(UserError, match=message):
      stats_mode.write_stats(config)
    config.eval[key] = before

  refused("stats_split='valid' must be 'train' or 'test'", value='valid')
  refused('sigma_max_images=-1 must be 2 or more, or 0', 'sigma_max_images', -1)
  refused('sigma_max_images=1 must be 2 or more, or 0', 'sigma_max_images', 1)
  refused('stats_path=.* is a folder: set the path of a file', 'stats_path', str(tmp_path))
  counted(test=1)
  refused('MNIST5K has 1 images, and fewer than two have no covariance')


def test_an_extractor_refuses_what_it_does_not_describe(extractor):
  images = np.zeros((3, 28, 28, 1), np.uint8)
  with pytest.raises(UserError, match="'tiny' was given no images"):
    extractor(images[:0])
  with pytest.raises(UserError, match="'tiny' takes grey levels of type uint8, not float32"):
    extractor(np.float32(images))
  wrong = dataclasses.replace(extractor, num_features=9)
  with pytest.raises(UserError, match=r'gives pool_3 of shape \(4, 8\) .* must be \(4, 9\)'):
    wrong(images)


def test_a_folder_that_cannot_be_written_is_refused_at_once(config, tmp_path):
  (tmp_path / 'file').write_text('')
  config.eval.stats_path = str(tmp_path / 'file' / 'stats.npz')
  with pytest.raises(UserError, match=r'nothing can be written to .*choose another folder'):
    stats_mode.write_stats(config)


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
  write_pth(path, state_dict())
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  monkeypatch.setattr(extractors, '_INCEPTION_SHA256', digest[:8])
  monkeypatch.setenv('SCORE_SDE_INCEPTION', str(path))

  def model(*args, **kwargs):  # which does not fill a batch up with images that nobody looks at
    model = evaluation.get_inception_model(*args, **kwargs)
    return dataclasses.replace(model, batch_size=len(recorded['images_32']))

  ttur = model(scaling='ttur')
  assert (ttur.name, ttur.scaling, ttur.fingerprint) == ('inception_ttur', 'ttur', digest)
  outputs = ttur(recorded['images_32'])
  assert_close(outputs['pool_3'], recorded['2048_32'], 1e-3)
  assert_close(outputs['logits'], recorded['logits_unbiased_32'], 1e-3)

  paper = model(path)
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
  """By what a sixteenth of all arrays takes, in a process that has nothing else."""
  command = [sys.executable, '-m', 'tests.scaled_metrics']
  root = pathlib.Path(__file__).parent.parent
  output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
  report = json.loads(output)
  assert report['features'] == 50_000 // 4
  assert report['peak_memory_GiB'] < 2
  assert {'fid_random_12500', 'kid_random_12500', 'precision_random_625'} <= set(report)


def test_sigma_max_is_the_largest_distance():
  """Against all pairs by brute force, in blocks that do not divide the number of images."""
  images = np.random.RandomState(0).randint(0, 256, (50, 6, 6, 2)).astype(np.uint8)
  flat = np.float64(images.reshape(50, -1))
  expected = np.sqrt(((flat[:, None] - flat[None]) ** 2).sum(-1).max())
  for block in (50, 7, 1):
    actual = stats_mode.largest_distance(images, block_bytes=4 * 72 * block)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_sigma_max_is_in_the_scale_of_the_network(config):
  lines = []
  for config.data.centered in (False, True):
    lines.append(stats_mode.sigma_max_line(config))
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
  dataset = datasets.Dataset(source, batch_size=8, seed=0, shuffle=True, preprocess=None)
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
  source = datasets.ArraySource(images, np.zeros(13))
  dataset = datasets.Dataset(source, batch_size=8, seed=0, shuffle=False, preprocess=None)
  whole = [batch['image'] for batch in dataset.once()]
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  halves = []
  for process in range(2):
    monkeypatch.setattr(jax, 'process_index', lambda: process)  # noqa: B023
    halves.append([batch['image'] for batch in dataset.once()])
  for joined, parts in zip(whole, zip(*halves, strict=True), strict=True):
    np.testing.assert_array_equal(joined, np.concatenate(parts))


def pictures_of(tmp_path, seed):
  """The configuration of a folder of pictures, which has the same name whatever they are."""
  folder = tmp_path / str(seed) / 'images'
  folder.mkdir(parents=True)
  for i, pixels in enumerate(np.random.RandomState(seed).randint(0, 256, (4, 28, 28), np.uint8)):
    Image.fromarray(pixels).save(folder / f'{i}.png')
  config = tiny_config.get_config()
  config.data.update(dataset='ImageFolder', path=str(folder))
  config.eval.update(stats_path=str(tmp_path / 'stats.npz'), sigma_max_images=0)
  return prepare(config)


def test_statistics_of_other_pictures_are_neither_used_nor_replaced(tmp_path):
  cats, dogs = (pictures_of(tmp_path, seed) for seed in (0, 1))
  path = stats_mode.write_stats(cats)
  evaluation.load_dataset_stats(cats, evaluation.get_extractor(cats))
  with pytest.raises(UserError, match=r'stats.npz does not fit the .*: images \(others than those'):
    evaluation.load_dataset_stats(dogs, evaluation.get_extractor(dogs))
  before = path.read_bytes()
  with pytest.raises(UserError, match='has statistics of another images, and is not replaced: set'):
    stats_mode.write_stats(dogs)
  assert path.read_bytes() == before
  stats_mode.write_stats(cats)  # the same images may be described again
  path.write_text('precious')
  with pytest.raises(UserError, match='stats.npz cannot be read as statistics'):
    stats_mode.write_stats(cats)
  assert path.read_text() == 'precious'


def test_statistics_are_used_where_their_pictures_are_not(tmp_path, caplog):
  cats = pictures_of(tmp_path, 0)
  stats_mode.write_stats(cats)
  cats.data.path = str(tmp_path / 'gone' / 'images')
  assert evaluation.load_dataset_stats(cats, evaluation.get_extractor(cats)).count
  assert 'The images are not compared with those of the statistics: ' in caplog.text
