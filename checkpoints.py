"""Saving and restoring the training state: Orbax, plus checksums and a fall-back.

A checkpoint is complete or absent (Orbax writes to a temporary name and renames). Orbax does not
notice a flipped bit in an array, so the CRC-32 of every array is stored beside it and verified.
"""

import json
import pathlib
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

import parallelism
from errors import UserError
from losses import State

PREFIX = 'checkpoint'


class DamagedCheckpoint(RuntimeError):
  """A checkpoint that cannot be read back as it was written."""


class NonFiniteState(FloatingPointError):
  """A state with NaN or infinity, which is never saved."""


class CheckpointDirectory:
  """A directory of numbered checkpoints, `checkpoint_0`, `checkpoint_1`, ...

  Saving is asynchronous; an error in the background is raised by the next call. Use it as a context
  manager, which waits for what is being written.

  Args:
    directory: made if it does not exist.
    keep: how many of the newest to keep; None keeps all.
  """

  def __init__(self, directory: pathlib.Path, keep: int | None = None):
    self.directory = pathlib.Path(directory).resolve()
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
    self._manager.close()

  def path(self, number: int) -> pathlib.Path:
    return self.directory / f'{PREFIX}_{number}'

  def numbers(self) -> list[int]:
    """Numbers of the complete checkpoints, increasing."""
    return sorted(self._manager.all_steps())

  def save(self, number: int, state: State) -> None:
    """Begins to write `state` as checkpoint `number`, replacing one of an earlier step.

    Raises:
      NonFiniteState: if a parameter is NaN or infinite.
    """
    tree = flax.serialization.to_state_dict(state)
    leaves = {path: np.asarray(leaf) for path, leaf in _flatten(tree).items()}
    for path, leaf in leaves.items():
      if not np.isfinite(leaf).all():
        raise NonFiniteState(f'state[{path!r}] is not finite at step {int(state.step)}.')
    metadata = {
      'step': int(state.step),
      'crc32': {path: _checksum(leaf) for path, leaf in leaves.items()},
    }
    if number in self._manager.all_steps():
      if self.step(number) == int(state.step):
        return
      self._manager.delete(number)
    self._manager.save(
      number,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(tree), metadata=ocp.args.JsonSave(metadata)
      ),
      force=True,
    )

  def wait(self) -> None:
    """Returns when everything is written."""
    self._manager.wait_until_finished()

  def step(self, number: int) -> int:
    """The training step of checkpoint `number`.

    Raises:
      DamagedCheckpoint: if that cannot be read.
    """
    return int(self._read_metadata(number)['step'])

  def wait_for(self, number: int, seconds: float) -> bool:
    """Whether checkpoint `number` is there, now or within `seconds`.

    A file system shared over a network does not tell of new files, so this looks each second.
    """
    deadline = time.monotonic() + seconds
    while number not in self.numbers() and time.monotonic() < deadline:
      threading.Event().wait(1)
      self._manager.reload()
    return number in self.numbers()

  def identity(self, number: int) -> str:
    """A checksum over the step and all arrays of checkpoint `number`.

    Raises:
      DamagedCheckpoint: if that cannot be read.
    """
    metadata = json.dumps(self._read_metadata(number), sort_keys=True)
    return f'{zlib.crc32(metadata.encode()):08x}'

  def restore(self, number: int, like: State) -> State:
    """Checkpoint `number` as a state shaped as `like` (arrays or shapes), on all devices.

    Raises:
      DamagedCheckpoint: if it cannot be read, does not fit, or a checksum is wrong.
    """
    expected = flax.serialization.to_state_dict(like)
    sharding = parallelism.replicated()
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), expected
    )
    checksums = self._read_metadata(number)['crc32']
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    try:
      tree = self._manager.restore(number, args=args)['state']
    except Exception as error:  # Orbax raises bare Exceptions for unreadable arrays
      raise DamagedCheckpoint(
        f'{self.path(number)} cannot be read: {_first_line(error)}'
      ) from error
    for path, leaf in _flatten(tree).items():
      if _checksum(leaf) != checksums.get(path):
        raise DamagedCheckpoint(f'{self.path(number)} has a wrong checksum for {path}.')
    return flax.serialization.from_state_dict(like, tree)

  def set_aside(self, number: int) -> pathlib.Path:
    """Renames a damaged checkpoint so that it is neither used nor lost."""
    target = self.directory / f'damaged-{PREFIX}_{number}'
    while target.exists():
      target = target.with_name(target.name + '-again')
    if jax.process_index() == 0:
      self.path(number).rename(target)
    self._manager.reload()
    return target

  def _read_metadata(self, number: int) -> dict[str, Any]:
    args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    try:
      return self._manager.restore(number, args=args)['metadata']
    except Exception as error:  # as above
      raise DamagedCheckpoint(
        f'{self.path(number)} cannot be read: {_first_line(error)}'
      ) from error


def restore_newest(directories: list[CheckpointDirectory], like: State) -> State | None:
  """The state of the latest step in any of `directories`; None where there is no checkpoint.

  A damaged checkpoint is reported, set aside, and the one before it is taken.

  Raises:
    UserError: if there are checkpoints and all are damaged.
  """
  damaged = []
  for directory, number in _newest_first(directories, damaged):
    try:
      state = directory.restore(number, like)
    except DamagedCheckpoint as error:
      logging.warning('%s Trying the one before.', error)
      damaged.append((directory, number))
      continue
    for broken, broken_number in damaged:
      logging.warning('Kept for inspection: %s', broken.set_aside(broken_number))
    logging.info('Resuming from %s, step %d.', directory.path(number), int(state.step))
    return state
  if damaged:
    paths = ', '.join(str(directory.path(number)) for directory, number in damaged)
    raise UserError(
      f'All checkpoints are damaged ({paths}): restore one from a copy, or use a new --workdir.'
    )
  return None


def _newest_first(
  directories: list[CheckpointDirectory], damaged: list[tuple[CheckpointDirectory, int]]
) -> Iterator[tuple[CheckpointDirectory, int]]:
  """All checkpoints by decreasing step; those whose step is unreadable go to `damaged`."""
  steps = []
  for i, directory in enumerate(directories):
    for number in directory.numbers():
      try:
        steps.append((directory.step(number), i, number))
      except DamagedCheckpoint as error:
        logging.warning('%s', error)
        damaged.append((directory, number))
  for _, i, number in sorted(steps, reverse=True):
    yield directories[i], number


def _flatten(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _checksum(leaf: Any) -> int:
  return zlib.crc32(np.ascontiguousarray(leaf).tobytes())


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
