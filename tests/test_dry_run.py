"""`--dry_run`: what it says is right, it refuses what the mode refuses, and it leaves no trace."""

import re

import pytest

import run_lib
from configs.defaults import get_default_configs
from runtime.errors import UserError
from tests import tiny_config
from tests.test_command_line import CONFIG, main

pytestmark = pytest.mark.usefixtures('quickly_compiled')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('run')
  config = tiny_config.get_config()
  config.training.update(n_iters=1, snapshot_sampling=False)
  run_lib.train(config, directory)
  return directory


def test_it_counts_parameters_operations_and_memory(tmp_path):
  config = tiny_config.get_config()
  config.model.width = 16
  text = run_lib.dry_run(config, tmp_path / 'run', written=tiny_config.get_config())
  # Two 3x3 convolutions between 1 and 16 channels, a dense layer and a group normalization.
  parameters = (9 * 16 + 16) + (16 * 16 + 16) + 2 * 16 + (9 * 16 + 1)
  assert f'network: tiny, {parameters} parameters' in text
  forward = 2 * (2 * 28 * 28 * 9 * 16) + 2 * 16 * 16
  assert f'forward pass of one image: {forward / 1e9:,.4g} GFLOP' in text
  step = float(re.search(r'training step of 16 images: ([\d.]+) GFLOP', text)[1]) * 1e9
  assert 2.4 * 16 * forward < step <= 3 * 16 * forward  # the image itself needs no gradient
  assert (
    f'(parameters {4 * parameters / 1e6:.4g}, moving average {4 * parameters / 1e6:.4g}' in text
  )
  assert 'activations and compiled programs are not counted' in text
  assert 'changed on the command line:\n  model.width = 16 (file: 8)\ndevices:' in text
  assert "  likelihood.hutchinson_type = 'Rademacher'" in text  # complete
  assert not (tmp_path / 'run').exists()


def test_the_classifier_is_counted_instead_of_the_score_network(tmp_path):
  config = tiny_config.get_config()
  config.classifier.update(name='tiny', num_classes=10, batch_size=8, width=8)
  text = run_lib.dry_run(config, tmp_path / 'run', mode='train_classifier')
  assert 'network: tiny, ' in text
  assert 'training step of 8 images: ' in text


@pytest.mark.parametrize(
  ('mode', 'name', 'value', 'message'),
  [
    ('train', 'model.width', 16, 'model.width (was 8, is 16)'),
    ('train', 'sampling.predictor', 'em', "Unknown predictor 'em'"),
    ('sample', 'sampling.num_samples', 0, 'sampling.num_samples=0 must be at least 1'),
    ('sample', 'training.sde', 'subvpsde', "training.sde (was 'vpsde', is 'subvpsde')"),
    ('eval', 'eval.begin_ckpt', 3, 'has no checkpoints [3, 4]'),
    ('stats', 'eval.stats_split', 'all', "eval.stats_split='all' must be 'train' or 'test'"),
    ('export', 'model.width', 16, 'model.width (was 8, is 16)'),
  ],
)
def test_it_refuses_what_the_mode_refuses(workdir, mode, name, value, message):
  config = tiny_config.get_config()
  config.update_from_flattened_dict({name: value})
  modes = {
    'train': run_lib.train,
    'sample': run_lib.sample,
    'eval': run_lib.evaluate,
    'stats': lambda config, workdir: run_lib.make_stats(config),
    'export': run_lib.export_checkpoint,
  }
  for run in (modes[mode], lambda *arguments: run_lib.dry_run(*arguments, mode=mode)):
    with pytest.raises(UserError, match=re.escape(message)):
      run(config.copy_and_resolve_references(), workdir)


@pytest.mark.parametrize('mode', ['sample', 'stats', 'prepare_data', 'inspect_data', 'export'])
def test_it_leaves_no_trace(workdir, mode):
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
  text = run_lib.dry_run(tiny_config.get_config(), workdir, mode=mode)
  assert text.endswith(f'--mode={mode} would start. Nothing was written, and no data set was read.')
  assert ('GFLOP' in text) == (mode in ('sample', 'export'))
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == before


def test_the_command_line_prints_it_and_exits_with_zero(tmp_path):
  arguments = [f'--config={CONFIG}', f'--workdir={tmp_path / "run"}', '--dry_run']
  code, output = main('--mode=train', *arguments, '--config.training.batch_size=8')
  assert code == 0
  assert 'changed on the command line:\n  training.batch_size = 8 (file: 16)\n' in output
  code, output = main('--mode=train', *arguments, '--config.training.batch_size=0')
  assert code == 1
  assert 'training.batch_size=0' in output
  assert not (tmp_path / 'run').exists()


def test_all_keys_of_the_defaults_are_printed():
  text = run_lib.dry_run(tiny_config.get_config(), mode='prepare_data')
  for section, values in get_default_configs().items():
    for key in values if hasattr(values, 'keys') else ():
      assert f'\n  {section}.{key} = ' in text
