"""The command line as people write it: every mistake is a sentence, and nothing is lost."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import run_lib
from runtime.errors import Exit, UserError
from tests import tiny_config
from tests.processes import CONFIG, ROOT, command, environment, wait_for


def main(*arguments, **variables):
  """Exit code and output of main.py, without a traceback unless it is a fault of the program."""
  process = subprocess.run(
    [sys.executable, 'main.py', *map(str, arguments)],
    cwd=ROOT,
    env=environment() | variables,
    capture_output=True,
    text=True,
    timeout=300,
  )
  output = process.stdout + process.stderr
  assert ('Traceback' in output) == (process.returncode == Exit.FAULT), output
  return process.returncode, output


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  config = tiny_config.get_config()
  config.training.update(n_iters=1, snapshot_sampling=False)
  run_lib.train(config, workdir)
  return workdir


# It imports neither JAX nor a network, so that a mistake in the flags is answered at once.
LIGHT = 'configs/vp/mnist_ddpmpp_continuous.py'

MISTAKES = {
  'an unknown override after a path with a space': (
    ['--config', LIGHT, '--config.training.bach_size=3'],
    "Unknown config.training key 'bach_size': choose one of batch_size",
  ),
  'an override of a value as if it were a section': (
    [f'--config={LIGHT}', '--config.seed.x=3'],
    '--config.seed.x: config.seed is a value, not a section',
  ),
  'a configuration that does not exist': (['--config', 'nothing.py'], 'nothing.py does not exist'),
  'two configurations': (
    [f'--config={LIGHT}', '--config', 'configs/vp/cifar10_ddpmpp.py', '--config.seed=3'],
    f'--config is given twice, as {LIGHT} and configs/vp/cifar10_ddpmpp.py: name one file.',
  ),
  'a configuration without its argument': (
    ['--config=tests/argument_config.py'],
    "missing 1 required positional argument: 'which'; write tests/argument_config.py:argument",
  ),
  'a file that is no configuration': (
    ['--config=tests/golden/fill.py'],
    'has no function get_config()',
  ),
  'a flag file that does not exist': (['--flagfile=nothing.txt'], 'nothing.txt'),
  'an empty directory': ([f'--config={LIGHT}', '--workdir='], '--workdir must name a directory'),
  'processes without numbers': (
    [f'--config={CONFIG}', '--coordinator=127.0.0.1:1', '--num_processes=2'],
    'give all three',
  ),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_mistake_is_a_sentence(case, tmp_path):
  arguments, message = MISTAKES[case]
  code, output = main('--mode=train', f'--workdir={tmp_path / "run"}', *arguments)
  assert code != 0
  assert message in output
  assert not (tmp_path / 'run').exists()


def test_unknown_override_in_a_flag_file_is_a_sentence(tmp_path):
  path = tmp_path / 'flags.txt'
  path.write_text(f'--config={LIGHT}\n--config.model.widht=3\n')
  code, output = main('--mode=train', f'--workdir={tmp_path / "run"}', f'--flagfile={path}')
  assert code != 0
  assert "Unknown config.model key 'widht'" in output


@pytest.mark.slow
def test_configuration_with_an_argument_that_uses_jax_when_loaded_trains(tmp_path):
  devices = {'XLA_FLAGS': ''}  # main.py makes the devices itself
  arguments = ['--mode=train', f'--workdir={tmp_path}']
  config = '--config=tests/argument_config.py:'
  one_step = ['--config.training.n_iters=1', '--config.training.snapshot_sampling=False']
  code, output = main(*arguments, config + 'thin', *one_step, **devices)
  assert code == 0, output
  assert 'fixes the number of CPU devices at one' in output
  code, output = main(*arguments, config + 'wide', *one_step, **devices)
  assert code == 1
  assert 'model.width (was 4, is 8)' in output


def test_modes_refuse_a_configuration_that_is_not_that_of_the_run(trained):
  """Samples and numbers are those of the run: another SDE or schedule is not taken for it."""
  before = {path: path.stat().st_mtime_ns for path in trained.rglob('*')}
  cases = [
    (run_lib.sample, 'training.sde', 'subvpsde', "training.sde (was 'vpsde', is 'subvpsde')"),
    (run_lib.evaluate, 'model.beta_max', 10.0, 'model.beta_max (was 20.0, is 10.0)'),
    (run_lib.export_checkpoint, 'model.width', 16, 'model.width (was 8, is 16)'),
  ]
  for mode, name, value, message in cases:
    config = tiny_config.get_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=re.escape(message)):
      mode(config, trained)
  override = '--config.model.width=16'
  code, output = main('--mode=export', f'--config={CONFIG}', f'--workdir={trained}', override)
  assert code == 1
  assert 'model.width (was 8, is 16)' in output
  assert {path: path.stat().st_mtime_ns for path in trained.rglob('*')} == before


def test_double_precision_with_a_run_without_it_is_no_damage(trained):
  arguments = [f'--config={CONFIG}', f'--workdir={trained}', '--config.sampling.num_samples=2']
  arguments += ['--config.sampling.batch_size=2']
  code, output = main('--mode=sample', *arguments, JAX_ENABLE_X64='1')
  assert code == 1
  assert 'damaged' not in output
  assert 'JAX_ENABLE_X64 as it was then' in output


@pytest.mark.parametrize('content', ['', '{"training": {', '[1, 2]', '{"a": 1}'])
def test_damaged_config_json_is_named_and_kept(content, tmp_path):
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(UserError) as error:
    run_lib.train(tiny_config.get_config(), tmp_path)
  assert 'config.json' in str(error.value)
  assert 'restore it from a copy, or use another --workdir' in str(error.value)
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']
  assert (tmp_path / 'config.json').read_text() == content


@pytest.mark.slow
def test_a_locale_without_utf8_trains_in_a_directory_with_an_umlaut(tmp_path):
  locale = {'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'LC_ALL': 'POSIX'}
  workdir = tmp_path / 'läufe'
  arguments = ['--mode=train', f'--config={CONFIG}', f'--workdir={workdir}']
  for n_iters in (1, 2):
    code, output = main(*arguments, f'--config.training.n_iters={n_iters}', **locale)
    assert code == 0, output
  assert (workdir / 'metrics.jsonl').exists()


def test_directory_that_cannot_be_written_to_is_named(tmp_path):
  (tmp_path / 'file').touch()
  code, output = main('--mode=train', f'--config={CONFIG}', f'--workdir={tmp_path / "file"}')
  assert code == 1
  assert '--workdir' in output
  assert 'choose another' in output


def test_full_disk_is_a_sentence_and_the_same_command_resumes(tmp_path):
  """A limit on the size of files fails as a full disk does: while the arrays are written."""
  limited = (
    'import resource, runpy, sys\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n'
    'sys.argv[0] = "main.py"\n'
    'runpy.run_path("main.py", run_name="__main__")\n'
  )
  arguments = ['--mode=train', f'--config={CONFIG}', f'--workdir={tmp_path}']
  arguments += ['--config.training.n_iters=5', '--config.training.snapshot_sampling=False']
  variables = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0', 'JAX_COMPILATION_CACHE_DIR': ''}
  process = subprocess.run(
    [sys.executable, '-c', limited, *arguments],
    cwd=ROOT,
    env=environment() | variables,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert process.returncode == Exit.STORAGE
  assert 'Traceback' not in process.stderr
  sentences = [line for line in process.stderr.splitlines() if 'rerun the same command' in line]
  assert len(sentences) == 1, process.stderr
  assert 'File too large' in sentences[0]
  code, output = main(*arguments)
  assert code == 0, output
  assert 'Training is complete at step 5' in output


def test_own_pictures_are_prepared_inspected_and_trained_on(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (30, 40, 36, 3), np.uint8)
  for i, pixels in enumerate(noise):
    folder = tmp_path / 'pictures' / ('cat', 'dog')[i % 2]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f'{i}.png')
  (folder / 'broken.jpg').write_bytes(b'a text')
  common = [
    f'--config.data.path={tmp_path / "pictures"}',
    f'--config.data.cache_dir={tmp_path / "cache"}',
  ]
  recipe = '--config=configs/ve/pictures_ncsnpp_continuous.py:laptop'
  for _ in range(2):
    code, output = main('--mode=prepare_data', recipe, *common)
    assert code == 0
    counts = [int(n) for n in re.findall(r'ImageFolder, \w+: (\d+) images', output)]
    assert sum(counts) == 30
    assert output.count('2 classes') == 2
  assert '1 x not a picture (dog/broken.jpg)' not in output  # it is known by now
  workdir = tmp_path / 'run'
  code, output = main('--mode=inspect_data', recipe, *common, f'--workdir={workdir}')
  assert code == 0
  assert 'config.model.sigma_max = ' in output
  assert {path.name for path in (workdir / 'data').iterdir()} == {
    'augmented.png',
    'report.json',
    'test.png',
    'train.png',
  }
  tiny = ['--config=tests/tiny_config.py', '--config.data.dataset=ImageFolder']
  steps = ['--config.training.n_iters=2', '--config.training.snapshot_sampling=False']
  code, output = main('--mode=train', *tiny, *steps, *common, f'--workdir={workdir}')
  assert code == 0
  recorded = json.loads((workdir / 'data.json').read_text())
  assert recorded['class_names'] == ['cat', 'dog']
  assert recorded['num_classes'] == 2


def test_a_signal_ends_a_mode_with_the_command_that_resumes_it(trained):
  long = '--config.sampling.n_steps=200000'
  arguments = command(trained, long, '--config.sampling.method=ddim', mode='sample')
  process = subprocess.Popen(
    arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
  )
  wait_for(lambda: list(trained.glob('samples/*ddim*/settings.json')), process)
  process.send_signal(signal.SIGTERM)
  _, output = process.communicate(timeout=120)
  assert process.returncode == 128 + signal.SIGTERM
  assert output.splitlines()[-1] == (
    f'Stopped by a signal; the files written before are intact. To resume, run: '
    f'{shlex.join(arguments)}'
  )
  assert 'Traceback' not in output


ENDLESS = """
import jax
import jax.numpy as jnp
from samplers.base import Sampler, register_sampler
from tests import tiny_config

class Endless(Sampler):
  n_steps = 1
  def init(self, score_fn, condition, rng, shape, z):
    jax.debug.callback(lambda: print('compiled', flush=True))
    return (jax.lax.while_loop(lambda x: jnp.all(x < 2), lambda x: x * 0.9, jnp.zeros(shape)),)
  def step(self, score_fn, condition, i, carry):
    return carry
  def result(self, score_fn, condition, carry):
    return carry[0]

register_sampler(name='endless')(lambda config, sde, eps: Endless())

def get_config():
  config = tiny_config.get_config()
  config.sampling.method = 'endless'
  return config
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_compiled_program_that_python_waits_for(trained, number, tmp_path):
  (tmp_path / 'endless.py').write_text(ENDLESS)
  # Where tests run in the background, SIGINT is ignored, which processes that they start inherit.
  previous = signal.signal(number, signal.SIG_DFL)
  process = subprocess.Popen(
    command(trained, mode='sample', config=tmp_path / 'endless.py'),
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  signal.signal(number, previous)
  assert process.stdout.readline() == 'compiled\n'
  start = time.monotonic()
  process.send_signal(number)
  try:
    _, output = process.communicate(timeout=60)
  finally:
    process.kill()
  assert time.monotonic() - start < 15
  assert process.returncode == 128 + number
  assert output.splitlines()[-1].startswith('Stopped by a signal; the files written before are')


DROPPING = """
import os, signal, sys, time
import main
from runtime import startup

class Last:
  def __del__(self):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # the handler runs here, and Python drops what it raises

signal.signal(signal.SIGTERM, main._interrupt)
sys.unraisablehook = startup.unraisable
try:
  Last()
  print('dropped', flush=True)
  time.sleep(60)
except KeyboardInterrupt as stop:
  print('stopped by', stop.args[0])
"""


def test_a_signal_that_comes_where_python_drops_exceptions_comes_again():
  process = subprocess.run(
    [sys.executable, '-c', DROPPING], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert process.stdout == f'dropped\nstopped by {int(signal.SIGTERM)}\n'
  assert process.stderr == ''


FAILING = """
import threading, time
from models.utils import register_model
import flax.linen as nn
from tests import tiny_config

@register_model(name='failing')
class Failing(nn.Module):
  @nn.compact
  def __call__(self, x, labels, train=True):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    raise {error}

def get_config():
  config = tiny_config.get_config()
  config.model.name = 'failing'
  return config
"""


@pytest.mark.parametrize(
  ('error', 'status', 'last'),
  [
    ("RuntimeError('boom')", Exit.FAULT, 'RuntimeError: boom'),
    ('MemoryError()', Exit.MEMORY, 'OutOfMemory: no memory is left. Lower the batch size of'),
    ("OSError(5, 'I/O error', 'a.txt')", Exit.STORAGE, 'OSError: I/O error: a.txt. The files'),
    ("FloatingPointError('nan')", Exit.NOT_FINITE, 'FloatingPointError: nan'),
  ],
)
def test_each_kind_of_failure_has_its_status_and_waits_for_no_thread(error, status, last, tmp_path):
  (tmp_path / 'failing.py').write_text(FAILING.format(error=error))
  start = time.monotonic()
  code, output = main(
    '--mode=train', f'--config={tmp_path / "failing.py"}', f'--workdir={tmp_path / "run"}'
  )
  assert time.monotonic() - start < 60  # of 1000 that the thread would wait
  assert code == status
  assert any(line.startswith(last) for line in output.splitlines()), output


def test_a_second_signal_does_not_interrupt_the_end(tmp_path):
  (tmp_path / 'failing.py').write_text(FAILING.format(error="RuntimeError('boom')"))
  process = subprocess.Popen(
    command(tmp_path / 'run', config=tmp_path / 'failing.py'),
    cwd=ROOT,
    env=environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  for line in process.stderr:
    if line.startswith('RuntimeError: boom'):
      break
  # It waits for the thread, for some seconds; a handler that raised would change the status.
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None
  _, output = process.communicate(timeout=60)
  assert process.returncode == Exit.FAULT
  assert 'KeyboardInterrupt' not in output


def test_help_whose_reader_leaves_ends_quietly():
  shell = f'set -o pipefail; {shlex.quote(sys.executable)} main.py --help | head -n 1'
  process = subprocess.run(['bash', '-c', shell], cwd=ROOT, capture_output=True, text=True)
  assert process.stdout
  assert process.stderr == ''
  assert process.returncode in (0, 1, 128 + signal.SIGPIPE)  # 1 is that of --help itself


def test_a_cache_that_cannot_be_written_to_is_reported(tmp_path):
  arguments = ['--mode=train', f'--config={CONFIG}', f'--workdir={tmp_path}', '--dry_run']
  code, output = main(*arguments, JAX_COMPILATION_CACHE_DIR='/proc/nowhere')
  assert code == 0
  assert 'Compiled programs are not kept, because /proc/nowhere cannot be written to' in output


@pytest.mark.parametrize('name', ['requirements.txt', 'requirements-dev.txt', 'requirements.lock'])
def test_no_requirement_is_tensorflow(name):
  lines = (ROOT / name).read_text().splitlines()
  packages = {re.match(r'[\w.-]*', line)[0].replace('_', '-').lower() for line in lines}
  assert 'jax' in packages or name == 'requirements-dev.txt'
  assert not packages & {'tensorflow', 'tensorflow-cpu', 'tf-nightly', 'tensorflow-gan'}
