"""`--mode=eval`: evaluates the checkpoints of a run, in rounds that survive a kill.

Each round writes one file, complete or not at all, and its random numbers are a function of the
seed, the checkpoint's step and the number of the round. So the existing files are the whole state:
a killed evaluation resumes with the rounds whose files are missing or damaged, on any number of
processes, and computes the same numbers. `meta.json` records the settings and the checkpoints that
the files belong to.

  ckpt_<N>_loss.npz                   mean_loss, and all_losses of the batches
  <split>_ckpt_<N>_bpd_<R>.npz        bits/dim of the images of round R
  ckpt_<N>_host_0/samples_<R>.npz     samples as grey levels
  ckpt_<N>_host_0/statistics_<R>.npz  their features pool_3 and logits
  report_<N>.npz                      the numbers computed from all statistics of checkpoint N
  report.json, report.csv             all numbers of all checkpoints

The first process writes; the others take part in the computation.
"""

import csv
import io
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

import sde_lib
import train_state
from modes.evaluations import EVALUATIONS, Evaluation
from runtime import checkpoints, configuration, parallelism, reporting
from runtime.checkpoints import CheckpointReader, DamagedCheckpoint
from runtime.errors import UserError
from runtime.workdir import at_work, check_run, log_start, of_model


def check(
  config: ConfigDict, workdir: pathlib.Path, eval_folder: str
) -> tuple[pathlib.Path, list[int]]:
  """Refuses what the mode would refuse, but reads neither data nor weights.

  Returns:
    The folder of the results, and the numbers of the checkpoints.
  """
  _check_settings(config)
  folder = _folder(workdir, eval_folder)
  wanted = range(config.eval.begin_ckpt, config.eval.end_ckpt + 1)
  check_run(config, workdir, _of_evaluation)
  _check_range(config, workdir, wanted)
  snapshots = CheckpointReader(workdir / 'checkpoints')
  left = [
    number
    for number in wanted
    if not parallelism.from_first_process(_is_removed(config, snapshots, number))
  ]
  _check_first(config, snapshots, left or wanted)
  if len(left) < len(wanted):
    logging.warning('Evaluating %s: training.keep_checkpoints has removed the others.', left)
  return folder, left


def evaluate(config: ConfigDict, workdir: pathlib.Path, eval_folder: str) -> None:
  """See `run_lib.evaluate`; `config` comes from `preparation.prepare`."""
  folder, wanted = check(config, workdir, eval_folder)
  snapshots = CheckpointReader(workdir / 'checkpoints')
  sde = sde_lib.get_sde(config)
  model, like = train_state.abstract_state(config)
  like = train_state.weights_only(like)
  tasks = [
    EVALUATIONS.get(name)(config, folder, sde, model)
    for name in EVALUATIONS.names()
    if config.eval.get(f'enable_{name}')
  ]
  _warn_of_other_images(workdir, tasks)
  with at_work(folder, f'--eval_folder={eval_folder}'):
    log_start(config)
    report = Report(folder, tasks)
    for number in wanted:
      if not parallelism.from_first_process(_wait_for(config, snapshots, number)):
        logging.warning('Checkpoint %d is left out: training has removed it.', number)
        continue
      try:
        step, identity = snapshots.step(number), snapshots.identity(number)
        due = [task for task in tasks if not parallelism.from_first_process(task.is_done(number))]
        state = checkpoints.restore(snapshots, number, like) if due else None
      except DamagedCheckpoint:
        if jax.process_count() > 1 or not _is_removed(config, snapshots, number):
          raise
        logging.warning('Checkpoint %d is left out: training removed it as it was read.', number)
        continue
      report.open(number, step, identity)
      for task in due:
        start = time.monotonic()
        task.run(number, state)
        seconds = time.monotonic() - start
        logging.info('checkpoint: %d, step: %d, %s: %.1f s', number, step, task.name, seconds)
      report.close(number, tasks)


def _warn_of_other_images(workdir: pathlib.Path, tasks: Sequence[Evaluation]) -> None:
  recorded = _load_json(workdir / 'data.json')
  if not isinstance(recorded, dict):
    return
  known = {recorded.get(split) for split in ('train', 'test')} - {None}
  for task in tasks:
    fingerprint = getattr(task.source, 'fingerprint', None)
    if fingerprint and known and fingerprint not in known:
      logging.warning(
        'The images of the evaluation %s are not those that %s was trained or tested on.',
        task.name,
        workdir,
      )


def _of_evaluation(name: str) -> bool:
  """Whether the numbers of a run's checkpoints depend on the field of this name."""
  return of_model(name) or name.startswith(
    ('data.dataset', 'data.category', 'training.reduce_mean', 'training.likelihood_weighting')
  )


def _check_settings(config: ConfigDict) -> None:
  """Refuses settings that have no effect, or leave nothing to evaluate."""
  settings, task = config.eval, config.sampling.task
  enables = [f'eval.enable_{name}' for name in EVALUATIONS.names()]
  if not any(settings.get(f'enable_{name}') for name in EVALUATIONS.names()):
    raise UserError(f'No evaluation is enabled: set one of {", ".join(enables)} to True.')
  if settings.enable_sampling and task != 'unconditional':
    raise UserError(
      f'sampling.task={task!r} is not for --mode=eval, which compares unconditional samples with '
      f'the data: use --mode=sample for this task, or set sampling.task=unconditional.'
    )
  if settings.bpd_repeats < 0:
    raise UserError(
      f'eval.bpd_repeats={settings.bpd_repeats} must be 1 or more: set it, or 0 for the default.'
    )


def _folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """The folder of this name, which must lie inside the working directory."""
  root = os.path.abspath(workdir)
  path = pathlib.Path(os.path.normpath(os.path.join(root, name)))
  if pathlib.Path(root) not in path.parents:
    raise UserError(
      f"--eval_folder={name!r} must be a folder inside --workdir={workdir}, such as 'eval'."
    )
  inside = path.relative_to(root)
  if inside.parts[0] in (*checkpoints.DIRECTORIES, 'samples'):
    raise UserError(
      f"--eval_folder={name!r} has other files of the run: name another folder, such as 'eval'."
    )
  return workdir / inside


def _check_range(config: ConfigDict, workdir: pathlib.Path, wanted: range) -> None:
  """Refuses checkpoints that training will never save."""
  training = config.training
  last = -(-training.n_iters // training.snapshot_freq)
  if not wanted:
    raise UserError(
      f'eval.begin_ckpt={wanted.start} is greater than eval.end_ckpt={wanted.stop - 1}: set '
      f'eval.begin_ckpt to the first checkpoint to evaluate and eval.end_ckpt to the last.'
    )
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(f'{workdir}/checkpoints does not exist: --workdir must be that of a run.')
  if config.eval.wait_seconds and wanted[-1] > last:
    raise UserError(
      f'eval.end_ckpt={wanted[-1]} is more than training will save: training.n_iters='
      f'{training.n_iters} ends at checkpoint {last}; set eval.end_ckpt={last} or less.'
    )


def _is_removed(config: ConfigDict, snapshots: CheckpointReader, number: int) -> bool:
  """Whether training has saved a checkpoint, and removed it for a later one."""
  removes = config.training.keep_checkpoints != 'all'
  return removes and number not in snapshots.numbers() and number < snapshots.newest()


def _check_first(config: ConfigDict, snapshots: CheckpointReader, wanted: Sequence[int]) -> None:
  """Refuses missing checkpoints before anything is computed, unless waiting is enabled."""
  missing = [number for number in wanted if number not in snapshots.numbers()]
  if missing and not config.eval.wait_seconds:
    raise UserError(
      f'{snapshots.directory} has no checkpoints {missing}: it has {snapshots.numbers()}; set '
      f'eval.begin_ckpt and eval.end_ckpt, or eval.wait_seconds if training has yet to save them.'
    )


def _wait_for(config: ConfigDict, snapshots: CheckpointReader, number: int) -> bool:
  """Waits for a checkpoint; False if training has removed it.

  Raises:
    UserError: if it does not appear in time, or never will.
  """
  seconds = config.eval.wait_seconds
  if number > snapshots.newest():
    logging.info('Waiting up to %d s for checkpoint %d.', seconds, number)
  snapshots.wait_for(number, seconds)
  there = number in snapshots.numbers()
  if not there and not _is_removed(config, snapshots, number):
    raise UserError(
      f'{snapshots.directory} has no checkpoint {number} after eval.wait_seconds={seconds}: it has '
      f'{snapshots.numbers()}; is training still running? To resume, rerun the same command.'
    )
  return there


def _load_json(path: pathlib.Path) -> Any:
  """The content of a JSON file; None if it is missing or damaged."""
  try:
    return json.loads(path.read_bytes())
  except (FileNotFoundError, ValueError):
    return None


def _is_report(content: Any) -> bool:
  """Whether this is a table whose rows are checkpoints, as in report.json."""
  return _is_table(content) and all(key.isdecimal() for key in content)


def _is_table(content: Any) -> bool:
  """Whether this is a dictionary of dictionaries, as in meta.json and report.json."""
  return isinstance(content, dict) and all(isinstance(row, dict) for row in content.values())


def _differences(old: dict[str, Any], new: dict[str, Any], config: ConfigDict) -> str:
  """See `configuration.differences`.

  A recorded setting that the configuration still has but the numbers no longer depend on does not
  count.
  """
  ignored = configuration.flatten(config).keys() - new.keys()
  return configuration.differences(old, new, lambda name: name not in ignored)


class Report:
  """The files `meta.json`, `report.json` and `report.csv`, which the first process writes.

  Args:
    folder: where the files are.
    tasks: the enabled evaluations.

  Raises:
    UserError: if the folder has results of other settings, or of unknown ones because `meta.json`
      is missing or damaged.
  """

  def __init__(self, folder: pathlib.Path, tasks: list[Evaluation]):
    self._folder = folder
    self._meta = self._load_meta()
    for task in tasks:
      settings = json.loads(json.dumps(task.settings()))
      old = self._meta['settings'].setdefault(task.name, settings)
      if differing := _differences(old, settings, task.config):
        raise UserError(
          f'{folder} holds an evaluation with other settings: {differing}; set the recorded values '
          f'or another --eval_folder.'
        )
      self._meta['settings'][task.name] = settings
    self._entries = self._load_entries(tasks)
    # All processes read the old file before the first one writes the new one.
    parallelism.from_first_process(0)

  def _load_meta(self) -> dict[str, dict[str, Any]]:
    path, empty = self._folder / 'meta.json', {'settings': {}, 'checkpoints': {}}
    results = [p for kind in ('*.npz', 'ckpt_*', 'report.json') for p in self._folder.glob(kind)]
    if not path.exists() and not results:
      return empty
    meta = _load_json(path)
    known = _is_table(meta) and _is_table(meta.get('settings'))
    if not known or not _is_report(meta.get('checkpoints')):
      raise UserError(
        f'{path} is missing or damaged, so the settings of the results in its folder are unknown: '
        f'use another --eval_folder, or remove {self._folder}.'
      )
    return meta

  def _load_entries(self, tasks: list[Evaluation]) -> dict[str, dict[str, Any]]:
    """The content of `report.json`; if that is missing or damaged, the numbers in other files."""
    path = self._folder / 'report.json'
    entries = _load_json(path)
    if _is_report(entries):
      return entries
    if path.exists():
      logging.warning(
        '%s is damaged: its numbers are read again from the files of %s.',
        path,
        ', '.join(task.name for task in tasks),
      )
    entries = {}
    for number, checkpoint in self._meta['checkpoints'].items():
      for task in tasks:
        if task.is_done(int(number)):
          entry = entries.setdefault(number, {'step': checkpoint['step']})
          entry |= task.numbers(int(number))
    return entries

  def _save(self, name: str, content: Any) -> None:
    if jax.process_index() == 0:
      reporting.write_atomic(self._folder / name, json.dumps(content, indent=2).encode())

  def open(self, number: int, step: int, identity: str) -> None:
    """Records that the files of checkpoint `number` belong to this checkpoint.

    Args:
      number: the number of the checkpoint.
      step: its training step.
      identity: its checksum.

    Raises:
      UserError: if the folder has results of another checkpoint of this number.
    """
    claim = {'step': step, 'identity': identity}
    claimed = self._meta['checkpoints'].setdefault(str(number), claim)
    if claimed != claim:
      raise UserError(
        f'{self._folder} has results of another checkpoint {number}, of step {claimed["step"]}, '
        f'while this one is of step {step}: remove them or use another --eval_folder.'
      )
    self._save('meta.json', self._meta)

  def close(self, number: int, tasks: list[Evaluation]) -> None:
    """Adds the numbers of checkpoint `number` to `report.json` and `report.csv`."""
    if jax.process_index() != 0:
      return
    entry = self._entries.setdefault(str(number), {})
    entry['step'] = self._meta['checkpoints'][str(number)]['step']
    for task in tasks:
      entry |= task.numbers(number)
    scalars = {key: value for key, value in entry.items() if isinstance(value, (int, float))}
    logging.info(
      'checkpoint: %d, %s', number, ', '.join(f'{k}: {v:.6g}' for k, v in scalars.items())
    )
    self._save('report.json', self._entries)
    reporting.write_atomic(self._folder / 'report.csv', self._table().encode())

  def _table(self) -> str:
    """One line for each checkpoint, one column for each number."""
    rows = [
      {'checkpoint': number, **{k: v for k, v in entry.items() if not isinstance(v, (dict, list))}}
      for number, entry in sorted(self._entries.items(), key=lambda item: int(item[0]))
    ]
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
