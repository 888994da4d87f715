"""Saving and restoring trees of arrays with Orbax, plus checksums and a fallback.

A checkpoint is complete or absent (Orbax writes to a temporary name and renames). Orbax does not
notice a flipped bit in an array, so the CRC-32 of every array is stored beside it and verified.

Reading never writes: only the training of a run renames its damaged checkpoints. Every process
reads for itself, and all processes agree on the checkpoint that they restore.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from runtime import parallelism
from runtime.errors import Exit, UserError
from runtime.weights import enumerate_names

PyTree = Any

PREFIX = 'checkpoint'
# How long a save in progress may take to complete when the program fails.
_CLOSE_SECONDS = 2.0
# Where checkpoints are moved to be deleted.
_REMOVED = '.removed'
DIRECTORIES = ('checkpoints', 'checkpoints-meta')  # in the directory of a run


class DamagedCheckpoint(UserError):
  """A checkpoint that cannot be read back as it was written."""

  status = Exit.STORAGE


class MisfitCheckpoint(UserError):
  """A checkpoint whose network or optimizer is not the one that the configuration describes."""


class UnsavedCheckpoint(UserError):
  """A checkpoint could not be written."""

  status = Exit.STORAGE


class NonFiniteState(FloatingPointError):
  """A state with NaN or infinity, which is never saved."""


@dataclasses.dataclass(frozen=True)
class Retention:
  """Which checkpoints of a directory stay when newer ones are saved.

  Attributes:
    last: how many of the newest; None keeps all.
    every: the numbers that are multiples of it stay, too; None for none of them.
  """

  last: int | None = None
  every: int | None = None

  @classmethod
  def parse(cls, text: str) -> 'Retention':
    """Reads `training.keep_checkpoints`: 'all', 'last:N', or 'every:N', each N-th and the newest.

    Raises:
      UserError: if it is none of these.
    """
    kind, _, number = text.partition(':')
    if text == 'all':
      return cls()
    if kind in ('last', 'every') and number.isdecimal() and int(number) > 0:
      return cls(last=int(number)) if kind == 'last' else cls(last=1, every=int(number))
    raise UserError(
      f"training.keep_checkpoints={text!r} must be 'all', or 'last:N' or 'every:N' with N at least "
      f'1, such as last:5.'
    )


class CheckpointReader:
  """Reads a directory of numbered checkpoints, `checkpoint_0`, `checkpoint_1`, ...

  Args:
    directory: the directory, which need not exist.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = pathlib.Path(directory).resolve()

  def path(self, number: int) -> pathlib.Path:
    """The path of checkpoint `number`, whether or not it exists."""
    return self.directory / f'{PREFIX}_{number}'

  def numbers(self) -> list[int]:
    """The numbers of the complete checkpoints, in increasing order."""
    found = self.directory.glob(f'{PREFIX}_*')
    numbers = (path.name.removeprefix(f'{PREFIX}_') for path in found)
    return sorted(int(number) for number in numbers if number.isdecimal())

  def newest(self) -> int:
    """The largest number of a complete checkpoint; -1 if there is none."""
    return max(self.numbers(), default=-1)

  def wait_for(self, number: int, seconds: float) -> bool:
    """Whether checkpoint `number`, or a later one, exists now or appears within `seconds`.

    A network file system does not announce new files, so this polls once a second.
    """
    deadline = time.monotonic() + seconds
    while not (arrived := self.newest() >= number) and time.monotonic() < deadline:
      time.sleep(1)
    return arrived

  def step(self, number: int) -> int:
    """The training step of checkpoint `number`.

    Raises:
      DamagedCheckpoint: if the metadata of the checkpoint cannot be read.
    """
    return self._metadata(number)['step']

  def identity(self, number: int) -> str:
    """A checksum over the step and all arrays of checkpoint `number`, in hexadecimal.

    Raises:
      DamagedCheckpoint: if the metadata of the checkpoint cannot be read.
    """
    return _identity(self._metadata(number))

  def restore(self, number: int, like: PyTree) -> PyTree:
    """Restores checkpoint `number` on the present devices, whatever devices it was saved from.

    Args:
      number: the number of the checkpoint.
      like: a tree of arrays, or of their shapes, with the structure of the result; a field that is
        None is not read.

    Raises:
      DamagedCheckpoint: if the checkpoint cannot be read, or a checksum is wrong.
      MisfitCheckpoint: if its arrays have other names, shapes or types than those of `like`.
    """
    tree = flax.serialization.to_state_dict(like)
    tree = {key: value for key, value in tree.items() if value is not None}
    wanted = _flatten(tree)
    checksums = self._metadata(number)['crc32']
    saved = {path for path in checksums if path.partition('/')[0] in tree}
    self._check_fit(
      number, {'missing': wanted.keys() - saved, 'not of this network': saved - wanted.keys()}
    )
    arrays = self._read(number, wanted)
    self._check_fit(number, {'of another shape or type': _mismatches(wanted, arrays)})
    for path, array in arrays.items():
      if _checksum(array) != checksums[path]:
        raise DamagedCheckpoint(
          f'{self.path(number)} is damaged: the checksum of {path} is wrong; use another '
          f'checkpoint, or restore this one from a copy.'
        )
    flat = flax.traverse_util.flatten_dict(tree, sep='/', keep_empty_nodes=True)
    restored = flax.traverse_util.unflatten_dict(flat | parallelism.place(arrays), sep='/')
    absent = {key: None for key in flax.serialization.to_state_dict(like) if key not in tree}
    return flax.serialization.from_state_dict(like, restored | absent)

  def _check_fit(self, number: int, problems: Mapping[str, Iterable[str]]) -> None:
    # The optimizer's moments have the shapes of the parameters: naming both would say it twice.
    parameters = lambda names: [name for name in names if name.startswith('params')]
    found = [
      f'{kind}: {enumerate_names(parameters(names) or names)}'
      for kind, names in problems.items()
      if names
    ]
    if found:
      double = jax.config.jax_enable_x64 or 'float64' in ' '.join(found)
      hint = ', and JAX_ENABLE_X64 as it was then' if double else ''
      raise MisfitCheckpoint(
        f'{self.path(number)} is intact but does not fit the configuration ({"; ".join(found)}): '
        f'use the configuration of its run, which config.json in the same --workdir holds{hint}.'
      )

  def _read(self, number: int, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads the wanted arrays as they were saved, by this process alone."""
    alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(),
      active_processes={jax.process_index()},
      barrier_sync_key_prefix=f'read_{jax.process_index()}',
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    item = flax.traverse_util.unflatten_dict(dict(wanted), sep='/')
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
    try:
      with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        tree = checkpointer.restore(self.path(number) / 'state', args=args)
    except Exception as error:  # Orbax raises many kinds for unreadable arrays
      raise self._damaged(number, error) from error
    return {path: np.asarray(array) for path, array in _flatten(tree).items()}

  def _metadata(self, number: int) -> dict[str, Any]:
    try:
      text = (self.path(number) / 'metadata' / 'metadata').read_text(encoding='utf-8')
      metadata = json.loads(text)
      return {'step': int(metadata['step']), 'crc32': dict(metadata['crc32'])}
    except (OSError, ValueError, TypeError, LookupError) as error:
      raise self._damaged(number, error) from error

  def _damaged(self, number: int, error: Exception) -> DamagedCheckpoint:
    return DamagedCheckpoint(
      f'{self.path(number)} is damaged and cannot be read ({_first_line(error)}): use another '
      f'checkpoint, or restore this one from a copy.'
    )


class CheckpointDirectory(CheckpointReader):
  """A directory of numbered checkpoints that can also be written.

  Saving is asynchronous: the next call raises an error that occurred in the background. Use it as a
  context manager, whose exit waits for the writes in progress.

  Args:
    directory: the directory, which is created if it does not exist.
    keep: which of the checkpoints stay.
  """

  def __init__(self, directory: pathlib.Path, keep: Retention = Retention()):
    super().__init__(directory)
    options = ocp.CheckpointManagerOptions(
      step_prefix=PREFIX,
      max_to_keep=keep.last,
      keep_period=keep.every,
      # A directory is renamed at once, but takes time to delete: a process that is killed meanwhile
      # would leave half a checkpoint, which looks like a damaged one.
      todelete_subdir=_REMOVED,
      create=True,
      # Processes synchronize under a name: two directories that are written to at the same time
      # need two names.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        barrier_sync_key_prefix=self.directory.name
      ),
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def __enter__(self) -> 'CheckpointDirectory':
    return self

  def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
    if kind is None:
      with self._writing():
        self._manager.close()
      if jax.process_index() == 0:
        shutil.rmtree(self.directory / _REMOVED, ignore_errors=True)
      return
    # After a failed save, the threads of Orbax may wait for each other for minutes.
    closing = threading.Thread(target=self._close_after_failure, daemon=True)
    closing.start()
    closing.join(_CLOSE_SECONDS)

  def _close_after_failure(self) -> None:
    with contextlib.suppress(Exception):  # the failure that is reported came first
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns an error of Orbax, in this save or in the one before, into a sentence."""
    try:
      yield
    except Exception as error:  # Orbax raises many kinds
      raise UnsavedCheckpoint(
        f'A checkpoint could not be written to {self.directory} ({_first_line(error)}): the '
        f'earlier ones are intact; fix the cause and rerun the same command, which resumes from '
        f'them.'
      ) from error

  def save(self, number: int, step: int, tree: PyTree) -> None:
    """Begins to write `tree` as checkpoint `number`.

    A checkpoint of the same number is kept if it is of the same step, and replaced otherwise.

    Args:
      number: the number of the checkpoint.
      step: its training step.
      tree: arrays, in any container that Flax can serialize.

    Raises:
      NonFiniteState: if an array has a value that is NaN or infinite.
      UnsavedCheckpoint: if this checkpoint or the one before could not be written.
    """
    metadata = _metadata_of(step, tree)
    tree = flax.serialization.to_state_dict(tree)
    if number in self._manager.all_steps():
      self.wait()
      if self.step(number) == step:
        return
      self._manager.delete(number)
    self._delete_removed()
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(tree), metadata=ocp.args.JsonSave(metadata)
    )
    with self._writing():
      self._manager.save(number, args=args, force=True)

  def _delete_removed(self) -> None:
    if jax.process_index() == 0:
      # What is inside only: Orbax may be moving another one there.
      for path in (self.directory / _REMOVED).glob('*'):
        shutil.rmtree(path, ignore_errors=True)

  def wait(self) -> None:
    """Returns when all checkpoints are written.

    Raises:
      UnsavedCheckpoint: if one could not be written.
    """
    with self._writing():
      self._manager.wait_until_finished()

  def set_aside(self, number: int) -> pathlib.Path:
    """Renames a damaged checkpoint, so that it is neither used nor lost, and returns its new path.

    All processes call this; the first one renames.
    """
    target = self.directory / f'damaged-{PREFIX}_{number}'
    while target.exists():
      target = target.with_name(target.name + '-again')
    if jax.process_index() == 0:
      self.path(number).rename(target)
    parallelism.from_first_process(0)  # the others wait until the checkpoint is renamed
    self._manager.reload()
    return target


def remove_unfinished(directory: pathlib.Path) -> None:
  """Removes what killed processes did not finish saving or deleting; no other one may be at it."""
  for path in (directory / _REMOVED, *directory.glob(f'{PREFIX}_*.orbax-checkpoint-tmp*')):
    shutil.rmtree(path, ignore_errors=True)


def restore(directory: CheckpointReader, number: int, like: PyTree) -> PyTree:
  """`directory.restore(number, like)`, which succeeds in all processes or in none.

  Raises:
    DamagedCheckpoint: if any process could not read the checkpoint.
    MisfitCheckpoint: as `CheckpointReader.restore`.
  """
  tree, error = None, None
  try:
    tree = directory.restore(number, like)
  except DamagedCheckpoint as damage:
    error = damage
  if parallelism.any_process(error is not None):
    raise error or DamagedCheckpoint(
      f'{directory.path(number)} cannot be read by another process: use another checkpoint, or '
      f'restore this one from a copy.'
    )
  return tree


def restore_newest(directories: list[CheckpointReader], like: PyTree) -> PyTree | None:
  """The tree of the latest step in any of `directories`; None if they hold no checkpoint.

  A damaged checkpoint is reported and the one before it is used, the same one in all processes.

  Raises:
    DamagedCheckpoint: if all checkpoints are damaged.
    MisfitCheckpoint: as `CheckpointReader.restore`.
  """
  return _restore_newest(directories, like, 'Taking')[0]


def resume(directories: list[CheckpointDirectory], like: PyTree) -> PyTree | None:
  """As `restore_newest`, but for the training of the run: it sets damaged checkpoints aside."""
  tree, damaged = _restore_newest(directories, like, 'Resuming from')
  for index, number in damaged:
    logging.warning('Kept for inspection: %s', directories[index].set_aside(number))
  return tree


def _restore_newest(
  directories: list[CheckpointReader], like: PyTree, purpose: str
) -> tuple[PyTree | None, list[tuple[int, int]]]:
  """The tree, and for each damaged checkpoint the index of its directory and its number."""
  damaged = []
  while (newest := _newest(directories, damaged)) is not None:
    index, number = newest
    directory = directories[index]
    try:
      tree = restore(directory, number, like)
    except DamagedCheckpoint as error:
      damaged.append(newest)
      # A training that runs at the same time may have deleted this old checkpoint by now.
      if _exists(directories, newest):
        logging.warning('%s Trying the one before.', error)
      continue
    logging.info('%s %s, step %d.', purpose, directory.path(number), directory.step(number))
    return tree, [entry for entry in damaged if _exists(directories, entry)]
  damaged = [entry for entry in damaged if _exists(directories, entry)]
  if damaged:
    paths = enumerate_names(str(directories[index].path(number)) for index, number in damaged)
    raise DamagedCheckpoint(
      f'All checkpoints are damaged ({paths}): restore one from a copy, or use a new --workdir.'
    )
  return None, []


def _exists(directories: list[CheckpointReader], entry: tuple[int, int]) -> bool:
  index, number = entry
  return bool(parallelism.from_first_process(directories[index].path(number).exists()))


def _newest(
  directories: list[CheckpointReader], damaged: list[tuple[int, int]]
) -> tuple[int, int] | None:
  """The checkpoint of the latest step that the first process sees, as (directory index, number).

  A checkpoint whose step cannot be read comes first: reading it reports the damage.
  """
  steps = []
  for index, directory in enumerate(directories):
    for number in directory.numbers():
      if (index, number) not in damaged:
        try:
          steps.append((directory.step(number), index, number))
        except DamagedCheckpoint:
          steps.append((math.inf, index, number))
  _, index, number = max(steps, default=(-1, -1, -1))
  index, number = (parallelism.from_first_process(value) for value in (index, number))
  return None if index < 0 else (index, number)


def identity_of(step: int, tree: PyTree) -> str:
  """What `CheckpointReader.identity` will be for `tree` when it is saved.

  Raises:
    NonFiniteState: if an array has a value that is NaN or infinite.
  """
  return _identity(_metadata_of(step, tree))


def _identity(metadata: dict[str, Any]) -> str:
  return f'{zlib.crc32(json.dumps(metadata, sort_keys=True).encode()):08x}'


def _metadata_of(step: int, tree: PyTree) -> dict[str, Any]:
  checksums = {}
  for path, leaf in _flatten(flax.serialization.to_state_dict(tree)).items():
    leaf = parallelism.to_host(leaf)  # one at a time: the whole state may not fit in one host
    if not np.isfinite(leaf).all():
      raise NonFiniteState(
        f'state[{path!r}] is not finite at step {step}: lower optim.lr or check the data, then '
        f'train in a new --workdir.'
      )
    checksums[path] = _checksum(leaf)
  return {'step': step, 'crc32': checksums}


def _mismatches(wanted: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
  describe = lambda x: f'{np.dtype(x.dtype).name}{list(x.shape)}'
  return [
    f'{path} is {describe(arrays[path])} instead of {describe(leaf)}'
    for path, leaf in wanted.items()
    if describe(arrays[path]) != describe(leaf)
  ]


def _first_line(error: Exception) -> str:
  line = (str(error).splitlines() or [''])[0] or type(error).__name__
  # TensorStore says what the system said after several long paths, and before its own settings.
  found = re.search(r':([^:]+) \[os_error_code=', line)
  reason = f':{found[1]}' if found else ''
  return line if len(line) <= 300 else f'{line[:200]}...{reason}'


def _flatten(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _checksum(leaf: Any) -> int:
  return zlib.crc32(np.ascontiguousarray(leaf).tobytes())
