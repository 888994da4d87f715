"""One run gives the same numbers on any number and layout of devices and processes."""

import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from modes import train_classifier
from runtime import peers
from runtime.errors import Exit
from tests.processes import (
  ROOT,
  command,
  environment,
  finish_together,
  history,
  run,
  samples,
  start,
  start_together,
  wait_for,
)

# Wide enough for its kernels to be split, see `parallelism.parameter_sharding`.
WIDE = ('--config.model.width=512', '--config.training.n_iters=20')


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('one_device')
  run(workdir, *WIDE)
  return workdir


def assert_same(workdir, reference):
  """Losses to 1e-5 at every step, and samples to a grey level."""
  ours, theirs = history(workdir), history(reference)
  assert ours.keys() == theirs.keys()
  assert {step for step, name in ours if name == 'training_loss'} == set(range(1, 21))
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
  images, expected = samples(workdir), samples(reference)
  assert images.keys() == expected.keys() == {'iter_10_host_0', 'iter_20_host_0'}
  for name in images:
    assert np.abs(images[name].astype(int) - expected[name]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ('devices', 'fsdp', 'spatial'),
  [(2, 1, 1), (4, 1, 1), (8, 1, 1), (8, 8, 1), (8, 4, 1), (8, 2, 4)],
)
def test_devices_and_their_layout_change_no_number(one_device, tmp_path, devices, fsdp, spatial):
  layout = (f'--config.parallel.fsdp={fsdp}', f'--config.parallel.spatial={spatial}')
  run(tmp_path, *WIDE, *layout, devices=devices)
  assert_same(tmp_path, one_device)


@pytest.mark.slow
@pytest.mark.parametrize('layout', [(), ('--config.parallel.fsdp=8',)], ids=['whole', 'fsdp'])
def test_two_processes_of_four_devices_change_no_number(one_device, tmp_path, layout):
  finish_together(start_together(tmp_path, *WIDE, *layout, devices=4))
  assert_same(tmp_path, one_device)


@pytest.mark.slow
def test_a_run_moves_from_one_mesh_to_another(one_device, tmp_path):
  fsdp = ('--config.parallel.fsdp=4',)
  for steps, devices, layout in ((5, 1, ()), (10, 8, ()), (15, 8, fsdp), (20, 1, ())):
    run(tmp_path, *WIDE, f'--config.training.n_iters={steps}', *layout, devices=devices)
  ours, theirs = history(tmp_path), history(one_device)
  np.testing.assert_allclose([ours[key] for key in theirs], list(theirs.values()), rtol=1e-5)


MEMORY = """
import jax
from benchmarks import topology

def step_of(fsdp):
  settings = (('model.nf', 64), ('model.num_res_blocks', 1), ('parallel.fsdp', fsdp))
  case = topology.Case('vp/mnist_ddpmpp_continuous', '', batch=8, settings=settings)
  config = topology.configuration(case)
  topology.lay_out(config, jax.devices())
  step, arguments, donated = topology.train_program(config)
  compiled = jax.jit(step, donate_argnums=donated).lower(*arguments).compile()
  size = compiled.memory_analysis().argument_size_in_bytes
  return size, compiled.as_text().count(' all-gather(')

(whole, no_gathers), (split, gathers) = step_of(1), step_of(8)
assert split < 0.14 * whole, (split, whole)
assert no_gathers == 0 and gathers > 20, (no_gathers, gathers)
"""


@pytest.mark.slow
def test_fsdp_leaves_an_eighth_of_the_state_on_each_of_eight_devices():
  result = subprocess.run(
    [sys.executable, '-c', MEMORY],
    cwd=ROOT,
    env=environment(8),
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr


def test_an_impossible_layout_is_refused_in_a_sentence(tmp_path):
  result = subprocess.run(
    command(tmp_path, '--config.parallel.fsdp=3'),
    cwd=ROOT,
    env=environment(4),
    capture_output=True,
    text=True,
  )
  assert result.returncode == 1
  assert (
    result.stderr.splitlines()[-1]
    == 'UserError: parallel.fsdp=3 and parallel.spatial=1 need a multiple of 3 devices, but there '
    'are 4: choose numbers whose product divides that.'
  )
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
def test_a_killed_process_ends_the_other_with_a_sentence_and_both_resume(
  one_device, tmp_path, lost
):
  group = start_together(tmp_path, *WIDE, devices=2)
  try:
    log = tmp_path / 'metrics.jsonl'
    wait_for(lambda: log.exists() and '"step": 8' in log.read_text(), group[0])
    group[lost].kill()
    output, _ = group[1 - lost].communicate(timeout=60)
  finally:
    for process in group:
      process.kill()
  assert group[1 - lost].returncode == 75
  assert output.splitlines()[-1].startswith(f'LostProcess: process {lost} of this run is gone, so ')
  assert 'Traceback' not in output
  for output in finish_together(start_together(tmp_path, *WIDE, devices=2)):
    assert 'Resuming from' in output
  assert_same(tmp_path, one_device)


@pytest.mark.slow
@pytest.mark.parametrize('stopped', [0, 1])
def test_a_stopped_process_is_named_by_the_other_within_a_minute_and_both_resume(
  one_device, tmp_path, stopped
):
  group = start_together(tmp_path, *WIDE, devices=2)
  other = group[1 - stopped]
  try:
    log = tmp_path / 'metrics.jsonl'
    wait_for(lambda: log.exists() and '"step": 8' in log.read_text(), group[0])
    group[stopped].send_signal(signal.SIGSTOP)
    output, _ = other.communicate(timeout=60)
    assert other.returncode == Exit.LOST_PROCESS
    assert output.splitlines()[-1].startswith(
      f'LostProcess: process {stopped} of this run has been silent for 40 s, so '
    )
    assert 'Traceback' not in output
    group[stopped].send_signal(signal.SIGCONT)  # it must not go on alone
    output, _ = group[stopped].communicate(timeout=30)
    assert group[stopped].returncode == Exit.LOST_PROCESS
    assert output.splitlines()[-1].startswith(
      f'LostProcess: the other processes of this run have stopped, because process {stopped} was '
      f'silent for 40 s: '
    )
  finally:
    for process in group:
      process.kill()
  finish_together(start_together(tmp_path, *WIDE, devices=2))
  assert_same(tmp_path, one_device)


@pytest.fixture
def connected(monkeypatch):
  """Two processes that are connected, as objects of this one."""
  pair = socket.socketpair()
  monkeypatch.setattr(peers, '_BEAT_SECONDS', 0.2)
  monkeypatch.setattr(
    peers.Peers,
    '_connect',
    lambda self, *_: self._sockets.update({1 - self._index: pair[self._index]}),
  )

  @contextlib.contextmanager
  def start():
    both = [peers.Peers(i, 2, '') for i in range(2)]
    yield
    for peer in both:
      peer.leave()

  return start


def test_beats_of_processes_are_not_answered_by_beats(connected, monkeypatch):
  sent = []
  send = peers.Peers._send
  monkeypatch.setattr(peers.Peers, '_send', lambda self, x: (sent.append(x), send(self, x)))
  with connected():
    time.sleep(1)
    count = sent.count(b'b')
  assert 6 <= count <= 14


def test_a_woken_process_reads_what_came_before_it_calls_another_silent(connected, monkeypatch):
  # A wait that a stop interrupts returns nothing, although messages have come meanwhile.
  class Stopped(selectors.DefaultSelector):
    def select(self, timeout=None):
      ready = super().select(timeout)
      if ready or stopped:
        return ready
      stopped.append(True)
      time.sleep(1.2)
      return []

  stopped, ended = [], []
  monkeypatch.setattr(peers, '_SILENCE_SECONDS', 1)
  monkeypatch.setattr(selectors, 'DefaultSelector', Stopped)
  monkeypatch.setattr(peers.Peers, '_end', lambda self, *what: ended.append(what))
  with connected():
    time.sleep(2)
  assert stopped
  assert not [what for _, what in ended if 'silent' in what]


@pytest.mark.slow
def test_state_that_is_split_over_processes_is_exported_and_sampled(tmp_path):
  wide = ('--config.model.width=512', '--config.training.n_iters=2')
  layout = (*wide, '--config.parallel.fsdp=2')
  finish_together(start_together(tmp_path, *layout))
  one, two = tmp_path / 'one.safetensors', tmp_path / 'two.safetensors'
  finish_together(start_together(tmp_path, *layout, f'--checkpoint={two}', mode='export'))
  run(tmp_path, *wide, f'--checkpoint={one}', mode='export')
  jax.tree.map(np.testing.assert_array_equal, load_file(one), load_file(two))
  few = ('--config.sampling.num_samples=4', '--config.sampling.batch_size=4')
  finish_together(start_together(tmp_path, *layout, *few, mode='sample'))


@pytest.mark.slow
def test_a_classifier_that_is_split_over_processes_is_written(tmp_path):
  settings = ('name=tiny', 'n_iters=4', 'batch_size=16')
  flags = [f'--config.classifier.{setting}' for setting in settings]
  mode = {'mode': 'train_classifier'}
  run(tmp_path / 'one', *flags, **mode)
  finish_together(start_together(tmp_path / 'two', *flags, '--config.parallel.fsdp=2', **mode))
  one, two = (load_file(tmp_path / name / train_classifier.FILE) for name in ('one', 'two'))
  assert one.keys() == two.keys()
  for name, expected in one.items():
    np.testing.assert_allclose(two[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_process_whose_data_come_late_is_named_by_all(tmp_path):
  group = start_together(
    tmp_path,
    '--config.training.n_iters=100',
    '--config.training.eval_freq=100',
    own=((), ('--config.data.path=0.1',)),  # 0.8 s for a batch, longer than a step takes
    config='tests/slow_data_config.py',
  )
  named = re.compile(r'Process 1 waits for its data \d+ % of the time, the others \d+ %, and all ')
  try:
    outputs = [[], []]
    for process, lines in zip(group, outputs, strict=True):
      for line in process.stdout:
        lines.append(line)
        if named.search(line):
          break
    group[0].send_signal(signal.SIGTERM)
    finish_together(group)
  finally:
    for process in group:
      process.kill()
  assert all(named.search(lines[-1]) for lines in outputs), outputs


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_at_the_same_step_with_a_checkpoint(tmp_path):
  group = start_together(tmp_path, '--config.training.n_iters=10000')
  log = tmp_path / 'metrics.jsonl'
  wait_for(lambda: log.exists() and '"step": 8' in log.read_text(), group[0])
  group[1].send_signal(signal.SIGTERM)
  steps = {
    re.search(r'Stopped by a signal at step (\d+)', out)[1] for out in finish_together(group)
  }
  (step,) = steps
  assert (tmp_path / 'checkpoints-meta' / f'checkpoint_{step}').is_dir()


@pytest.mark.slow
def test_an_error_of_all_processes_is_reported_by_each(tmp_path):
  for process in start_together(tmp_path, '--config.optim.lr=-1', devices=2):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith('UserError: optim.lr=-1.0 must be positive')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('own', 'fact'),
  [
    (((), ('--config.optim.lr=1e-3',)), 'configuration'),
    (None, 'data'),
    (((), ('--mode=stats',)), 'mode'),
  ],
)
def test_a_process_that_was_started_otherwise_is_named_by_all(own, fact, tmp_path):
  if fact == 'data':
    # The same configuration, but other pictures at the same place on the other machine.
    own = tuple((f'--config.data.path={_pictures(tmp_path / str(i), seed=i)}',) for i in range(2))
  data = ('--config.data.dataset=ImageFolder',) if fact == 'data' else ()
  for process in start_together(tmp_path / 'run', *data, own=own):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == Exit.REFUSED, output
    assert output.splitlines()[-1] == (
      f'UserError: Process 1 of this run has another {fact} than process 0: start all processes '
      f'with the same command, from the same files.'
    )
    assert 'Traceback' not in output


def _pictures(folder, seed):
  folder.mkdir()
  noise = np.random.default_rng(seed).integers(0, 256, (20, 28, 28), np.uint8)
  for i, pixels in enumerate(noise):
    Image.fromarray(pixels).save(folder / f'{i}.png')
  return folder


@pytest.mark.slow
def test_processes_find_each_other_under_slurm(tmp_path, monkeypatch):
  job = {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
  for name, value in (job | {'SLURM_STEP_NUM_TASKS': '2', 'SLURM_LOCALID': '0'}).items():
    monkeypatch.setenv(name, value)
  group = []
  for index in range(2):
    monkeypatch.setenv('SLURM_PROCID', str(index))
    group.append(start(tmp_path, '--config.training.n_iters=5', '--coordinator=auto'))
  for output in finish_together(group):
    assert '2 x cpu in 2 processes' in output
    assert 'is a run of its own' not in output


@pytest.mark.slow
def test_separate_runs_of_a_launcher_are_told_so(tmp_path, monkeypatch):
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
  output = run(tmp_path, '--config.training.n_iters=5')
  assert 'SLURM_STEP_NUM_TASKS=2, but --coordinator is not set: each process is a run' in output


@pytest.mark.parametrize('fsdp', [0, -1])
def test_a_layout_that_splits_nothing_is_refused_in_a_sentence(tmp_path, fsdp, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # so that the program counts the devices itself
  override = f'--config.parallel.fsdp={fsdp}'
  result = subprocess.run(command(tmp_path, override), cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 1
  expected = f'UserError: parallel.fsdp={fsdp} must be at least 1, which splits nothing.'
  assert result.stderr.splitlines()[-1] == expected
