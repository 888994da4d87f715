"""`--mode=import` and `--mode=export`: published checkpoints in, weights out.

A file is recognised by its content. It is read, checked against the configured network and turned
into a training state before anything is written to the working directory.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

import train_state
from formats import FORMATS, ImportedCheckpoint
from formats.export import read_config
from models.layers import is_frequency
from modes.loading import check_weights, load_weights
from modes.training_loop import open_run
from runtime import checkpoints, configuration, parallelism, reporting, weights
from runtime.checkpoints import CheckpointReader
from runtime.errors import UserError
from runtime.weights import Arrays
from runtime.workdir import at_work, check_run, log_start, record
from train_state import State

PyTree = Any

_HEAD = 64  # bytes by which a format is recognised


def import_checkpoint(config: ConfigDict, workdir: pathlib.Path, checkpoint: str | None) -> State:
  """See `run_lib.import_checkpoint`; `config` comes from `preparation.prepare`."""
  state = parallelism.place(check_import(config, workdir, checkpoint))
  step = int(state.step)
  number = -(-step // config.training.snapshot_freq)
  with at_work(workdir, '--workdir'), open_run(workdir) as run:
    record(config, workdir)
    log_start(config)
    run.snapshots.save(number, step, state)
    run.latest.save(step, step, state)
    logging.info('Imported %s, step %d, as %s.', checkpoint, step, run.snapshots.path(number))
  return state


def check_import(config: ConfigDict, workdir: pathlib.Path, checkpoint: str | None) -> State:
  """Reads the file that `--mode=import` imports, and refuses what the mode would refuse."""
  check_run(config, workdir)
  state = read_state(config, checkpoint)
  if not _has_only(workdir, state):  # else an import that was killed, which the same command ends
    raise UserError(f'--workdir={workdir} already has checkpoints: import into a new one.')
  step, n_jitted_steps = int(state.step), config.training.n_jitted_steps
  if step % n_jitted_steps:
    raise UserError(
      f'{checkpoint} is of step {step}, no multiple of training.n_jitted_steps={n_jitted_steps}: '
      f'add --config.training.n_jitted_steps=1.'
    )
  return state


def _has_only(workdir: pathlib.Path, state: State) -> bool:
  """Whether all checkpoints of a directory, if it has any, are of this state."""
  readers = [CheckpointReader(workdir / name) for name in checkpoints.DIRECTORIES]
  found = {reader.identity(number) for reader in readers for number in reader.numbers()}
  return not found or found == {checkpoints.identity_of(int(state.step), parallelism.place(state))}


def read_state(config: ConfigDict, checkpoint: str | None) -> State:
  """Reads a checkpoint file of any registered format as a training state.

  Args:
    config: the configuration that the file was trained with.
    checkpoint: the file.

  Raises:
    UserError: if the file is damaged, of no known format, or does not fit the configuration.
  """
  if not checkpoint:
    raise UserError('--mode=import needs the file to import: add --checkpoint=FILE.')
  return _read(config, pathlib.Path(checkpoint).expanduser(), _to_state)


def read_weights(config: ConfigDict, path: pathlib.Path) -> State:
  """As `read_state`, but only the EMA parameters, as sampling and evaluation use them."""
  return _read(config, path, _to_weights)


def _read(
  config: ConfigDict,
  path: pathlib.Path,
  convert: Callable[[ConfigDict, pathlib.Path, ImportedCheckpoint], State],
) -> State:
  try:
    with path.open('rb') as file:
      head = file.read(_HEAD)
  except OSError as error:
    raise UserError(
      f'--checkpoint={path} cannot be read ({error.strerror}): name the file to import.'
    ) from error
  formats = {name: FORMATS.get(name)() for name in FORMATS.names()}
  known = [name for name, form in formats.items() if form.recognises(head)]
  if not known:
    raise UserError(f'--checkpoint={path} is of no known format: import {", or ".join(formats)}.')
  try:
    imported = formats[known[0]].read(path, config)
    return convert(config, path, imported)
  except UserError:
    raise
  except Exception as error:  # a hostile file can make a parser raise anything
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise UserError(
      f'--checkpoint={path} cannot be read as {known[0]} ({reason}): it is damaged or has another '
      f'format; get it again.'
    ) from error


def _to_weights(config: ConfigDict, path: pathlib.Path, imported: ImportedCheckpoint) -> State:
  """The state that sampling and evaluation use."""
  configured = configuration.flatten(config)
  for name, value in imported.settings.items():
    if not _same(configured[name], value):
      raise UserError(
        f'{path} was trained with {name}={_shown(value)}, and the configuration says '
        f'{_shown(configured[name])}: add --config.{name}={_shown(value)}.'
      )
  if not 0 <= imported.step < 2**31:
    raise UserError(f'{path} has step={imported.step}, which must be in [0, 2^31): it is damaged.')

  _, like = train_state.abstract_state(config)
  fit = _fitter(config, path)
  averages = imported.params if imported.params_ema is None else imported.params_ema
  what = 'parameters' if averages is imported.params else 'averages'
  return train_state.weights_only(like).replace(
    step=jnp.asarray(imported.step, jnp.int32),
    params_ema=fit(what, averages, like.params),
    model_state=fit('other collections', imported.model_state, like.model_state),
  )


def _to_state(config: ConfigDict, path: pathlib.Path, imported: ImportedCheckpoint) -> State:
  """The state from which training resumes."""
  _, like = train_state.abstract_state(config)
  fit = _fitter(config, path)
  params = fit('parameters', imported.params, like.params)  # first: a misfit here is in all others
  state = _to_weights(config, path, imported)
  opt_state = train_state.get_optimizer(config).init(params)
  opt_state = _set(opt_state, 'ScaleByScheduleState', count=state.step)
  if imported.moments:
    opt_state = _set(
      opt_state,
      'ScaleByAdamState',
      count=jnp.asarray(imported.moments.count, jnp.int32),
      mu=fit('first moments', imported.moments.mu, like.params),
      nu=fit('second moments', imported.moments.nu, like.params),
    )
  else:
    logging.warning('%s has no state of an optimizer: Adam starts anew.', path)
  return state.replace(params=params, opt_state=opt_state)


def _same(ours: Any, theirs: Any) -> bool:
  numbers = [isinstance(value, (int, float)) for value in (ours, theirs)]
  if all(numbers):
    return bool(np.isclose(ours, theirs, rtol=1e-6, atol=0))  # theirs may be of single precision
  return ours == theirs


def _shown(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _set(opt_state: PyTree, kind: str, **fields: PyTree) -> PyTree:
  """`opt_state` with new values for fields of the states of one kind, such as Adam's."""
  of_kind = lambda path, _: getattr(path[-1], 'tuple_name', None) == kind
  try:
    return optax.tree_utils.tree_set(opt_state, of_kind, **fields)
  except KeyError as error:
    raise UserError(
      'The file has the state of Adam, which the configured optimizer cannot use: set '
      '--config.optim.optimizer=Adam.'
    ) from error


def _fitter(config: ConfigDict, path: pathlib.Path) -> Callable[[str, Arrays, PyTree], PyTree]:
  """`weights.fit`, told what the arrays are, for the sentence of an error."""
  where = f'{path} does not fit model.name={config.model.name} as configured; its '
  return lambda what, arrays, like: _fit(f'{where}{what}: ', arrays, like)


def _fit(where: str, arrays: Arrays, like: PyTree) -> PyTree:
  """As `weights.fit`, but raises a sentence that begins with `where`."""
  try:
    return weights.fit(arrays, like)
  except weights.Misfit as error:
    raise UserError(
      f'{where}{error}. Give the configuration that the file was trained with.'
    ) from error


def check_export(
  config: ConfigDict,
  workdir: pathlib.Path,
  checkpoint: str | None,
  number: int | None,
  *,
  dtype: str = 'float32',
) -> None:
  """Refuses what `--mode=export` would refuse, but reads no weights."""
  if dtype not in ('float32', 'float16'):
    raise UserError(f'Unknown --dtype={dtype}: choose float32 or float16.')
  check_weights(config, workdir, number)
  if checkpoint:
    path = pathlib.Path(checkpoint).expanduser()
    # The same export may be there: a command that was killed at its end may be run again.
    if not path.is_file() or read_config(path) != json.loads(_recorded(config)):
      _check_absent(path)


def _recorded(config: ConfigDict) -> str:
  return json.dumps(configuration.flatten(config))


def _check_absent(path: pathlib.Path) -> None:
  if path.exists():
    raise UserError(f'--checkpoint={path} exists: choose another file for the export.')


def export_checkpoint(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  checkpoint: str | None = None,
  number: int | None = None,
  dtype: str = 'float32',
) -> pathlib.Path:
  """See `run_lib.export_checkpoint`; `config` comes from `preparation.prepare`."""
  check_export(config, workdir, checkpoint, number, dtype=dtype)
  _, state = load_weights(config, workdir, number)
  step = int(state.step)
  path = pathlib.Path(checkpoint or workdir / f'export_{step}.safetensors').expanduser()
  variables = {'params': state.params_ema, **state.model_state}
  stored = jax.tree_util.tree_map_with_path(functools.partial(_stored, dtype), variables)
  arrays = flax.traverse_util.flatten_dict(stored, sep='/')
  metadata = {'step': str(step), 'config': _recorded(config)}
  if jax.process_index() == 0:
    data = weights.to_safetensors(arrays, metadata)
    if not path.is_file() or path.read_bytes() != data:
      _check_absent(path)
      reporting.write_atomic(path, data)
  logging.info('Exported step %d to %s.', step, path)
  return path


def _stored(dtype: str, path: tuple[Any, ...], x: jax.Array) -> np.ndarray:
  """A variable as it is written to a file of weights in `dtype`."""
  x = np.ascontiguousarray(parallelism.to_host(x))
  # The noise level multiplies frequencies, and their rounding errors with them, before the sine.
  if is_frequency(path, x) or not np.issubdtype(x.dtype, np.floating):
    return x
  with np.errstate(over='ignore'):  # reported below
    stored = x.astype(dtype)
  if not np.isfinite(stored).all():
    name = '/'.join(part.key for part in path)
    raise UserError(
      f'{name} has a weight of {np.abs(x).max():.3g}, which --dtype={dtype} cannot represent: use '
      f'--dtype=float32.'
    )
  return stored
