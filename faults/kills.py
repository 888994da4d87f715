"""Kills the real program at random moments, restarts it, and compares with an undisturbed run.

python -m faults.kills --kills=300

Each task is run once undisturbed. Then it is started again from the same files, killed with SIGKILL
or SIGTERM at random moments and restarted until it ends by itself. What it leaves must be the same
files with the same content to the last bit: parameters, optimizer, moving average, losses, images
and reports, and no temporary file beside them.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

REPOSITORY = pathlib.Path(__file__).parent.parent
CONFIG = 'tests/tiny_config.py'

# After a signal: a training saves first.
_SECONDS_TO_END = 60.0
# What differs from run to run: logs, and what is measured.
_LATEST = 'checkpoints-meta'
_UNCOMPARED = ('stdout.txt', '.lock', 'start.json')
_MEASURED = ('images_per_second', 'memory', 'seconds')
_TIME = re.compile(rb'\d{4}-\d\d-\d\d \d\d:\d\d')  # at which a page was written


@dataclasses.dataclass(frozen=True)
class Task:
  """Something that the program does in a folder.

  Attributes:
    mode: the mode.
    needs: the task that leaves the files that this one starts from; '' for none.
    overrides: flags; {folder} stands for the folder, which is `--workdir` and holds all files.
  """

  mode: str
  needs: str = ''
  overrides: tuple[str, ...] = ()

  def command(self, folder: pathlib.Path) -> list[str]:
    """The command line of the task in a folder."""
    overrides = [text.format(folder=folder) for text in self.overrides]
    arguments = [f'--mode={self.mode}', f'--config={CONFIG}', f'--workdir={folder}', *overrides]
    return [sys.executable, 'main.py', *arguments]


TASKS = {
  'train': Task('train'),
  'train_classifier': Task(
    'train_classifier',
    overrides=(
      '--config.classifier.name=tiny',
      '--config.classifier.n_iters=40',
      '--config.classifier.batch_size=16',
    ),
  ),
  'sample': Task(
    'sample',
    'train',
    ('--config.sampling.num_samples=96', '--config.sampling.batch_size=16'),
  ),
  'stats': Task('stats', 'train', ('--config.eval.stats_path={folder}/stats.npz',)),
  'eval': Task(
    'eval',
    'stats',
    (
      '--config.eval.stats_path={folder}/stats.npz',
      '--config.eval.enable_sampling=True',
      '--config.eval.enable_bpd=True',
      '--config.eval.bpd_repeats=1',
      '--config.eval.begin_ckpt=4',
      '--config.eval.num_samples=256',
    ),
  ),
  'report': Task('report', 'train'),
  'inspect_data': Task('inspect_data'),
  'export': Task('export', 'train', ('--checkpoint={folder}/weights.safetensors',)),
  'import': Task(
    'import',
    'weights',
    ('--checkpoint={folder}/weights.safetensors',),
  ),
  'prepare_data': Task(
    'prepare_data',
    'pictures',
    (
      '--config.data.dataset=ImageFolder',
      '--config.data.path={folder}/pictures',
      '--config.data.cache_dir={folder}/cache',
      '--config.data.num_workers=2',
    ),
  ),
}


def _write_pictures(folder: pathlib.Path) -> None:
  """Writes 3,000 pictures in two classes, always with the same times: a cache depends on them."""
  noise = np.random.default_rng(0)
  for i in range(3000):
    path = folder / 'pictures' / ('cat', 'dog')[i % 2] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.integers(0, 256, (40, 36), np.uint8)).save(path)
    os.utime(path, (10**9, 10**9))


def digest(folder: pathlib.Path) -> dict[str, str]:
  """The files of a folder that must be the same in every run, and a checksum of what they hold."""
  return {str(path.relative_to(folder)): checksum for path, checksum in _entries(folder)}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
  """Each file in which two results of `digest` differ, and whether it is lost, new or changed."""
  return [
    f'{path} is {"lost" if path not in found else "new" if path not in expected else "changed"}'
    for path in sorted(expected.keys() | found.keys())
    if expected.get(path) != found.get(path)
  ]


def _entries(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
  newest = max(map(_number, folder.iterdir()), default=0) if folder.name == _LATEST else 0
  for path in sorted(folder.iterdir()):
    if path.name in (*_UNCOMPARED, 'tensorboard', 'pictures'):
      continue
    if 0 < _number(path) < newest:  # of a step at which SIGTERM came, if one did
      yield path.with_name('older'), ''
    elif (path / 'metadata' / 'metadata').is_file():  # a checkpoint: the checksums of its arrays
      yield path, (path / 'metadata' / 'metadata').read_text(encoding='utf-8')
    elif path.is_dir():
      yield from _entries(path)
    elif path.suffix in ('.json', '.jsonl'):
      text = path.read_text(encoding='utf-8')
      objects = map(json.loads, text.splitlines() if path.suffix == '.jsonl' else [text])
      kept = [_without_measured(content) for content in objects]
      yield path, hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    else:
      content = path.read_bytes()
      if path.suffix == '.html':  # a report, which names its folder and the time
        content = _TIME.sub(b'', content).replace(folder.name.encode(), b'')
      yield path, hashlib.sha256(content).hexdigest()


def _number(path: pathlib.Path) -> int:
  """The number of a checkpoint; 0 for every other file."""
  match = re.fullmatch(r'checkpoint_(\d+)', path.name)
  return int(match[1]) if match else 0


def _without_measured(content: object) -> object:
  if not isinstance(content, dict):
    return content
  return {key: x for key, x in content.items() if key not in _MEASURED}


class Soak:
  """The kills of all tasks, and what they led to.

  Args:
    root: a folder for everything.
    rng: draws the moments and the signals.

  Attributes:
    log: one entry for each kill, and one for each run that ended by itself.
    problems: sentences about everything that went wrong.
  """

  def __init__(self, root: pathlib.Path, rng: random.Random):
    self.log: list[dict] = []
    self.problems: list[str] = []
    self._root, self._rng = root, rng
    self._environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # the programs run for less time than that takes
      'JAX_COMPILATION_CACHE_DIR': str(root / 'compiled'),  # also written to while it is killed
    }
    self._seconds: dict[str, float] = {}

  def kill(self, name: str, kills: int) -> None:
    """Kills a task at least so many times; the last run of it ends by itself."""
    expected = digest(self.undisturbed(name))
    done = 0
    while done < kills:
      folder = self._fresh(name)
      count = self._run_until_done(name, folder)
      done += count
      differing = differences(expected, digest(folder))
      self._note(name, 'completed', kills=count, differing=differing)
      if differing:
        self.problems.append(f'{name}: after {count} kills {differing}')
      shutil.rmtree(folder)

  def undisturbed(self, name: str) -> pathlib.Path:
    """The folder of a task that nobody has killed."""
    folder = self._root / f'undisturbed_{name}'
    if folder.exists():
      return folder
    self._copy(name, folder)
    for again in (False, True):  # the second time everything is compiled, as in the runs to come
      if again:
        shutil.rmtree(folder)
        self._copy(name, folder)
      start = time.monotonic()
      process = self._start(name, folder)
      output, _ = process.communicate()
      if process.returncode:
        raise RuntimeError(f'The undisturbed task {name} has failed:\n{output}')
      self._seconds[name] = time.monotonic() - start
    return folder

  def _copy(self, name: str, folder: pathlib.Path) -> None:
    """Puts the files that a task starts from into a folder."""
    needs = TASKS[name].needs
    folder.mkdir()
    if needs == 'pictures':
      _write_pictures(folder)
    elif needs == 'weights':  # an import starts a new run
      shutil.copy(self.undisturbed('export') / 'weights.safetensors', folder)
    elif needs:
      shutil.copytree(self.undisturbed(needs), folder, dirs_exist_ok=True)

  def _fresh(self, name: str) -> pathlib.Path:
    folder = self._root / f'killed_{name}'
    self._copy(name, folder)
    return folder

  def _start(self, name: str, folder: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
      TASKS[name].command(folder),
      cwd=REPOSITORY,
      env=self._environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,  # so that the processes that it starts can be found
    )

  def _run_until_done(self, name: str, folder: pathlib.Path) -> int:
    """Starts and kills the program until it ends by itself; returns the number of kills."""
    for kills in range(1000):
      number = self._rng.choice([signal.SIGKILL, signal.SIGTERM])
      start = time.monotonic()
      process = self._start(name, folder)
      try:
        # Not while Python is still importing: nothing is at stake then. The longest time grows, in
        # case the machine has become slower.
        process.wait(self._seconds[name] * self._rng.uniform(0.3, 1.1 + 0.05 * kills))
      except subprocess.TimeoutExpired:
        process.send_signal(number)
      else:
        output = process.stdout.read()
        if process.returncode:
          self.problems.append(f'{name}: exit status {process.returncode}\n{output}')
        if not kills:  # the undisturbed run may have had a slow moment, after which no kill comes
          self._seconds[name] = min(self._seconds[name], time.monotonic() - start)
        return kills
      start = time.monotonic()
      try:  # until the processes that it started have ended too
        output, _ = process.communicate(timeout=_SECONDS_TO_END)
      except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        sent = signal.Signals(number).name
        self.problems.append(f'{name}: runs {_SECONDS_TO_END:.0f} s after {sent}\n{output}')
      seconds = time.monotonic() - start
      self._note(name, signal.Signals(number).name, seconds=seconds, status=process.returncode)
      # A training that has saved ends with 0; any mode may also end just before the signal comes.
      if process.returncode not in (0, -number, 128 + number) or 'Traceback' in output:
        self.problems.append(f'{name}: exit status {process.returncode}\n{output}')
    raise RuntimeError(f'{name} has not ended after 1000 kills.')

  def _note(self, name: str, event: str, **facts: object) -> None:
    self.log.append({'task': name, 'event': event, **facts})


def table(log: list[dict]) -> str:
  """The kills of each task by signal, and how many of its runs differed."""
  rows = ['| mode | SIGKILL | SIGTERM | runs compared | differences | slowest end after SIGTERM |']
  rows.append('|---|---|---|---|---|---|')
  total = collections.Counter()
  for name in dict.fromkeys(entry['task'] for entry in log):
    own = [entry for entry in log if entry['task'] == name]
    count = collections.Counter(entry['event'] for entry in own)
    count['differing'] = sum(bool(entry.get('differing')) for entry in own)
    slowest = max((entry['seconds'] for entry in own if entry['event'] == 'SIGTERM'), default=0.0)
    total += count
    rows.append(_row(name, count) + f' {slowest:.1f} s |')
  return '\n'.join([*rows, _row('all', total) + ' |'])


def _row(name: str, count: collections.Counter) -> str:
  columns = ('SIGKILL', 'SIGTERM', 'completed', 'differing')
  return ' | '.join([f'| {name}', *(str(count[column]) for column in columns)]) + ' |'


def soak(
  kills: int,
  names: list[str],
  seed: int,
  report: Callable[[Soak], None] = lambda soak: None,
) -> Soak:
  """Kills tasks in turn, so that what is known grows evenly.

  Args:
    kills: how many times at least, over all tasks.
    names: the tasks.
    seed: of the moments and signals.
    report: called after each task of each turn.
  """
  with tempfile.TemporaryDirectory(prefix='kills-') as root:
    result = Soak(pathlib.Path(root), random.Random(seed))
    while (done := sum(entry['event'] != 'completed' for entry in result.log)) < kills:
      for name in names:
        result.kill(name, max(1, min(5, (kills - done) // len(names))))
        report(result)
  return result


def main() -> None:
  """Runs the soak of the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=300, help='how many, over all tasks')
  parser.add_argument('--tasks', nargs='+', default=list(TASKS), choices=list(TASKS))
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--log', type=pathlib.Path, help='a file for one JSON line for each event')
  given = parser.parse_args()

  def report(result: Soak) -> None:
    kills = sum(entry['event'] != 'completed' for entry in result.log)
    print(f'{kills} kills, {len(result.problems)} problems', *result.problems[-1:], flush=True)
    if given.log:
      given.log.write_text('\n'.join(map(json.dumps, result.log)) + '\n')

  result = soak(given.kills, given.tasks, given.seed, report)
  print(table(result.log))
  print('\n\n'.join(result.problems))
  sys.exit(bool(result.problems))


if __name__ == '__main__':
  main()
