"""--mode=eval: the evaluation of a run's checkpoints, in rounds that survive a kill.

Each round leaves one file, written atomically, and its random numbers are a function of the seed,
the checkpoint's step and the round's number. So the files that exist are the state: a killed
evaluation resumes with the rounds whose files are missing or damaged, on any number of processes,
and ends in the same numbers. `meta.json` remembers the settings and the checkpoints that the files
belong to.

  ckpt_<N>_loss.npz               mean_loss, and all_losses of the batches
  <split>_ckpt_<N>_bpd_<R>.npz    bpd of the images of round R
  ckpt_<N>_host_0/samples_<R>.npz     samples, uint8
  ckpt_<N>_host_0/statistics_<R>.npz  pool_3 and logits of them
  report_<N>.npz                  what was made of all statistics of checkpoint N
  report.json, report.csv         all numbers of all checkpoints

The first process writes; the others share the computing.
"""

import abc
import csv
import io
import itertools
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tqdm
from absl import logging
from ml_collections import ConfigDict

import datasets
import evaluation
import likelihood
import losses
import metrics
import sampling
import sde_lib
import train_state
from runtime import checkpoints, configuration, npz_file, parallelism, reporting
from runtime.checkpoints import CheckpointReader
from runtime.errors import UserError
from runtime.rng import stream
from runtime.settings import read_keys
from runtime.workdir import LOCATIONS, at_work, check_run, log_start, of_model
from sde_lib import SDE
from train_state import State

# Settings that all numbers depend on, by the beginning of their names.
_COMMON = ('seed', 'data.', 'model.', 'training.sde', 'training.continuous', 'eval.batch_size')


def evaluate(config: ConfigDict, workdir: pathlib.Path, eval_folder: str) -> None:
  """See `run_lib.evaluate`."""
  _check_settings(config)
  folder = _folder(workdir, eval_folder)
  wanted = range(config.eval.begin_ckpt, config.eval.end_ckpt + 1)
  check_run(config, workdir, _of_evaluation)
  _check_range(config, workdir, wanted)
  snapshots = CheckpointReader(workdir / 'checkpoints')
  _check_first(config, snapshots, wanted)
  sde = sde_lib.get_sde(config)
  model, like = train_state.abstract_state(config)
  like = train_state.weights_only(like)
  tasks = [
    make(config, folder, sde, model)
    for name, make in _TASKS.items()
    if config.eval[f'enable_{name}']
  ]
  with at_work(folder, f'--eval_folder={eval_folder}'):
    log_start(config)
    report = Report(folder, tasks)
    for number in wanted:
      _wait_for(config, snapshots, number)
      step = snapshots.step(number)
      report.open(number, step, snapshots.identity(number))
      due = [task for task in tasks if not parallelism.from_first_process(task.is_done(number))]
      state = checkpoints.restore(snapshots, number, like) if due else None
      for task in due:
        start = time.monotonic()
        task.run(number, state)
        seconds = time.monotonic() - start
        logging.info('checkpoint: %d, step: %d, %s: %.1f s', number, step, task.name, seconds)
      report.close(number, tasks)


def _of_evaluation(name: str) -> bool:
  """Whether a field has to be that of the run for the numbers to be those of the run."""
  return of_model(name) or name.startswith(
    ('data.dataset', 'data.category', 'training.reduce_mean', 'training.likelihood_weighting')
  )


def _check_settings(config: ConfigDict) -> None:
  """Refuses settings that would be ignored, or leave nothing to do."""
  settings, task = config.eval, config.sampling.task
  enables = [f'eval.enable_{name}' for name in _TASKS]
  if not any(settings[f'enable_{name}'] for name in _TASKS):
    raise UserError(f'Nothing is to be evaluated: set one of {", ".join(enables)} to True.')
  if settings.enable_sampling and task != 'unconditional':
    raise UserError(
      f'sampling.task={task!r} is not for --mode=eval, which compares unconditional samples with '
      f'the data: use --mode=sample for it, or set sampling.task=unconditional.'
    )
  if settings.bpd_repeats < 0:
    raise UserError(f'eval.bpd_repeats={settings.bpd_repeats} must be 1 or more, or 0.')


def _folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """The folder called `name`, which must be one inside the working directory."""
  root = os.path.abspath(workdir)
  path = pathlib.Path(os.path.normpath(os.path.join(root, name)))
  if pathlib.Path(root) not in path.parents:
    raise UserError(
      f"--eval_folder={name!r} must be a folder inside --workdir={workdir}, such as 'eval'."
    )
  return workdir / path.relative_to(root)


def _check_range(config: ConfigDict, workdir: pathlib.Path, wanted: range) -> None:
  """Refuses checkpoints that will never be there."""
  training = config.training
  last = -(-training.n_iters // training.snapshot_freq)
  if not wanted:
    raise UserError(
      f'eval.begin_ckpt={wanted.start} is behind eval.end_ckpt={wanted.stop - 1}: there is nothing '
      f'to evaluate.'
    )
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(f'{workdir}/checkpoints does not exist: --workdir must be that of a run.')
  if config.eval.wait_seconds and wanted[-1] > last:
    raise UserError(
      f'eval.end_ckpt={wanted[-1]} will never be there: training.n_iters={training.n_iters} ends '
      f'at checkpoint {last}; set eval.end_ckpt={last} or less.'
    )


def _check_first(config: ConfigDict, snapshots: CheckpointReader, wanted: range) -> None:
  """Without waiting, all must be there before anything is computed."""
  missing = [number for number in wanted if number not in snapshots.numbers()]
  if missing and not config.eval.wait_seconds:
    raise UserError(
      f'{snapshots.directory} has no checkpoints {missing}: it has {snapshots.numbers()}; set '
      f'eval.begin_ckpt and eval.end_ckpt, or eval.wait_seconds if training has yet to save them.'
    )


def _wait_for(config: ConfigDict, snapshots: CheckpointReader, number: int) -> None:
  seconds = config.eval.wait_seconds
  if number not in snapshots.numbers():
    logging.info('Waiting up to %d s for checkpoint %d.', seconds, number)
  if not snapshots.wait_for(number, seconds):
    raise UserError(
      f'{snapshots.directory} has no checkpoint {number} after eval.wait_seconds={seconds}: it has '
      f'{snapshots.numbers()}; is training still running? The same command continues.'
    )


class Task(abc.ABC):
  """One kind of numbers about a checkpoint.

  The constructor refuses what cannot be computed, before anything is.

  Attributes:
    name: in the names of its settings and files.
    depends_on: beginnings of the names of settings that its numbers depend on.
    source: the images that its numbers are about; None if it needs none.

  Args:
    config: the complete configuration.
    folder: where the files go.
    sde: the forward SDE.
    model: the network.
  """

  name: str
  depends_on: tuple[str, ...] = ()
  source: datasets.Source | None = None

  def __init__(self, config: ConfigDict, folder: pathlib.Path, sde: SDE, model: nn.Module):
    self.config = config
    self.folder = folder
    self.sde = sde
    self.model = model

  def settings(self) -> dict[str, Any]:
    """What the numbers depend on."""
    flat = configuration.flatten(self.config)
    names = (name for name in sorted(flat) if name.startswith(_COMMON + self.depends_on))
    settings = {name: flat[name] for name in names if name not in LOCATIONS}
    fingerprint = getattr(self.source, 'fingerprint', None)
    return settings | ({'data.fingerprint': fingerprint} if fingerprint else {})

  @abc.abstractmethod
  def is_done(self, number: int) -> bool:
    """Whether all files of checkpoint `number` are there."""

  @abc.abstractmethod
  def run(self, number: int, state: State) -> None:
    """Computes the files that are missing; all processes take part."""

  @abc.abstractmethod
  def numbers(self, number: int) -> dict[str, Any]:
    """What the report says, from the files."""

  def write(self, path: pathlib.Path, **arrays: np.ndarray) -> None:
    if jax.process_index() == 0:
      if path.exists():
        logging.warning('%s was damaged; its results have been computed again.', path)
      reporting.write_npz(path, **arrays)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def _is_whole(path: pathlib.Path) -> bool:
  """Whether a file of results is there and as it was written."""
  try:
    with zipfile.ZipFile(path) as file:
      return bool(file.namelist()) and file.testzip() is None
  except npz_file.UNREADABLE:
    return False


def _missing(paths: list[pathlib.Path]) -> list[int]:
  """The indices of the files that the first process does not find, or finds damaged."""
  first = jax.process_index() == 0
  found = (parallelism.from_first_process(first and _is_whole(path)) for path in paths)
  return [i for i, whole in enumerate(found) if not whole]


def _progress(rounds: Iterable[Any], what: str, files: list[Any], missing: list[int]) -> tqdm.tqdm:
  """A bar over the missing rounds that counts those that are there as well."""
  there = len(files) - len(missing)
  return tqdm.tqdm(rounds, what, len(files), initial=there, unit='round', disable=None)


class Loss(Task):
  """The training objective over the test split, each example once."""

  name = 'loss'
  depends_on = ('training.reduce_mean', 'training.likelihood_weighting')

  def __init__(self, config, folder, sde, model):
    super().__init__(config, folder, sde, model)
    dequantization = config.data.uniform_dequantization
    _, self._dataset, _ = datasets.get_dataset(config, dequantization, evaluation=True)
    self.source = self._dataset.source
    step_fn = losses.build_step_fn(config, sde, model, train=False)
    preprocess = self._dataset.preprocess

    @jax.jit
    def batch_loss(rng, state, batch):
      data_rng, step_rng = jax.random.split(rng)
      images = preprocess(data_rng, batch['image'])
      return step_fn((step_rng, state), {'image': images, 'weight': batch['weight']})[1]

    self._batch_loss = batch_loss

  def _path(self, number: int) -> pathlib.Path:
    return self.folder / f'ckpt_{number}_loss.npz'

  def is_done(self, number: int) -> bool:
    return _is_whole(self._path(number))

  def run(self, number: int, state: State) -> None:
    root = jax.random.fold_in(stream(self.config.seed, 'eval'), state.step)
    dataset, values, counts = self._dataset, [], []
    batches = tqdm.tqdm(dataset.once(), 'loss', len(dataset), unit='batch', disable=None)
    for i, batch in enumerate(batches):
      batch = parallelism.global_batch({key: batch[key] for key in ('image', 'weight')})
      values.append(float(self._batch_loss(jax.random.fold_in(root, i), state, batch)))
      counts.append(dataset.count(i))
    reporting.check_finite(np.asarray(values), 'losses', int(state.step))
    mean = np.average(np.float64(values), weights=counts)
    self.write(self._path(number), all_losses=np.float64(values), mean_loss=mean)

  def numbers(self, number: int) -> dict[str, Any]:
    return {'loss': float(_read(self._path(number))['mean_loss'])}


class BitsPerDim(Task):
  """Bits/dim of `eval.bpd_dataset`, each image `eval.bpd_repeats` times with other noise."""

  name = 'bpd'
  depends_on = ('likelihood.', 'eval.bpd')

  def __init__(self, config, folder, sde, model):
    super().__init__(config, folder, sde, model)
    self._split = config.eval.bpd_dataset
    splits = dict(
      zip(('train', 'test'), datasets.get_dataset(config, evaluation=True), strict=False)
    )
    if self._split not in splits:
      raise UserError(f"eval.bpd_dataset={self._split!r} must be 'train' or 'test'.")
    self._dataset = splits[self._split]
    self.source = self._dataset.source
    self._repeats = config.eval.bpd_repeats or {'train': 1, 'test': 5}[self._split]
    inverse_scaler = datasets.get_data_inverse_scaler(config)
    self._likelihood_fn = likelihood.from_config(config, sde, model, inverse_scaler)

  def _files(self, number: int) -> list[pathlib.Path]:
    rounds = self._repeats * len(self._dataset)
    return [self.folder / f'{self._split}_ckpt_{number}_bpd_{r}.npz' for r in range(rounds)]

  def is_done(self, number: int) -> bool:
    return all(_is_whole(path) for path in self._files(number))

  def run(self, number: int, state: State) -> None:
    root = jax.random.fold_in(stream(self.config.seed, 'bpd'), state.step)
    files, batches = self._files(number), len(self._dataset)
    missing = _missing(files)
    for r, images in _progress(self._images(missing), 'bits/dim', files, missing):
      rng = jax.random.fold_in(root, r)
      bpd, _, nfe = self._likelihood_fn(rng, state, parallelism.global_batch(images))
      bpd = parallelism.to_host(bpd)[: self._dataset.count(r % batches)]
      reporting.check_finite(bpd, 'bits/dim', int(state.step))
      self.write(files[r], bpd=bpd, nfe=nfe)

  def _images(self, rounds: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The increasing `rounds`, each with this process's images of it."""
    for repeat, group in itertools.groupby(rounds, lambda r: r // len(self._dataset)):
      wanted = list(group)
      batches = self._dataset.once(wanted[0] - repeat * len(self._dataset))
      for r, batch in zip(range(wanted[0], wanted[-1] + 1), batches, strict=False):
        if r in wanted:
          yield r, batch['image']

  def numbers(self, number: int) -> dict[str, Any]:
    images = np.concatenate([_read(path)['bpd'] for path in self._files(number)])
    bpd = float(np.mean(images, dtype=np.float64))
    numbers = {f'bpd_{self._split}': bpd}
    if bpd >= 0:
      return numbers
    # Grey levels are discrete: -log2 of a probability.
    warning = f'{bpd:.3g} bits/dim cannot be: set likelihood.rtol and likelihood.atol lower.'
    logging.warning('%s', warning)
    return numbers | {'bpd_warnings': [warning]}


class Samples(Task):
  """`eval.num_samples` samples, their features and what these say."""

  name = 'sampling'
  depends_on = ('eval.num_samples', 'eval.extractor')

  def __init__(self, config, folder, sde, model):
    super().__init__(config, folder, sde, model)
    data, self._size = config.data, config.eval.batch_size
    self._count = config.eval.num_samples
    metrics.check_count(self._count)
    datasets.check_batch_size(self._size, 'eval.batch_size')
    if config.eval.extractor == 'none':
      self._extractor, self._stats = None, None
    else:
      self._extractor = evaluation.get_extractor(config)
      self._stats = evaluation.load_dataset_stats(config, self._extractor)
    shape = (self._size, data.image_size, data.image_size, data.num_channels)
    inverse_scaler = datasets.get_data_inverse_scaler(config)
    self._sampling_fn = sampling.get_sampling_fn(config, sde, model, shape, inverse_scaler)

  def settings(self) -> dict[str, Any]:
    flat = configuration.flatten(self.config)
    keys = read_keys(self._reads, self.config)
    settings = super().settings() | {key: flat.get(key) for key in keys}
    if self._stats is None:
      return settings
    return settings | {'eval.stats_path': self._stats.checksum()}

  def _reads(self, config: ConfigDict) -> None:
    """Reads the part of the configuration that samples depend on."""
    sampling.check(config, self.sde)
    sampling.batch_rng(config, jax.random.PRNGKey(0), 0, 1)

  def _files(self, number: int, kind: str) -> list[pathlib.Path]:
    rounds = -(-self._count // self._size)
    return [self.folder / f'ckpt_{number}_host_0' / f'{kind}_{r}.npz' for r in range(rounds)]

  def _report(self, number: int) -> pathlib.Path:
    return self.folder / f'report_{number}.npz'

  def is_done(self, number: int) -> bool:
    if self._extractor is not None:
      return _is_whole(self._report(number))
    return all(_is_whole(path) for path in self._files(number, 'samples'))

  def run(self, number: int, state: State) -> None:
    root = jax.random.fold_in(stream(self.config.seed, 'sample'), state.step)
    drawn, described = self._files(number, 'samples'), self._files(number, 'statistics')
    missing = _missing(drawn if self._extractor is None else described)
    for r in _progress(missing, 'samples', drawn, missing):
      if _missing([drawn[r]]):
        rng = sampling.batch_rng(self.config, root, r, self._size)
        samples = self._draw(rng, state)[: self._count - r * self._size]
        self.write(drawn[r], samples=samples)
      else:  # killed between the two files
        samples = _read(drawn[r])['samples']
      if self._extractor is not None:
        self.write(described[r], **self._extractor(samples))
    if self._extractor is not None and jax.process_index() == 0:
      self._compare(number, described)

  def _draw(self, rng: jax.Array, state: State) -> np.ndarray:
    samples = parallelism.to_host(self._sampling_fn(rng, state)[0])
    reporting.check_finite(samples, 'samples', int(state.step))
    return reporting.to_uint8(samples)

  def _compare(self, number: int, described: list[pathlib.Path]) -> None:
    parts = [_read(path) for path in described]
    pool_3, logits = (np.concatenate([part[key] for part in parts]) for key in ('pool_3', 'logits'))
    del parts
    name = self._extractor.name
    numbers, warnings = evaluation.sample_metrics(name, self._stats, pool_3, logits)
    self.write(self._report(number), **numbers, warnings=np.asarray(warnings, np.str_))

  def numbers(self, number: int) -> dict[str, Any]:
    if self._extractor is None:
      return {}
    content = _read(self._report(number))
    warnings = content.pop('warnings').tolist()
    for warning in warnings:
      logging.warning('%s', warning)
    numbers = {key: value.item() for key, value in content.items()}
    of = {'reference': self._stats.name, 'floor': self._stats.floor, 'warnings': warnings}
    return numbers | {key: value for key, value in of.items() if value}


_TASKS: dict[str, type[Task]] = {'loss': Loss, 'bpd': BitsPerDim, 'sampling': Samples}


def _load_json(path: pathlib.Path) -> Any:
  """The content of a JSON file; None if it is missing or damaged."""
  try:
    return json.loads(path.read_bytes())
  except (FileNotFoundError, ValueError):
    return None


def _is_table(content: Any) -> bool:
  """Whether this is what both JSON files are: a dictionary of dictionaries."""
  return isinstance(content, dict) and all(isinstance(row, dict) for row in content.values())


def _differing(old: dict[str, Any], new: dict[str, Any], config: dict[str, Any]) -> list[str]:
  """The settings that differ, with both values.

  What only one has is named if that is all: another method has other settings. What was recorded
  but the numbers no longer depend on, though the configuration still has it, does not count.
  """
  both = [key for key in new if key in old and old[key] != new[key]]
  one = sorted(new.keys() - old.keys() | old.keys() - new.keys() - config.keys())
  return [f'{key} (was {old.get(key)!r}, is {new.get(key)!r})' for key in both or one]


class Report:
  """`meta.json`, `report.json` and `report.csv`; the first process writes them.

  Args:
    folder: where they are.
    tasks: what is evaluated.

  Raises:
    UserError: if the folder has results of other settings, or none can tell of which.
  """

  def __init__(self, folder: pathlib.Path, tasks: list[Task]):
    self._folder = folder
    self._meta = self._load_meta()
    for task in tasks:
      settings = json.loads(json.dumps(task.settings()))
      old = self._meta['settings'].setdefault(task.name, settings)
      if differing := _differing(old, settings, configuration.flatten(task.config)):
        raise UserError(
          f'{folder} holds an evaluation with other settings: {", ".join(differing)}; use those '
          f'values or another --eval_folder.'
        )
      self._meta['settings'][task.name] = settings
    self._entries = self._load_entries(tasks)
    # Nobody may read the old file after the first process has written the new one.
    parallelism.from_first_process(0)

  def _load_meta(self) -> dict[str, dict[str, Any]]:
    path, empty = self._folder / 'meta.json', {'settings': {}, 'checkpoints': {}}
    results = [p for kind in ('*.npz', 'ckpt_*', 'report.json') for p in self._folder.glob(kind)]
    if not path.exists() and not results:
      return empty
    meta = _load_json(path)
    if not _is_table(meta) or not all(_is_table(meta.get(key)) for key in empty):
      raise UserError(
        f'{path} is missing or damaged, and nothing else tells what the results beside it belong '
        f'to: use another --eval_folder, or remove {self._folder}.'
      )
    return meta

  def _load_entries(self, tasks: list[Task]) -> dict[str, dict[str, Any]]:
    """`report.json`, or what the files of the tasks say where it is missing or damaged."""
    path = self._folder / 'report.json'
    entries = _load_json(path)
    if _is_table(entries):
      return entries
    if path.exists():
      logging.warning(
        '%s was damaged; it is made again from the files of %s.',
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
    """Claims the files of checkpoint `number`.

    Raises:
      UserError: if they were made from another checkpoint of that number.
    """
    claim = {'step': step, 'identity': identity}
    claimed = self._meta['checkpoints'].setdefault(str(number), claim)
    if claimed != claim:
      raise UserError(
        f'{self._folder} has results of another checkpoint {number}, of step {claimed["step"]} '
        f'(this one is of {step}): remove them or use another --eval_folder.'
      )
    self._save('meta.json', self._meta)

  def close(self, number: int, tasks: list[Task]) -> None:
    """Writes the reports with the numbers of checkpoint `number`."""
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
