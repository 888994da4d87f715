"""Whole runs through the command line: resume after any kill, devices, processes, failures."""

import json
import re
import shlex
import shutil
import signal

import jax
import numpy as np
import pytest

import datasets
import losses
import run_lib
import sde_lib
import train_state
from faults.kills import digest
from modes import train as train_mode
from modes import training_loop
from runtime import checkpoints, parallelism
from runtime.checkpoints import CheckpointDirectory
from runtime.errors import Exit, UserError
from runtime.rng import stream
from tests import tiny_config
from tests.processes import command, finish, history, run, samples, start, wait_for

pytestmark = pytest.mark.usefixtures('quickly_compiled')


def final_state(workdir):
  _, like = train_state.abstract_state(tiny_config.get_config())
  with CheckpointDirectory(workdir / 'checkpoints-meta') as latest:
    return checkpoints.restore_newest([latest], like)


def assert_same_run(workdir, reference):
  """Parameters, EMA, optimizer state, every loss and every sample, bit for bit."""
  assert history(workdir) == history(reference)
  for a, b in zip(*map(jax.tree.leaves, map(final_state, (workdir, reference))), strict=True):
    np.testing.assert_array_equal(a, b)
  ours, theirs = samples(workdir), samples(reference)
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  run(workdir)
  return workdir


def test_run_leaves_the_documented_files(uninterrupted):
  with CheckpointDirectory(uninterrupted / 'checkpoints') as directory:
    assert {n: directory.step(n) for n in directory.numbers()} == {1: 10, 2: 20, 3: 30, 4: 40}
  with CheckpointDirectory(uninterrupted / 'checkpoints-meta') as directory:
    assert directory.numbers() == [35, 40]
  assert sorted(samples(uninterrupted)) == [f'iter_{step}_host_0' for step in (10, 20, 30, 40)]
  assert all(image.shape == (16, 28, 28, 1) for image in samples(uninterrupted).values())
  assert (uninterrupted / 'samples' / 'iter_40_host_0' / 'sample.png').exists()
  metrics = history(uninterrupted)
  assert [step for step, name in metrics if name == 'training_loss'] == list(range(1, 41))
  assert [step for step, name in metrics if name == 'eval_loss'] == list(range(5, 41, 5))
  assert metrics[40, 'training_loss'] < metrics[1, 'training_loss']
  for name in ('config.json', 'versions.json', 'stdout.txt'):
    assert (uninterrupted / name).stat().st_size > 0
  assert list((uninterrupted / 'tensorboard').iterdir())


def test_each_logged_step_is_a_plain_line_and_its_numbers_are_metrics(uninterrupted):
  log = (uninterrupted / 'stdout.txt').read_text()
  assert '\r' not in log
  lines = re.findall(r'step (\d+) of 40: (.*)', log)
  assert [int(step) for step, _ in lines] == list(range(1, 41))
  pattern = (
    r'[\d.e+]+ steps/s, \d+ images/s, loss [\d.e-]+, gradient norm [\d.e-]+, '
    r'learning rate [\d.e-]+, \d\d:\d\d left, last checkpoint at step 35'
  )
  assert re.fullmatch(pattern, lines[-2][1])
  metrics = history(uninterrupted)
  rates = [metrics[step, 'learning_rate'] for step in range(1, 7)]
  np.testing.assert_allclose(rates, [0, 5e-5, 1e-4, 1.5e-4, 2e-4, 2e-4], rtol=1e-6)
  text = (uninterrupted / 'metrics.jsonl').read_text()
  measured = [json.loads(line) for line in text.splitlines() if '"step": 39' in line]
  assert measured[0]['images_per_second'] > 0
  assert measured[0]['memory'] > 1e8


@pytest.mark.slow
def test_killed_during_a_save_the_run_ends_in_the_same_bits(uninterrupted, tmp_path):
  process = start(tmp_path)
  meta = tmp_path / 'checkpoints-meta'
  wait_for(lambda: any('tmp' in path.name for path in meta.glob('checkpoint_*')), process)
  process.kill()
  process.communicate()
  run(tmp_path)
  assert_same_run(tmp_path, uninterrupted)


def test_damaged_newest_checkpoint_falls_back_and_ends_in_the_same_bits(uninterrupted, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted, workdir)
  for directory in ('checkpoints-meta/checkpoint_40', 'checkpoints/checkpoint_4'):
    for file in (workdir / directory / 'state').rglob('*'):
      if file.is_file():
        file.write_bytes(file.read_bytes()[:-1])
  output = run(workdir)
  assert 'Trying the one before' in output
  assert 'step 35' in output
  assert_same_run(workdir, uninterrupted)


@pytest.mark.parametrize(
  'number', [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_cleanly_and_the_run_continues(number, uninterrupted, tmp_path):
  before = signal.signal(number, signal.SIG_DFL)  # nohup, under which it is ignored, is inherited
  process = start(tmp_path)
  signal.signal(number, before)
  metrics = tmp_path / 'metrics.jsonl'
  wait_for(lambda: metrics.exists() and '"step": 7' in metrics.read_text(), process)
  process.send_signal(number)
  output = finish(process)
  assert 'Stopped by a signal at step' in output
  assert f'and saved. To resume, run: {shlex.join(command(tmp_path))}\n' in output
  run(tmp_path)
  assert_same_run(tmp_path, uninterrupted)


def test_a_signal_while_samples_are_drawn_anew_takes_no_step_without_them(uninterrupted, tmp_path):
  training = tiny_config.get_config().training
  training.n_iters = 60
  with training_loop.open_run(tmp_path) as run_:
    stopped = training_loop.train_loop(
      training,
      run_,
      final_state(uninterrupted),
      batches=iter([]),  # from which no step could be taken
      train_step=pytest.fail,
      evaluate=pytest.fail,
      at_snapshot=lambda state, metrics: False,
    )
  assert stopped is None
  assert CheckpointDirectory(tmp_path / 'checkpoints-meta').numbers() == [40]


@pytest.mark.slow
def test_killed_between_the_two_saves_of_the_last_step_the_run_ends_with_both(
  uninterrupted, tmp_path
):
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted, workdir)
  shutil.rmtree(workdir / 'checkpoints-meta' / 'checkpoint_40')
  run(workdir)
  assert digest(workdir) == digest(uninterrupted)


@pytest.mark.slow
def test_steps_per_call_do_not_change_the_result(uninterrupted, tmp_path):
  run(tmp_path, '--config.training.n_jitted_steps=5', '--config.training.log_freq=5')
  reference = history(uninterrupted)
  for key, value in history(tmp_path).items():
    assert value == reference[key]
  for a, b in zip(*map(jax.tree.leaves, map(final_state, (tmp_path, uninterrupted))), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_fused_steps_agree_with_single_steps():
  """The compiled loop that accelerators use, on this machine."""
  config = tiny_config.get_config()
  config.model.dropout = 0.0
  sde = sde_lib.get_sde(config)
  train_ds, _, _ = datasets.get_dataset(config)
  inputs = train_ds.inputs(0, 'image')
  batches = [next(inputs) for _ in range(5)]
  results = []
  for fused in (False, True):
    model, state = train_state.init_state(jax.random.PRNGKey(0), config)
    step = train_mode.compile_train_step(
      losses.build_step_fn(config, sde, model, train=True),
      train_ds.preprocess,
      stream(config.seed, 'train'),
      fused=fused,
    )
    results.append(step(parallelism.replicate(state), batches))
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_images_on_the_devices_and_reading_threads_train_the_same_run(uninterrupted, tmp_path):
  run(tmp_path, '--config.data.on_device=True', '--config.training.n_iters=20')
  run(tmp_path, '--config.data.num_workers=3')
  assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_divergence_stops_with_step_and_metric_and_keeps_the_checkpoints(uninterrupted, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted, workdir)
  before = {path: path.stat().st_mtime_ns for path in (workdir / 'checkpoints').rglob('*')}
  state = final_state(workdir)
  bad = jax.tree.map(lambda x: x * 1e30, state.params)
  shutil.rmtree(workdir / 'checkpoints-meta')
  with CheckpointDirectory(workdir / 'checkpoints-meta') as directory:
    directory.save(41, int(state.step) + 1, state.replace(step=state.step + 1, params=bad))
  process = start(workdir, '--config.training.n_iters=50')
  output, _ = process.communicate(timeout=300)
  assert process.returncode == Exit.NOT_FINITE
  assert 'NonFiniteLoss: training_loss is' in output
  assert 'at step 42' in output
  assert 'Traceback' not in output
  assert {path: path.stat().st_mtime_ns for path in (workdir / 'checkpoints').rglob('*')} == before


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_sentence_without_traceback(uninterrupted, tmp_path):
  cases = [
    (uninterrupted, '--config.model.width=16', 'model.width (was 8, is 16)'),
    (tmp_path, '--config.sampling.predictor=em', "Unknown predictor 'em'"),
    (tmp_path, '--config.training.batch_size=abc', 'batch_size'),
  ]
  processes = [start(workdir, override) for workdir, override, _ in cases]
  for process, (_, override, message) in zip(processes, cases, strict=True):
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, override
    assert message in output
    assert 'Traceback' not in output, output
  assert not list(tmp_path.iterdir())


def test_other_fused_steps_that_do_not_divide_the_step_of_the_state_are_refused(tmp_path):
  config = tiny_config.get_config()
  config.training.update(n_iters=7, snapshot_sampling=False)
  run_lib.train(config, tmp_path)
  frequencies = ('log_freq', 'eval_freq', 'snapshot_freq_for_preemption')
  config.training.update(n_iters=20, n_jitted_steps=5, **dict.fromkeys(frequencies, 5))
  with pytest.raises(
    UserError, match='resumes from step 7, no multiple of training.n_jitted_steps'
  ):
    run_lib.train(config, tmp_path)


def test_a_snapshot_that_was_not_completed_is_written_by_the_same_command(tmp_path):
  config = tiny_config.get_config()
  config.training.update(n_iters=10, snapshot_sampling=False)
  run_lib.train(config, tmp_path)
  before = digest(tmp_path)
  shutil.rmtree(tmp_path / 'checkpoints' / 'checkpoint_1')
  run_lib.train(config, tmp_path)
  assert digest(tmp_path) == before


def test_no_signal_interrupts_the_end_of_the_last_save(tmp_path, monkeypatch):
  came = []
  previous = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
  close = CheckpointDirectory.__exit__

  def close_slowly(self, *error):
    signal.raise_signal(signal.SIGTERM)
    return close(self, *error)

  monkeypatch.setattr(CheckpointDirectory, '__exit__', close_slowly)
  try:
    with training_loop.open_run(tmp_path):
      pass
  finally:
    signal.signal(signal.SIGTERM, previous)
  assert not came


def test_samples_of_a_training_that_is_gone_are_not_taken_for_those_of_another(tmp_path):
  config = tiny_config.get_config()
  config.training.n_iters = 5
  run_lib.train(config, tmp_path)
  for name in ('checkpoints', 'checkpoints-meta'):
    shutil.rmtree(tmp_path / name)
  (tmp_path / 'config.json').unlink()
  config.optim.lr = 1e-2
  with pytest.raises(UserError, match='has the samples of a training, but neither its checkpoints'):
    run_lib.train(config, tmp_path)


def test_a_folder_whose_name_is_not_utf8_is_refused_before_training(tmp_path):
  with pytest.raises(UserError, match=r"caf.udce9' is not UTF-8: choose another folder"):
    run_lib.train(tiny_config.get_config(), tmp_path / 'caf\udce9')
  assert list(tmp_path.iterdir()) == []
