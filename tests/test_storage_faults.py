"""What the real program does when the disk fails it: full, read-only, damaged, renamed."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest

from faults.kills import digest
from runtime.errors import Exit
from tests.processes import ROOT, command, environment, finish, run, start, wait_for

STEPS = ('--config.training.n_iters=20', '--config.training.snapshot_sampling=False')
# Long enough to fail in the middle: no process may outlive its failure by more than ten seconds.
SECONDS_TO_END = 10


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  run(workdir, *STEPS)
  return workdir


@pytest.fixture
def disk(tmp_path):
  """A small disk, with a function that mounts it anew with other options."""
  folder = tmp_path / 'disk'
  folder.mkdir()

  def mount(options):
    arguments = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
    return subprocess.run(arguments, capture_output=True, text=True).returncode == 0

  if os.name != 'posix' or not mount('size=100m'):
    pytest.skip('a file system can only be mounted by root')
  yield folder, lambda options: mount(f'remount,{options}')
  subprocess.run(['umount', '-l', str(folder)], check=True)


def fail(process, began=None):
  """Waits for a failure, which must be soon after `began`; returns the status and the output."""
  output, _ = process.communicate(timeout=300)
  if began is not None:
    assert time.monotonic() - began < SECONDS_TO_END
  assert 'Traceback' not in output, output
  assert len(output.splitlines()) < 150, output
  return process.returncode, output


def at_step(workdir, step):
  metrics = workdir / 'metrics.jsonl'
  return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()


@pytest.mark.parametrize(
  ('full', 'enough'),
  [('size=60k', 'size=100m'), ('size=100m,nr_inodes=30', 'size=100m,nr_inodes=10000')],
  ids=['bytes', 'inodes'],
)
def test_a_full_disk_is_one_sentence_and_the_run_resumes(full, enough, disk, undisturbed):
  folder, remount = disk
  assert remount(full)
  status, output = fail(start(folder / 'run', *STEPS))
  assert status == Exit.STORAGE, output
  last = output.splitlines()[-1]
  assert 'fix the cause and rerun the same command, which resumes' in last
  assert 'left on device' in last or 'No space' in last
  assert remount(enough)
  run(folder / 'run', *STEPS)
  assert digest(folder / 'run') == digest(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('options', ['ro', 'size=4k'], ids=['read-only', 'full'])
def test_a_disk_that_fails_in_the_middle_ends_the_run_soon(options, disk, undisturbed):
  folder, _ = disk
  workdir = folder / 'run'
  process = start(workdir, '--config.training.n_iters=2000', STEPS[1])
  wait_for(at_step(workdir, 12), process)
  if options == 'ro':
    # The system refuses to make a disk read-only while files are open for writing.
    shutil.rmtree(workdir / 'checkpoints-meta')
    (workdir / 'checkpoints-meta').touch()
    broken = time.monotonic()
  else:
    ballast = folder / 'ballast'
    with ballast.open('wb') as file, pytest.raises(OSError, match='No space'):
      file.write(bytes(200_000_000))
    broken = time.monotonic()
  status, output = fail(process, broken)
  assert status == Exit.STORAGE, output
  assert 'rerun the same command' in output.splitlines()[-1]
  for path in (workdir / 'checkpoints-meta', folder / 'ballast'):
    if path.is_file():
      path.unlink()
  run(workdir, *STEPS, '--config.training.n_iters=20')


def test_a_folder_that_is_read_only_is_refused_before_anything_starts(disk):
  folder, remount = disk
  assert remount('ro')
  status, output = fail(start(folder / 'run', *STEPS))
  assert status != 0
  assert f'--workdir: nothing can be written to {folder / "run"} (Read-only file system)' in output


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def _each_data_file(damage):
  return lambda checkpoint: [damage(path) for path in checkpoint.glob('state/**/d/*')]


DAMAGES = {
  'truncated': _each_data_file(_truncate),
  'a bit flipped': _each_data_file(_flip),
  'an array file missing': _each_data_file(pathlib.Path.unlink),
  'metadata missing': lambda checkpoint: (checkpoint / 'metadata' / 'metadata').unlink(),
  'metadata empty': lambda checkpoint: (checkpoint / 'metadata' / 'metadata').write_text(''),
}


@pytest.mark.parametrize('damage', [pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, undisturbed, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(undisturbed, workdir)
  newest = [workdir / 'checkpoints-meta/checkpoint_20', workdir / 'checkpoints/checkpoint_2']
  for checkpoint in newest:
    DAMAGES[damage](checkpoint)
  output = run(workdir, *STEPS)
  for checkpoint in newest:
    assert f'{checkpoint} is damaged' in output
  assert f'Resuming from {workdir / "checkpoints-meta/checkpoint_15"}, step 15.' in output
  found = digest(workdir)
  kept = {path for path in found if path.partition('/')[2].startswith('damaged-')}
  assert {path: x for path, x in found.items() if path not in kept} == digest(undisturbed)
  assert kept


def test_what_tools_that_copy_files_leave_is_ignored(undisturbed, tmp_path):
  """Half copies, and names in capitals from a file system that does not tell them apart."""
  workdir = tmp_path / 'run'
  shutil.copytree(undisturbed, workdir)
  for name in ('checkpoint_20.tmp', '.checkpoint_20.Xa81', 'checkpoint_20 (conflict)'):
    shutil.copytree(workdir / 'checkpoints-meta/checkpoint_15', workdir / 'checkpoints-meta' / name)
  (workdir / 'checkpoints-meta/checkpoint_20').rename(workdir / 'checkpoints-meta/CHECKPOINT_20')
  (workdir / 'checkpoints/checkpoint_2').rename(workdir / 'checkpoints/CHECKPOINT_2')
  output = run(workdir, *STEPS)
  assert 'checkpoint_15, step 15' in output
  found = digest(workdir)
  assert {path: found.get(path) for path in digest(undisturbed)} == digest(undisturbed)


@pytest.mark.slow
def test_files_from_the_future_do_not_confuse_a_run(undisturbed, tmp_path):
  """The clock was set back: everything that is there is newer than now."""
  run(tmp_path / 'run', *STEPS, '--config.training.n_iters=10')
  future = time.time() + 10**7
  for path in (tmp_path / 'run').rglob('*'):
    os.utime(path, (future, future))
  run(tmp_path / 'run', *STEPS)
  assert digest(tmp_path / 'run') == digest(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['with spaces and, commas', 'läufe/ß', '/'.join(['x' * 100] * 3)])
def test_a_workdir_with_an_unusual_path_trains_and_resumes(name, undisturbed, tmp_path):
  workdir = tmp_path / name
  run(workdir, *STEPS, '--config.training.n_iters=10')
  run(workdir, *STEPS)
  assert digest(workdir) == digest(undisturbed)


def test_a_home_in_the_path_is_expanded(undisturbed, tmp_path):
  process = subprocess.Popen(
    command('~/run', *STEPS),
    cwd=ROOT,
    env=environment() | {'HOME': str(tmp_path)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  finish(process)
  assert digest(tmp_path / 'run') == digest(undisturbed)


def test_a_second_process_is_refused_and_told_who_is_at_work(tmp_path):
  first = start(tmp_path, '--config.training.n_iters=100000')
  wait_for(at_step(tmp_path, 1), first)
  status, output = fail(start(tmp_path, '--config.training.n_iters=100000'))
  first.kill()
  first.communicate()
  assert status == Exit.REFUSED
  assert f'{tmp_path} is in use by process {first.pid} on ' in output
  # The lock of a killed process is none.
  run(tmp_path, '--config.training.n_iters=1', '--config.training.snapshot_sampling=False')
