"""The directory of a run: its configuration, the process that writes to it, and its states.

config.json     the configuration of the run, which every mode compares with its own
data.json       fingerprints of the training and test images, and the names of the classes
versions.json   versions of the packages
start.json      the configuration file, the overrides and the machine of the last start
.lock           locked by the process that writes to the directory
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from runtime import checkpoints, configuration, parallelism, reporting, start
from runtime.checkpoints import CheckpointReader
from runtime.errors import UserError
from runtime.files import lock

PyTree = Any

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')

# Where the data are stored and how they are read, which may change: `data.json` guards what they
# hold.
STORAGE = (
  'data.path',
  'data.tfrecords_path',
  'data.test_list',
  'data.cache_dir',
  'data.num_workers',
  'data.on_device',
  'data.max_bad',
)

# Fields that may change when a training resumes, because they do not alter the training itself.
FREE = (
  'training.n_iters',
  'training.log_freq',
  'training.eval_freq',
  'training.n_jitted_steps',
  'training.snapshot_freq_for_preemption',
  'training.snapshot_sampling',
  'training.keep_checkpoints',
  'training.on_nonfinite',
  'training.max_skipped_steps',
  'training.debug_nans',
  'model.remat',
  'parallel.',
  *STORAGE,
  'sampling.',
  'eval.',
  'likelihood.',
  'classifier.',
)

# The fields that samples and latents of a trained network depend on, except for those that only
# matter to its training or its speed.
MODEL = (
  'model.',
  'training.sde',
  'training.continuous',
  'data.image_size',
  'data.num_channels',
  'data.centered',
)
ONLY_TRAINING = (
  'model.dropout',
  'model.ema_rate',
  'model.remat',
  'model.remat_policy',
  'model.matmul_precision',
  'model.dtype',
)

_TEMPORARY = re.compile(r'\..+\.(npz|json|jsonl|csv|png|gif|safetensors)-[a-z0-9_]{8}')


def of_training(name: str) -> bool:
  """Whether a training can resume only if the field of this name is as it was."""
  return not name.startswith(FREE)


def of_model(name: str) -> bool:
  """Whether samples of the network of a run depend on the field of this name."""
  return name.startswith(MODEL) and not name.startswith(ONLY_TRAINING)


def read_json(path: pathlib.Path, fix: str) -> dict[str, Any]:
  """Reads a file that holds a JSON object.

  Args:
    path: the file.
    fix: what to do if the file is damaged; it ends the sentence of the error.

  Raises:
    UserError: if the file cannot be read or holds no JSON object.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    reason = getattr(error, 'strerror', None) or ('it is empty' if _empty(path) else 'no JSON')
    raise UserError(f'{path} cannot be read ({reason}): {fix}.') from error
  if not isinstance(content, dict):
    raise UserError(f'{path} holds {content!r:.40} instead of a JSON object: {fix}.')
  return content


def _empty(path: pathlib.Path) -> bool:
  return path.exists() and not path.stat().st_size


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The recorded configuration of a run; None if the directory has no `config.json`.

  Raises:
    UserError: if the file is damaged.
  """
  path = workdir / 'config.json'
  if not path.exists():
    return None
  fix = 'restore it from a copy, or use another --workdir'
  recorded = read_json(path, fix)
  if not all(isinstance(recorded.get(section), dict) for section in ('training', 'data')):
    raise UserError(f'{path} is not the configuration of a run: {fix}.')
  return recorded


def check_run(
  config: ConfigDict, workdir: pathlib.Path, guarded: Callable[[str], bool] = of_training
) -> None:
  """Checks that a directory is empty or holds the run that the configuration describes.

  Args:
    config: the configuration; that of a classifier has no section `model`.
    workdir: the directory.
    guarded: whether the field of a name must be as it was recorded.

  Raises:
    UserError: if guarded fields differ; the message names them.
  """
  recorded = read_config(workdir)
  if recorded is None:
    return
  if ('model' in recorded) != ('model' in config):
    kinds = ['a classifier', 'a score network']
    raise UserError(
      f'{workdir} holds a run of {kinds["model" in recorded]}, not of '
      f'{kinds["model" in config]}: use another --workdir.'
    )
  old, new = configuration.flatten(recorded), configuration.flatten(config)
  if differing := configuration.differences(old, new, guarded):
    raise UserError(
      f'{workdir} holds a run with another configuration: {differing}; set the recorded values or '
      f'another --workdir.'
    )


def check_processes(**facts: Any) -> None:
  """Checks that all processes of a run were started alike; all of them must call this.

  Args:
    **facts: what must be the same in all processes, by what it is.

  Raises:
    UserError: if a process differs from the first one; the message names it, and in what.
  """
  for fact, processes in parallelism.differing(facts).items():
    raise UserError(
      f'Process {", ".join(map(str, processes))} of this run has another {fact} than process 0: '
      f'start all processes with the same command, from the same files.'
    )


def record(
  config: ConfigDict,
  workdir: pathlib.Path,
  guarded: Callable[[str], bool] = of_training,
  **sources: Any,
) -> None:
  """Writes `config.json`, `versions.json`, `start.json` and `data.json` to the directory of a run.

  Args:
    config: the configuration of the run.
    workdir: its directory.
    guarded: as in `check_run`.
    **sources: the data by the names of their splits; none for an import, which reads no data.

  Raises:
    UserError: as `check_run`, or if the run was trained on other data. Nothing is written then.
  """
  check_run(config, workdir, guarded)
  fingerprints = _check_data(workdir, sources)
  _write_json(workdir / 'config.json', configuration.plain(config))
  _write_json(workdir / 'versions.json', versions())
  _write_json(workdir / 'start.json', start.description())
  if sources:
    _write_json(workdir / 'data.json', fingerprints)


def _check_data(workdir: pathlib.Path, sources: Mapping[str, Any]) -> dict[str, Any]:
  """The fingerprints of the data, which must equal the recorded ones where both are known.

  With them come the names of the classes, if the data set has any.
  """
  path = workdir / 'data.json'
  new = {name: getattr(source, 'fingerprint', None) for name, source in sources.items()}
  names = [list(getattr(source, 'class_names', ())) for source in sources.values()]
  classes = {'class_names': names[0], 'num_classes': len(names[0])} if any(names) else {}
  check_processes(data=new | classes)  # before one of them refuses what the others have
  if not path.exists():
    return new | classes
  old = read_json(path, 'restore it from a copy, or remove it if the data are the same')
  known = {name: value for name, value in old.items() if value and new.get(name)}
  if changed := [name for name, value in known.items() if value != new[name]]:
    raise UserError(
      f'The images of the split {" and ".join(changed)} are not those that {workdir} was trained '
      f'on: restore them, use another --workdir, or remove {path} to resume on the new images.'
    )
  return {name: value or old.get(name) for name, value in new.items()} | classes


def _write_json(path: pathlib.Path, content: Any) -> None:
  if jax.process_index() == 0:
    reporting.write_atomic(path, json.dumps(content, indent=2).encode())


def versions() -> dict[str, str]:
  """The versions of Python, the machine and the packages that the numbers of a run depend on."""
  found = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {'python': platform.python_version(), 'machine': platform.machine(), **found}


def log_start(config: ConfigDict) -> None:
  """Logs the versions, the devices, the network, the SDE and the data set."""
  logging.info('versions: %s', versions())
  logging.info(
    'devices: %d x %s in %d processes; model: %s; SDE: %s; data: %s',
    jax.device_count(),
    jax.default_backend(),
    jax.process_count(),
    config.model.name,
    config.training.sde,
    config.data.dataset,
  )


@contextlib.contextmanager
def at_work(folder: pathlib.Path, setting: str) -> Iterator[None]:
  """Creates and locks a folder, removes partial files from it and logs to its `stdout.txt`.

  Args:
    folder: the folder.
    setting: the flag that chose it, for messages.

  Raises:
    UserError: if the folder cannot be written to, or another run holds its lock.
  """
  reporting.check_writable(folder, setting)
  with contextlib.ExitStack() as stack:
    held = _hold(folder, stack) if jax.process_index() == 0 else True
    if not parallelism.from_first_process(held):
      raise UserError(
        f'{setting}: {folder} is in use by {_holder(folder)}: wait until it has ended, stop it, or '
        f'choose another folder.'
      )
    if jax.process_index() == 0:
      _tidy(folder)
    stack.enter_context(reporting.log_to_file(folder / 'stdout.txt'))
    yield


def _hold(folder: pathlib.Path, stack: contextlib.ExitStack) -> bool:
  """Whether this process could lock the folder; the system unlocks it however the process ends."""
  file = stack.enter_context((folder / '.lock').open('a+', encoding='utf-8'))
  if not lock(file):
    return False
  now = datetime.datetime.now().isoformat(' ', 'seconds')
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()} since {now}')
  file.flush()
  return True


def _holder(folder: pathlib.Path) -> str:
  with contextlib.suppress(OSError, UnicodeDecodeError):
    return (folder / '.lock').read_text(encoding='utf-8') or 'another run'
  return 'another run'


def _tidy(folder: pathlib.Path) -> None:
  """Removes the partial files of a process that was killed, only from folders that are locked."""
  for own in (folder, *folder.glob('samples/iter_*'), *folder.glob('ckpt_*_host_0')):
    for path in own.glob('.*'):
      if _TEMPORARY.fullmatch(path.name):
        path.unlink(missing_ok=True)
  for name in checkpoints.DIRECTORIES:
    checkpoints.remove_unfinished(folder / name)


def load_state(workdir: pathlib.Path, like: PyTree, number: int | None = None) -> PyTree:
  """Restores a saved state of the run in `workdir`, replicated on all devices.

  Args:
    workdir: the directory of the run.
    like: a tree of arrays, or of their shapes, with the structure of the result; a field that is
      None is not read.
    number: which of `checkpoints/`; by default the newest state.

  Raises:
    UserError: if the state does not exist, is damaged or does not fit the configuration.
  """
  check_state(workdir, number)
  snapshots, latest = _readers(workdir)
  if number is not None:
    return checkpoints.restore(snapshots, number, like)
  return checkpoints.restore_newest([latest, snapshots], like)


def check_state(workdir: pathlib.Path, number: int | None = None) -> None:
  """Checks that a run has the saved state of this number, or any; the arguments are `load_state`'s.

  Raises:
    UserError: if it has not.
  """
  snapshots, latest = _readers(workdir)
  if number is None and not snapshots.numbers() and not latest.numbers():
    raise UserError(f'--workdir={workdir} holds no checkpoint: train there first, or import.')
  if number is not None and number not in snapshots.numbers():
    raise UserError(
      f'--checkpoint_number={number} is not in {workdir}/checkpoints: it has '
      f'{snapshots.numbers()}; choose one of these.'
    )


def _readers(workdir: pathlib.Path) -> list[CheckpointReader]:
  return [CheckpointReader(workdir / name) for name in checkpoints.DIRECTORIES]
