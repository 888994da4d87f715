"""Data: determinism, sharing between processes, and what reaches the network."""

import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import datasets
from configs.vp import mnist_ddpmpp_continuous
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
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  with pytest.raises(UserError, match='training.batch_size=60 cannot be split over 8 devices'):
    datasets.get_dataset(config)


def test_image_folder_is_split_cropped_and_resized(config, tmp_path):
  for i in range(20):
    suffix = ('.png', '.JPEG', '.bmp')[i % 3]
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 10:50] = 10 * i  # the central square
    (tmp_path / str(i % 2)).mkdir(exist_ok=True)
    Image.fromarray(pixels).save(tmp_path / str(i % 2) / f'{i:02d}{suffix}', quality=100)
  config.data.dataset = 'ImageFolder'
  config.data.path = str(tmp_path)
  train, test = (datasets.get_source(config, split) for split in ('train', 'test'))
  assert (len(train), len(test)) == (18, 2)
  assert not set(train.paths) & set(test.paths)
  for i, path in enumerate(train.paths):
    image = train[i]['image']
    assert image.shape == (28, 28, 1)
    np.testing.assert_allclose(image[4:-4, 4:-4], 10 * int(path.stem), atol=1)

  config.data.path = str(tmp_path / 'nowhere')
  with pytest.raises(UserError, match="No images for the split 'train' of ImageFolder"):
    datasets.get_dataset(config)


@pytest.fixture
def picture_config(config, tmp_path):
  """Forty pictures of 28 x 28 pixels in a folder of their own."""
  noise = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
  folder = tmp_path / 'pictures'
  folder.mkdir()
  for i, pixels in enumerate(noise):
    Image.fromarray(pixels).save(folder / f'{i:02d}.png')
  config.data.dataset, config.data.path = 'ImageFolder', str(folder)
  config.training.batch_size = config.eval.batch_size = 8
  return config


@pytest.mark.parametrize('first', [False, True])
def test_picture_that_cannot_be_decoded_is_named_by_the_iterator(picture_config, first):
  path = pathlib.Path(picture_config.data.path) / ('00.png' if first else '20.png')
  train, _, _ = datasets.get_dataset(picture_config)
  path.write_bytes(path.read_bytes()[:300])
  with pytest.raises(UserError, match=f'{path} cannot be read .* which resumes') as error:
    for _ in zip(range(6), train.iterate(), strict=False):
      pass
  assert '\n' not in str(error.value)


def test_home_folder_is_expanded_in_the_path(picture_config, monkeypatch):
  monkeypatch.setenv('HOME', str(pathlib.Path(picture_config.data.path).parent))
  picture_config.data.path = '~/pictures'
  assert len(datasets.get_source(picture_config, 'train')) == 36


def test_fingerprint_of_a_source_changes_with_its_examples(picture_config):
  train, test = (datasets.get_source(picture_config, split) for split in ('train', 'test'))
  assert train.fingerprint != test.fingerprint
  assert datasets.get_source(picture_config, 'train').fingerprint == train.fingerprint
  Image.new('L', (28, 28)).save(train.paths[3])
  assert datasets.get_source(picture_config, 'train').fingerprint != train.fingerprint

  images = np.zeros((4, 2, 2, 1), np.uint8)
  digest = datasets.ArraySource(images, np.arange(4)).fingerprint
  assert datasets.ArraySource(images.copy(), np.arange(4)).fingerprint == digest
  assert datasets.ArraySource(images.reshape(4, 4, 1, 1), np.arange(4)).fingerprint != digest
  assert datasets.ArraySource(images, np.ones(4, int)).fingerprint != digest
  images[1, 0, 0] = 1
  assert datasets.ArraySource(images, np.arange(4)).fingerprint != digest


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
    datasets.TFDSSource([{'image': deep}], lambda image: datasets.resize(image, 28))[0]

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
