"""The directory of a run: who may write there, what is compared, and what a kill leaves."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading

import absl.logging
import numpy as np
import pytest
from PIL import Image

import datasets
import run_lib
from models import classifier
from modes import convert as conversion
from modes.preparation import prepare
from runtime import reporting
from runtime import workdir as workdirs
from runtime.checkpoints import CheckpointReader
from runtime.errors import UserError
from runtime.files import write_atomic
from tests import tiny_config
from tests.processes import ROOT, finish, history, start


def config_of(**overrides):
  config = tiny_config.get_config()
  config.training.n_iters = 5
  config.model.num_scales = 25  # more than beta_max, for samplers of the discrete chain
  config.training.snapshot_sampling = False
  for key, value in overrides.items():
    section, name = key.split('__')
    config[section][name] = value
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  run_lib.train(config_of(), workdir)
  return workdir


def content(folder):
  return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def holder_of(path, imported='runtime.workdir import at_work', call='at_work(path, "--workdir")'):
  """Another process that is at work in a folder, or holds what another call gives."""
  code = (
    'import pathlib, sys\n'
    f'from {imported}\n'
    'path = pathlib.Path(sys.argv[1])\n'
    f'with {call}:\n'
    '  print("held", flush=True)\n'
    '  sys.stdin.read()\n'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code, str(path)],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'held\n'
  return process


def test_second_run_in_a_directory_is_refused_by_name_until_the_first_ends(tmp_path):
  first = holder_of(tmp_path)
  before = content(tmp_path)
  try:
    with pytest.raises(UserError, match=rf'in use by process {first.pid} on .* since 20'):
      run_lib.train(config_of(), tmp_path)
    after = content(tmp_path)
    assert {path.name for path in after} == {path.name for path in before}
  finally:
    first.kill()
    first.communicate()
  run_lib.train(config_of(), tmp_path)  # a killed process holds nothing
  assert CheckpointReader(tmp_path / 'checkpoints').numbers() == [1]


def test_second_evaluation_and_second_sampling_are_refused_too(trained):
  config = config_of(eval__end_ckpt=1, eval__enable_bpd=False)
  for folder, attempt in (
    (trained / 'eval', lambda: run_lib.evaluate(config, trained)),
    (
      trained / 'samples' / 'unconditional_pc_step_5_seed_42',
      lambda: run_lib.sample(config, trained),
    ),
  ):
    process = holder_of(folder)
    try:
      with pytest.raises(UserError, match=f'in use by process {process.pid}'):
        attempt()
    finally:
      process.communicate('')
    shutil.rmtree(folder)


def test_each_run_in_one_process_logs_to_its_own_file(tmp_path):
  for name in ('first', 'second'):
    run_lib.train(config_of(training__n_iters=1), tmp_path / name)
  for name, other in (('first', 'second'), ('second', 'first')):
    text = (tmp_path / name / 'stdout.txt').read_text(encoding='utf-8')
    assert 'Training is complete at step 1' in text
    assert str(tmp_path / other) not in text
    assert text.count('versions: ') == 1


def test_training_outside_the_main_thread_completes(tmp_path):
  errors = []

  def train():
    try:
      run_lib.train(config_of(training__n_iters=1), tmp_path)
    except BaseException as error:
      errors.append(error)

  thread = threading.Thread(target=train)
  thread.start()
  thread.join()
  assert not errors
  assert CheckpointReader(tmp_path / 'checkpoints').numbers() == [1]


def test_tilde_in_workdir_is_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  run_lib.train(config_of(training__n_iters=1), '~/run')
  assert [path.name for path in tmp_path.iterdir()] == ['run']
  path = run_lib.export_checkpoint(config_of(), '~/run', checkpoint='~/weights.safetensors')
  assert path == tmp_path / 'weights.safetensors'
  assert int(conversion.read_state(prepare(config_of()), '~/weights.safetensors').step) == 1
  shutil.copy(datasets.ASSETS / 'mnist5k_classifier.safetensors', tmp_path / 'mine')
  assert classifier.load_classifier('~/mine').image_shape == (28, 28, 1)


def test_lines_that_are_no_metrics_are_kept_aside_and_the_run_resumes(trained, tmp_path, caplog):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  before = history(workdir)
  path = workdir / 'metrics.jsonl'
  garbage = (
    b'\xff\xfe\x00 binary\n[1, 2]\n{"step": "x"}\n\n{"step": 1e999}\n' + b'[' * 10**5 + b'\n'
  )
  damaged = garbage + path.read_bytes() + b'{"step": 5, "training_l'
  path.write_bytes(damaged)
  with caplog.at_level(logging.WARNING):
    run_lib.train(config_of(training__n_iters=6), workdir)
  after = history(workdir)
  assert {key: value for key, value in after.items() if key[0] <= 5} == before
  assert (6, 'training_loss') in after
  assert (workdir / 'metrics-damaged.jsonl').read_bytes() == damaged
  assert '6 lines that are not metrics' in caplog.text


def pictures(folder, seed, count=40):
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.RandomState(seed)
  for i in range(count):
    Image.fromarray(rng.randint(0, 256, (28, 28)).astype(np.uint8)).save(folder / f'{i}.png')
  return folder


def folder_config(path, **overrides):
  overrides = {'data__dataset': 'ImageFolder', 'data__path': str(path)} | overrides
  return config_of(**overrides)


def test_data_may_move_but_not_change(tmp_path):
  workdir, data = tmp_path / 'run', pictures(tmp_path / 'data', seed=0)
  run_lib.train(folder_config(data, training__n_iters=1), workdir)
  moved = data.rename(tmp_path / 'elsewhere')
  run_lib.train(folder_config(moved, training__n_iters=2), workdir)

  (moved / '3.png').write_bytes((moved / '4.png').read_bytes())
  before = content(workdir)
  with pytest.raises(UserError, match=r'images of the split train are not those .*data\.json'):
    run_lib.train(folder_config(moved, training__n_iters=3), workdir)
  ours = {path: data for path, data in content(workdir).items() if path.name not in LIVE}
  assert ours == {path: data for path, data in before.items() if path.name not in LIVE}

  (workdir / 'data.json').unlink()  # as the sentence says
  run_lib.train(folder_config(moved, training__n_iters=3), workdir)


LIVE = ('stdout.txt', '.lock')


def test_settings_that_are_newer_than_a_run_have_their_defaults_in_it(trained, tmp_path):
  recorded = json.loads((trained / 'config.json').read_text())
  del recorded['training']['likelihood_weighting']
  del recorded['eval']
  (tmp_path / 'config.json').write_text(json.dumps(recorded))
  config = prepare(config_of())
  workdirs.check_run(config, tmp_path)
  config.training.likelihood_weighting = True
  with pytest.raises(UserError, match=r'likelihood_weighting \(was False, is True\)'):
    workdirs.check_run(config, tmp_path)


def test_samples_guard_the_weights_and_settings_that_they_depend_on(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  sampled = {'sampling__num_samples': 2, 'sampling__batch_size': 2, 'training__n_iters': 5}
  run_lib.sample(config_of(**sampled), workdir)
  (directory,) = (workdir / 'samples').iterdir()
  before = content(directory)
  # What a method does not read may change: ddim has eta, predictor-corrector has not.
  run_lib.sample(config_of(**sampled, sampling__eta=0.5, sampling__mask='left'), workdir)
  assert {p: d for p, d in content(directory).items() if p.name not in LIVE} == {
    p: d for p, d in before.items() if p.name not in LIVE
  }
  with pytest.raises(UserError, match=r'sampling.predictor \(was'):
    run_lib.sample(config_of(**sampled, sampling__predictor='reverse_diffusion'), workdir)
  # The same step of another training.
  shutil.rmtree(workdir / 'checkpoints')
  shutil.rmtree(workdir / 'checkpoints-meta')
  (workdir / 'config.json').unlink()
  run_lib.train(config_of(optim__lr=1e-3), workdir)
  with pytest.raises(UserError, match=r'checkpoint \(was'):
    run_lib.sample(config_of(**sampled, optim__lr=1e-3), workdir)


def test_exactly_as_many_samples_are_kept_as_asked_for_and_more_can_follow(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)

  def counts(num_samples):
    config = config_of(sampling__num_samples=num_samples, sampling__batch_size=4)
    run_lib.sample(config, workdir)
    (directory,) = (workdir / 'samples').iterdir()
    rounds = [np.load(path)['samples'] for path in sorted(directory.glob('samples_*.npz'))]
    return np.concatenate(rounds)

  ten = counts(10)
  assert len(ten) == 10
  twelve = counts(12)
  assert len(twelve) == 12
  np.testing.assert_array_equal(twelve[:10], ten)


def test_a_damaged_round_is_drawn_again(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  config = config_of(sampling__num_samples=4, sampling__batch_size=2)
  run_lib.sample(config, workdir)
  (directory,) = (workdir / 'samples').iterdir()
  expected = np.load(directory / 'samples_1.npz')['samples']
  for name, damage in (('samples_1.npz', b'PK'), ('report_1.json', b''), ('report_1.json', b'[]')):
    (directory / name).write_bytes(damage)
    run_lib.sample(config, workdir)
    np.testing.assert_array_equal(np.load(directory / 'samples_1.npz')['samples'], expected)


def test_a_grid_of_very_many_images_is_bounded():
  images = np.broadcast_to(np.uint8(7), (50_000, 32, 32, 3))
  grid = reporting.image_grid(images)
  assert grid.width * grid.height < 2 * reporting.MAX_GRID_PIXELS
  one = reporting.image_grid(np.zeros((3, 8192, 4096, 1), np.uint8))
  assert one.size == (4100, 8196)


def test_what_killed_processes_leave_half_written_is_removed(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  left = [
    workdir / 'checkpoints' / 'checkpoint_9.orbax-checkpoint-tmp' / 'state',
    workdir / 'checkpoints-meta' / 'checkpoint_9.orbax-checkpoint-tmp-12' / 'state',
  ]
  for path in left:
    path.mkdir(parents=True)
  files = [
    workdir / '.config.json-abcd1234',
    workdir / 'samples/iter_5_host_0/.sample.npz-a_b1c2d3',
  ]
  others = [workdir / '.keep', workdir / 'samples/other/.samples_0.npz-abcd1234']  # at work there
  for path in (*files, *others):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  run_lib.train(config_of(), workdir)
  assert not any(path.exists() for path in (*files, *left))
  assert all(path.exists() for path in others)
  assert not list(workdir.glob('checkpoints*/*tmp*'))


def test_sampling_beside_a_training_changes_nothing_of_it(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  newest = workdir / 'checkpoints-meta' / 'checkpoint_5'
  for file in newest.glob('state/**/d/*'):
    file.write_bytes(file.read_bytes()[:-1])
  first = holder_of(workdir)
  try:
    before = content(workdir)
    run_lib.sample(config_of(sampling__num_samples=2, sampling__batch_size=2), workdir)
    ours = {p: d for p, d in content(workdir).items() if 'samples' not in p.parts}
    assert ours == before
  finally:
    first.communicate('')
  assert newest.exists()


@pytest.mark.slow
def test_divergence_without_a_checkpoint_does_not_speak_of_one(tmp_path):
  with pytest.raises(run_lib.NonFiniteLoss) as raised:
    run_lib.train(config_of(optim__lr=1e30, optim__warmup=0, optim__grad_clip=-1.0), tmp_path)
  message = str(raised.value)
  assert 'new --workdir with a lower optim.lr' in message
  assert 'checkpoints hold' not in message
  assert '\n' not in message


def test_samples_that_are_not_finite_are_refused_and_a_snapshot_says_so(trained, tmp_path, caplog):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  config = config_of(sampling__num_samples=2, sampling__batch_size=2, sampling__snr=0.1)
  config.sampling.corrector, config.sampling.snr = 'langevin', 1e30
  with pytest.raises(FloatingPointError, match='samples of the checkpoint of step 5'):
    run_lib.sample(config, workdir)
  config.training.snapshot_sampling = True
  config.training.n_iters = 6
  with caplog.at_level(logging.WARNING):
    run_lib.train(config, workdir)
  assert 'step: 6, the samples are not finite' in caplog.text


@pytest.mark.slow
def test_two_processes_of_one_run_agree_on_a_checkpoint_that_one_of_them_cannot_read(tmp_path):
  """The second process finds the newest damaged; both take the one before."""
  code = (
    'import pathlib, sys, jax\n'
    'jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))\n'
    'import train_state\n'
    'from runtime import checkpoints\n'
    'from runtime.checkpoints import CheckpointReader, DamagedCheckpoint\n'
    'from tests import tiny_config\n'
    'read = CheckpointReader._read\n'
    'def broken(self, number, wanted):\n'
    '  if number == 40 and jax.process_index() == 1: raise DamagedCheckpoint("unreadable here")\n'
    '  return read(self, number, wanted)\n'
    'CheckpointReader._read = broken\n'
    'like = train_state.abstract_state(tiny_config.get_config())[1]\n'
    'directory = CheckpointReader(pathlib.Path(sys.argv[3]))\n'
    'print("step", int(checkpoints.restore_newest([directory], like).step))\n'
  )
  import socket

  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  finish(start(tmp_path, '--config.training.snapshot_sampling=False'))
  arguments = [sys.executable, '-c', code, f'127.0.0.1:{port}']
  group = [
    subprocess.Popen(
      [*arguments, str(i), str(tmp_path / 'checkpoints-meta')],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  for process in group:
    assert 'step 35' in finish(process)


def test_the_log_is_cut_into_files_of_bounded_size(tmp_path, monkeypatch):
  monkeypatch.setattr(reporting, '_LOG_BYTES', 2000)
  with workdirs.at_work(tmp_path, '--workdir'):
    for i in range(200):
      absl.logging.warning('line %d of a long run', i)
  files = sorted(tmp_path.glob('stdout.txt*'))
  assert [file.name for file in files] == ['stdout.txt', *(f'stdout.txt.{i}' for i in (1, 2, 3))]
  assert all(file.stat().st_size <= 2000 for file in files)
  assert 'line 199 of' in files[0].read_text()


@pytest.mark.slow
def test_evaluation_leaves_out_the_checkpoints_that_training_has_removed(tmp_path, caplog):
  kept = {'training__keep_checkpoints': 'every:2', 'training__snapshot_freq': 1}
  config = config_of(**kept, training__snapshot_freq_for_preemption=1)
  run_lib.train(config, tmp_path)
  assert CheckpointReader(tmp_path / 'checkpoints').numbers() == [2, 4, 5]
  run_lib.evaluate(config_of(**kept, eval__begin_ckpt=1, eval__end_ckpt=4), tmp_path)
  assert 'Evaluating [2, 4]: training.keep_checkpoints has removed the others.' in caplog.text
  assert json.loads((tmp_path / 'eval' / 'report.json').read_text()).keys() == {'2', '4'}


def test_a_signal_while_a_file_gets_its_name_is_not_lost(tmp_path, monkeypatch):
  replace = os.replace

  def replace_and_interrupt(*paths):
    replace(*paths)
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'replace', replace_and_interrupt)
  with pytest.raises(KeyboardInterrupt):
    write_atomic(tmp_path / 'a', b'1')
  assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_a_file_of_a_long_name_is_written_or_named_if_it_cannot_be(tmp_path):
  write_atomic(tmp_path / ('\u4e16' * 80), b'1')  # of three bytes each
  path = tmp_path / ('x' * 256)
  with pytest.raises(OSError, match='too long') as caught:
    write_atomic(path, b'1')
  assert caught.value.filename == str(path)
  assert [len(file.name) for file in tmp_path.iterdir()] == [80]


def test_a_file_replaces_what_killed_writers_left_of_it_and_not_what_others_write(tmp_path):
  def writer():
    report = tmp_path / 'report[1].html'
    return holder_of(report, 'runtime.files import open_atomic', 'open_atomic(path)')

  of_somebody = tmp_path / '.report[1].html-original'
  of_somebody.write_text('kept')
  killed = writer()
  killed.kill()
  killed.wait()
  (partial,) = set(tmp_path.iterdir()) - {of_somebody}
  living = writer()
  assert not partial.exists()
  write_atomic(tmp_path / 'report[1].html', b'1')
  living.communicate('')
  assert living.returncode == 0
  assert {path.name for path in tmp_path.iterdir()} == {'report[1].html', of_somebody.name}
