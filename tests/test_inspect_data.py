"""What --mode=inspect_data says of a data set, against NumPy."""

import json

import numpy as np
import pytest
from PIL import Image

import datasets
import run_lib
from configs.vp import mnist_ddpmpp_continuous
from modes import inspect_data
from modes.stats import largest_distance
from runtime.errors import UserError


@pytest.fixture(scope='module')
def config():
  config = mnist_ddpmpp_continuous.get_config()
  config.eval.batch_size = 60  # does not divide the 500 test digits
  return config


@pytest.fixture(scope='module')
def inspected(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp('inspected')
  inspect_data._SECONDS, seconds = 0.1, inspect_data._SECONDS
  run_lib.inspect_data(config, folder)
  inspect_data._SECONDS = seconds
  return folder / 'data'


def test_numbers_are_those_of_the_images(config, inspected):
  report = json.loads((inspected / 'report.json').read_text())
  for split in ('train', 'test'):
    source = datasets.get_source(config, split)
    scaled = source.images / 127.5 - 1
    ours = report[split]
    assert ours['images'] == len(source)
    assert ours['grey levels'] == [0, 255]
    assert ours['scaled range'] == [-1, 1]
    np.testing.assert_allclose(ours['mean'], scaled.mean(), atol=1e-4)
    np.testing.assert_allclose(ours['standard deviation'], scaled.std(), atol=1e-4)
    assert ours['classes'] == {str(k): len(source) // 10 for k in range(10)}
  assert report['images_per_second'] > 0


def test_settings_have_the_sigma_max_of_the_range_of_the_ve_sde(config, inspected):
  """The configuration is of the VP SDE, whose images have twice the range."""
  report = json.loads((inspected / 'report.json').read_text())
  exact = largest_distance(datasets.get_source(config, 'train').images) / 255
  assert report['sigma_max'] == pytest.approx(2 * exact, rel=1e-3)
  ve, vp = report['settings']['VE'], report['settings']['VP']
  assert f'config.model.sigma_max = {exact:.4g} ' in ve[-1]
  assert 'in [0, 1]' in ve[-1]
  assert {'config.data.centered = False', 'config.model.scale_by_sigma = True'} <= set(ve)
  assert {'config.data.centered = True', 'config.model.scale_by_sigma = False'} <= set(vp)
  assert not any('sigma_max' in line for line in vp)


def test_grids_show_the_images_that_the_network_sees(config, inspected):
  for split in ('train', 'test'):
    source = datasets.get_source(config, split)
    with Image.open(inspected / f'{split}.png') as image:
      grid = np.asarray(image)
    np.testing.assert_array_equal(grid[2:30, 2:30], source.images[0, ..., 0])
    np.testing.assert_array_equal(grid[2:30, 32:60], source.images[1, ..., 0])
  train, _, _ = datasets.get_dataset(config)
  with Image.open(inspected / 'augmented.png') as image:
    np.testing.assert_array_equal(np.asarray(image)[2:30, 2:30], train.batch(0)['image'][0, ..., 0])


def test_several_processes_are_refused(config, tmp_path, monkeypatch):
  monkeypatch.setattr('jax.process_count', lambda: 2)
  with pytest.raises(UserError, match='runs in one process, not in 2: leave --coordinator out'):
    inspect_data.inspect_data(config, tmp_path)
  assert not list(tmp_path.iterdir())
