"""Saving and restoring trees of arrays: Orbax, plus checksums and a fall-back.

A checkpoint is complete or absent (Orbax writes to a temporary name and renames). Orbax does not
notice a flipped bit in an array, so the CRC-32 of every array is stored beside it and verified.

Reading never writes: only the training of a run renames its damaged checkpoints. Every process
reads for itself and all of them agree on what is taken.
"""

import contextlib
import json
import math
import pathlib
import shutil
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
from runtime.errors import UserError
from runtime.weights import enumerate_names

PyTree = Any

PREFIX = 'checkpoint'
DIRECTORIES = ('checkpoints', 'checkpoints-meta')  # in the directory of a run


class DamagedCheckpoint(UserError):
  """A checkpoint that cannot be read back as it was written."""


class MisfitCheckpoint(UserError):
  """A checkpoint of another network or optimizer than the configuration describes."""


class UnsavedCheckpoint(UserError):
  """A checkpoint could not be written."""


class NonFiniteState(FloatingPointError):
  """A state with NaN or infinity, which is never saved."""


class CheckpointReader:
  """A directory of numbered checkpoints, `checkpoint_0`, `checkpoint_1`, ..., to read.

  Args:
    directory: need not exist.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = pathlib.Path(directory).resolve()

  def path(self, number: int) -> pathlib.Path:
    return self.directory / f'{PREFIX}_{number}'

  def numbers(self) -> list[int]:
    """Numbers of the complete checkpoints, increasing."""
    found = self.directory.glob(f'{PREFIX}_*')
    numbers = (path.name.removeprefix(f'{PREFIX}_') for path in found)
    return sorted(int(number) for number in numbers if number.isdecimal())

  def wait_for(self, number: int, seconds: float) -> bool:
    """Whether checkpoint `number` is there, now or within `seconds`.

    A file system shared over a network does not tell of new files, so this looks each second.
    """
    deadline = time.monotonic() + seconds
    while number not in self.numbers() and time.monotonic() < deadline:
      time.sleep(1)
    return number in self.numbers()

  def step(self, number: int) -> int:
    """The training step of checkpoint `number`.

    Raises:
      DamagedCheckpoint: if that cannot be read.
    """
    return self._metadata(number)['step']

  def identity(self, number: int) -> str:
    """A checksum over the step and all arrays of checkpoint `number`.

    Raises:
      DamagedCheckpoint: if that cannot be read.
    """
    metadata = json.dumps(self._metadata(number), sort_keys=True)
    return f'{zlib.crc32(metadata.encode()):08x}'

  def restore(self, number: int, like: PyTree) -> PyTree:
    """Checkpoint `number` as a tree shaped as `like` (arrays or shapes), on all devices.

    Args:
      number: of the checkpoint.
      like: what is None in it is not read.

    Raises:
      DamagedCheckpoint: if it cannot be read, or a checksum is wrong.
      MisfitCheckpoint: if its arrays have other names, shapes or types.
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
          f'{self.path(number)} is damaged: it has a wrong checksum for {path}; take another one, '
          f'or restore it from a copy.'
        )
    flat = flax.traverse_util.flatten_dict(tree, sep='/', keep_empty_nodes=True)
    restored = flax.traverse_util.unflatten_dict(flat | parallelism.replicate(arrays), sep='/')
    absent = {key: None for key in flax.serialization.to_state_dict(like) if key not in tree}
    return flax.serialization.from_state_dict(like, restored | absent)

  def _check_fit(self, number: int, problems: Mapping[str, Iterable[str]]) -> None:
    # The optimizer's moments are as the parameters: no need to name them as well.
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
        f'{self.path(number)} does not fit the configuration ({"; ".join(found)}): it is whole, '
        f'so use the configuration of its run, which is in config.json beside it{hint}.'
      )

  def _read(self, number: int, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The wanted arrays, as they were saved, read by this process alone."""
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
      f'{self.path(number)} is damaged and cannot be read ({_first_line(error)}): take another '
      f'one, or restore it from a copy.'
    )


class CheckpointDirectory(CheckpointReader):
  """The same, to save to.

  Saving is asynchronous; an error in the background is raised by the next call. Use it as a context
  manager, which waits for what is being written.

  Args:
    directory: made if it does not exist.
    keep: how many of the newest to keep; None keeps all.
  """

  def __init__(self, directory: pathlib.Path, keep: int | None = None):
    super().__init__(directory)
    options = ocp.CheckpointManagerOptions(
      step_prefix=PREFIX,
      max_to_keep=keep,
      create=True,
      # Processes meet under a name; two directories that are saved at a time need two.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        barrier_sync_key_prefix=self.directory.name
      ),
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def __enter__(self) -> 'CheckpointDirectory':
    return self

  def __exit__(self, *exc_info) -> None:
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns what Orbax raises, of this save or of the one before, into a sentence."""
    try:
      yield
    except Exception as error:  # Orbax raises many kinds
      raise UnsavedCheckpoint(
        f'A checkpoint could not be written to {self.directory} ({_first_line(error)}): the ones '
        f'before are whole; mend that and rerun the same command, which resumes from them.'
      ) from error

  def save(self, number: int, step: int, tree: PyTree) -> None:
    """Begins to write `tree` as checkpoint `number`, replacing one of another step.

    Args:
      number: of the checkpoint.
      step: the training step that it is of.
      tree: arrays, in anything that Flax can serialize.

    Raises:
      NonFiniteState: if a parameter is NaN or infinite.
      UnsavedCheckpoint: if this one or the one before could not be written.
    """
    tree = flax.serialization.to_state_dict(tree)
    leaves = {path: np.asarray(leaf) for path, leaf in _flatten(tree).items()}
    for path, leaf in leaves.items():
      if not np.isfinite(leaf).all():
        raise NonFiniteState(f'state[{path!r}] is not finite at step {step}.')
    metadata = {
      'step': step,
      'crc32': {path: _checksum(leaf) for path, leaf in leaves.items()},
    }
    if number in self._manager.all_steps():
      self.wait()
      if self.step(number) == step:
        return
      self._manager.delete(number)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(tree), metadata=ocp.args.JsonSave(metadata)
    )
    with self._writing():
      self._manager.save(number, args=args, force=True)

  def wait(self) -> None:
    """Returns when everything is written."""
    with self._writing():
      self._manager.wait_until_finished()

  def set_aside(self, number: int) -> pathlib.Path:
    """Renames a damaged checkpoint so that it is neither used nor lost; the first process does."""
    target = self.directory / f'damaged-{PREFIX}_{number}'
    while target.exists():
      target = target.with_name(target.name + '-again')
    if jax.process_index() == 0:
      self.path(number).rename(target)
    parallelism.from_first_process(0)  # nobody looks before it is done
    self._manager.reload()
    return target


def remove_unfinished(directory: pathlib.Path) -> None:
  """Removes what saves left behind that were killed; nobody may be saving there."""
  for path in directory.glob(f'{PREFIX}_*.orbax-checkpoint-tmp*'):
    shutil.rmtree(path, ignore_errors=True)


def restore(directory: CheckpointReader, number: int, like: PyTree) -> PyTree:
  """`directory.restore(number, like)`, which all processes do or none.

  Raises:
    DamagedCheckpoint: if any process could not read it.
    MisfitCheckpoint: as `CheckpointReader.restore`.
  """
  tree, error = None, None
  try:
    tree = directory.restore(number, like)
  except DamagedCheckpoint as damage:
    error = damage
  if parallelism.any_process(error is not None):
    raise error or DamagedCheckpoint(
      f'{directory.path(number)} cannot be read by another process: take another one, or restore '
      f'it from a copy.'
    )
  return tree


def restore_newest(directories: list[CheckpointReader], like: PyTree) -> PyTree | None:
  """The tree of the latest step in any of `directories`; None where there is no checkpoint.

  A damaged checkpoint is reported and the one before it is taken; all processes take the same.

  Raises:
    DamagedCheckpoint: if there are checkpoints and all are damaged.
    MisfitCheckpoint: as `CheckpointReader.restore`.
  """
  return _restore_newest(directories, like, 'Taking')[0]


def resume(directories: list[CheckpointDirectory], like: PyTree) -> PyTree | None:
  """As `restore_newest`, for the training of the run: damaged checkpoints are set aside."""
  tree, damaged = _restore_newest(directories, like, 'Resuming from')
  for index, number in damaged:
    logging.warning('Kept for inspection: %s', directories[index].set_aside(number))
  return tree


def _restore_newest(
  directories: list[CheckpointReader], like: PyTree, purpose: str
) -> tuple[PyTree | None, list[tuple[int, int]]]:
  """The tree, and the index of the directory and the number of those that are damaged."""
  damaged = []
  while (newest := _newest(directories, damaged)) is not None:
    index, number = newest
    directory = directories[index]
    try:
      tree = restore(directory, number, like)
    except DamagedCheckpoint as error:
      damaged.append(newest)
      # Beside a training that deletes old ones, it may be gone by now.
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
  """The first process's checkpoint of the latest step; one without a readable step comes first."""
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


def _mismatches(wanted: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
  describe = lambda x: f'{np.dtype(x.dtype).name}{list(x.shape)}'
  return [
    f'{path} is {describe(arrays[path])} instead of {describe(leaf)}'
    for path, leaf in wanted.items()
    if describe(arrays[path]) != describe(leaf)
  ]


def _first_line(error: Exception) -> str:
  return ((str(error).splitlines() or [''])[0] or type(error).__name__)[:300]


def _flatten(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _checksum(leaf: Any) -> int:
  return zlib.crc32(np.ascontiguousarray(leaf).tobytes())
