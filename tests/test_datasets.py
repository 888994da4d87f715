"""Data: determinism, sharing between processes, and what reaches the network."""

import jax
import numpy as np
import pytest

import datasets
from configs.vp import mnist_ddpmpp_continuous
from runtime import parallelism
from runtime.errors import UserError


@pytest.fixture
def config():
  config = mnist_ddpmpp_continuous.get_config()
  config.training.batch_size = 60
  config.eval.batch_size = 60
  return config


def test_mnist5k_is_stratified_and_its_splits_are_disjoint(config):
  splits = [datasets.get_source(config, split) for split in ('train', 'test')]
  for source, per_class in zip(splits, (450, 50), strict=True):
    labels = [source[i]['label'] for i in range(len(source))]
    assert np.bincount(labels).tolist() == [per_class] * 10
  train, test = ({source.images[i].tobytes() for i in range(len(source))} for source in splits)
  assert not train & test


def test_batch_is_a_function_of_seed_and_step(config):
  train, _, _ = datasets.get_dataset(config)
  again, _, _ = datasets.get_dataset(config)
  iterator = again.iterate(start=73)
  for step in (73, 74, 75):
    np.testing.assert_array_equal(train.batch(step)['image'], next(iterator)['image'])
  config.seed += 1
  other, _, _ = datasets.get_dataset(config)
  assert (train.batch(73)['image'] != other.batch(73)['image']).any()


def test_each_epoch_is_another_permutation_of_the_training_split(config):
  train, _, source = datasets.get_dataset(config)
  steps = len(source) // 60
  epochs = [
    np.concatenate(
      [train.batch(step)['image'] for step in range(epoch * steps, (epoch + 1) * steps)]
    )
    for epoch in range(2)
  ]
  assert (epochs[0] != epochs[1]).any()
  everything = sorted(image.tobytes() for image in source.images)
  for epoch in epochs:
    assert sorted(image.tobytes() for image in epoch) == everything


@pytest.mark.parametrize('processes', [2, 3])
def test_processes_share_the_batch_of_one_process(config, processes, monkeypatch):
  train, _, _ = datasets.get_dataset(config)
  whole = train.batch(80)
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  parts = []
  for index in range(processes):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    parts.append(train.batch(80))
  for key in ('image', 'label'):
    np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])


def test_preprocessing_scales_flips_and_dequantizes(config):
  rng = jax.random.PRNGKey(0)
  images = np.arange(8 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(8, 28, 28, 1)
  plain = datasets.get_preprocess_fn(config)(rng, images)
  np.testing.assert_allclose(plain, images / 127.5 - 1, atol=1e-6)

  config.data.centered = False
  noisy = datasets.get_preprocess_fn(config, uniform_dequantization=True)(rng, images)
  levels = np.asarray(noisy, np.float64) * 256 - images
  assert levels.min() >= 0
  assert levels.max() <= 1 + 1e-4
  assert abs(levels.mean() - 0.5) < 0.02

  config.data.random_flip = True
  flipped = np.asarray(datasets.get_preprocess_fn(config)(rng, images)) * 255
  mirrored = [np.allclose(x, y[:, ::-1], atol=1e-3) for x, y in zip(flipped, images, strict=True)]
  same = [np.allclose(x, y, atol=1e-3) for x, y in zip(flipped, images, strict=True)]
  assert all(np.logical_xor(mirrored, same))
  assert any(mirrored)
  assert any(same)
  never = datasets.get_preprocess_fn(config, evaluation=True)(rng, images)
  np.testing.assert_allclose(np.asarray(never) * 255, images, atol=1e-3)


def test_scalers_are_inverse(config):
  x = np.linspace(0, 1, 5)
  for centered in (False, True):
    config.data.centered = centered
    scaled = datasets.get_data_scaler(config)(x)
    np.testing.assert_allclose(datasets.get_data_inverse_scaler(config)(scaled), x)
  assert scaled.tolist() == [-1, -0.5, 0, 0.5, 1]


def test_wrong_shapes_and_batches_are_refused_by_name(config, monkeypatch):
  config.data.image_size = 32
  with pytest.raises(UserError, match=r'MNIST5K has images of shape \(28, 28, 1\).*\(32, 32, 1\)'):
    datasets.get_dataset(config)
  config.data.image_size = 28
  monkeypatch.setattr(parallelism, 'batch_parts', lambda: 8)
  with pytest.raises(UserError, match='training.batch_size=60 cannot be split over 8 devices'):
    datasets.get_dataset(config)


class Numbers:
  """Images that show their own number, two of which a batch may read at once."""

  def __init__(self, count, random=False):
    self.count, self.random = count, random

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    return {key: value[0] for key, value in self.gather(np.asarray([int(i)])).items()}

  def gather(self, indices, draws=None):
    images = np.zeros((len(indices), 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = indices
    if draws is not None:
      images[:, 1, 1, 0] = (256 * draws).astype(np.uint8)
    return {'image': images, 'label': np.int32(indices)}


def numbers(**settings):
  settings = {'batch_size': 6, 'seed': 3, 'shuffle': True, 'preprocess': None} | settings
  return datasets.Dataset(Numbers(60), **settings)


def assert_same_batches(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize('num_threads', [1, 2, 4])
@pytest.mark.parametrize('processes', [1, 2, 3])
def test_batches_after_a_restart_are_the_same_with_any_threads_and_processes(
  num_threads, processes, monkeypatch
):
  whole = [numbers(augment=True).batch(step) for step in range(30)]
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  dataset = numbers(augment=True, num_threads=num_threads)
  for start in (0, 17):
    parts = []
    for index in range(processes):
      monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
      iterator = dataset.iterate(start)
      parts.append([next(iterator) for _ in range(30 - start)])
    joined = [
      {key: np.concatenate([part[key] for part in step]) for key in step[0]}
      for step in zip(*parts, strict=True)
    ]
    assert_same_batches(joined, whole[start:])


def test_every_example_comes_once_an_epoch_and_what_is_random_changes():
  dataset = numbers(augment=True)
  epochs = [
    np.concatenate([dataset.batch(step)['image'] for step in range(10 * e, 10 * e + 10)])
    for e in range(3)
  ]
  for images in epochs:
    assert sorted(images[:, 0, 0, 0].tolist()) == list(range(60))
  draws = np.concatenate(epochs)[:, 1, 1, 0]
  assert abs(draws.mean() - 127.5) < 20
  assert len({images[:, 1, 1, 0].tobytes() for images in epochs}) == 3
  assert not np.concatenate([batch['image'] for batch in dataset.once()])[:, 1, 1].any()


def test_a_source_without_gather_gives_the_batches_of_one_with_it():
  class OneByOne(list):
    pass

  source = Numbers(60)
  slow = datasets.Dataset(
    OneByOne(source[i] for i in range(60)), batch_size=6, seed=3, shuffle=True, preprocess=None
  )
  assert_same_batches([slow.batch(i) for i in range(12)], [numbers().batch(i) for i in range(12)])


def test_images_on_the_devices_make_the_batches_that_would_have_travelled():
  resident = numbers(on_device=True)
  table = resident.table('image', 'label')
  inputs = resident.inputs(7, 'image', 'label')
  for step in range(7, 20):
    batch = jax.jit(datasets.take)(next(inputs), table)
    assert_same_batches([jax.device_get(batch)], [numbers().batch(step)])
  assert numbers().table('image') is None


def test_too_many_images_for_the_devices_are_refused(monkeypatch):
  class Small:
    def memory_stats(self):
      return {'bytes_limit': 200}

  monkeypatch.setattr(jax, 'local_devices', lambda: [Small()])
  with pytest.raises(UserError, match='data.on_device=True would put .* set it to False'):
    numbers(on_device=True).table('image')


def test_the_tensorflow_free_names_of_the_2021_code_resize_as_it_did():
  ramp = np.arange(40 * 60, dtype=np.float64).reshape(40, 60, 1) / 2400 * 255
  image = np.rint(ramp).astype(np.uint8).repeat(3, -1)
  assert datasets.resize_small(image, 20).shape == (20, 30, 3)
  assert datasets.crop_resize(image, 20).shape == (20, 20, 3)
  np.testing.assert_allclose(
    datasets.resize_small(image, 20)[5:-5, 5:-5],
    np.rint(ramp).reshape(20, 2, 30, 2, 1).mean((1, 3)).repeat(3, -1)[5:-5, 5:-5],
    atol=1,
  )


@pytest.mark.parametrize(
  'image',
  [
    np.zeros((3, 2, 1), np.uint8),
    np.zeros((2, 2, 1), np.float32),
    pytest.param(np.zeros((2, 2, 3), np.uint8), marks=pytest.mark.slow),
    pytest.param(np.zeros((2, 2, 1), np.uint16), marks=pytest.mark.slow),
  ],
)
def test_later_image_of_another_shape_or_type_is_named(image):
  source = [{'image': np.zeros((2, 2, 1), np.uint8), 'label': 0} for _ in range(8)]
  source[5]['image'] = image
  dataset = datasets.Dataset(source, batch_size=4, seed=0, shuffle=True, preprocess=None)
  for batches in (lambda: [dataset.batch(i) for i in range(2)], lambda: list(dataset.once())):
    with pytest.raises(
      UserError, match='Image 5 of the data set has shape .*give all images one shape'
    ):
      batches()


def test_images_of_another_type_are_refused_and_not_cast(config):
  deep = np.full((28, 28, 1), 40_000, np.uint16)
  with pytest.raises(UserError, match='type uint16 cannot be resized: scale it'):
    datasets.resize(deep, 32)

  @datasets.register_dataset(name='DEEP')
  def deep_images(config, split):
    return datasets.ArraySource(deep[None], np.zeros(1))

  config.data.dataset = 'DEEP'
  with pytest.raises(UserError, match='DEEP has images of type uint16, not uint8: let its source'):
    datasets.get_source(config, 'train')


def test_empty_source_and_unknown_split_are_refused(config):
  with pytest.raises(UserError, match="Unknown split 'validation': use 'train' or 'test'"):
    datasets.get_source(config, 'validation')

  @datasets.register_dataset(name='EMPTY')
  def empty(config, split):
    return datasets.ArraySource(np.zeros((0, 28, 28, 1), np.uint8), np.zeros(0))

  config.data.dataset = 'EMPTY'
  with pytest.raises(UserError, match="The split 'train' of the data set EMPTY is empty"):
    datasets.get_source(config, 'train')


def test_crop_larger_than_the_image_is_refused():
  with pytest.raises(UserError, match='40 x 60 pixels has no central square of 50 x 50'):
    datasets.central_crop(np.zeros((40, 60, 3), np.uint8), 50)


def test_resize_is_the_identity_at_its_size_and_keeps_constants():
  image = np.full((48, 48, 3), 77, np.uint8)
  assert datasets.resize(image, 48) is image
  np.testing.assert_array_equal(datasets.resize(image, 32), np.full((32, 32, 3), 77, np.uint8))
