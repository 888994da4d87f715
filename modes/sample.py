"""`--mode=sample`: draws samples of a trained run under a task, in rounds that survive a kill.

A round is a batch of `sampling.batch_size`; the last one keeps only the remainder of
`sampling.num_samples`. The random numbers depend only on the seed and the round, or on the seed and
the image with `sampling.per_image_seeds`; a run that was killed resumes with its unfinished round.

  samples_<R>.npz     grey levels and labels; for tasks that use test images also the observed part
                      (`given`) and the `originals`
  settings.json       the checkpoint and the settings that the samples depend on; others are refused
  report_<R>.json     task, method, step, seed, NFE, seconds; written last
  grid.png            the observed part, the sample and the original side by side
  trajectory.gif/png  with `sampling.trajectory_every`: x_t of the first round over time
"""

import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from ml_collections import ConfigDict

import datasets
import sampling
import sde_lib
from modes.drawing import TaskSampler, round_sizes
from modes.loading import check_weights, load_weights
from runtime import configuration, parallelism, progress, reporting
from runtime.array_types import GreyLevels, Labels
from runtime.configuration import differences
from runtime.errors import UserError
from runtime.files import locate
from runtime.npz_file import is_whole
from runtime.settings import read_keys
from runtime.workdir import STORAGE, at_work, of_model, read_json
from sde_lib import SDE
from train_state import State


def check(config: ConfigDict, workdir: pathlib.Path, checkpoint_number: int | None) -> None:
  """Refuses what the mode would refuse, but reads neither data nor weights."""
  _check_settings(config)
  TaskSampler(config, sde_lib.get_sde(config))
  check_weights(config, workdir, checkpoint_number)


def _check_settings(config: ConfigDict) -> None:
  settings = config.sampling
  datasets.check_batch_size(settings.batch_size, 'sampling.batch_size')
  if settings.num_samples < 1:
    raise UserError(f'sampling.num_samples={settings.num_samples} must be at least 1.')
  if settings.trajectory_every < 0:
    raise UserError(
      f'sampling.trajectory_every={settings.trajectory_every} must not be negative: set it to 0 '
      f'for no GIF.'
    )


def sample(config: ConfigDict, workdir: pathlib.Path, checkpoint_number: int | None) -> None:
  """See `run_lib.sample`; `config` comes from `preparation.prepare`."""
  sde = sde_lib.get_sde(config)
  draw = RoundSampler(config, sde)
  read = read_keys(lambda config: RoundSampler(config, sde), config)
  model, state = load_weights(config, workdir, checkpoint_number)
  settings = config.sampling
  name = f'{settings.task}_{settings.method}_step_{int(state.step)}_seed_{config.seed}'
  directory = workdir / 'samples' / name.lower()
  sampler = draw.compile(model)
  with at_work(directory, '--workdir'):
    _record_settings(directory, _settings(config, read, draw.source, state=state))
    sizes = round_sizes(settings.num_samples, settings.batch_size)
    with progress.bar(what='samples', total=len(sizes) * draw.nfe, unit='NFE') as bar:
      for number, size in enumerate(sizes):
        if not parallelism.from_first_process(_is_done(directory, number, size)):
          draw(sampler, state, number=number, size=size, directory=directory, bar=bar)
        bar.update((number + 1) * draw.nfe - bar.n)
    if jax.process_index() == 0:
      reporting.write_comparison(directory, len(sizes), settings.num_samples)
    logging.info('%d samples: %s', settings.num_samples, directory)


def _is_done(directory: pathlib.Path, number: int, size: int) -> bool:
  """Whether round `number` has been written with at least `size` samples."""
  try:
    report = read_json(directory / f'report_{number}.json', '')
  except UserError:
    return False
  whole = is_whole(directory / f'samples_{number}.npz', 'samples')
  return whole and isinstance(report.get('samples'), int) and report['samples'] >= size


def _settings(
  config: ConfigDict, read: tuple[str, ...], source: datasets.Source | None, *, state: State
) -> dict[str, Any]:
  """The settings that the samples depend on: those of the names `read`, the data, the weights."""
  free = (*STORAGE, 'sampling.num_samples', 'sampling.trajectory_every', 'classifier.checkpoint')
  flat = configuration.flatten(config)
  names = (name for name in sorted({*read, *filter(of_model, flat)}) if name not in free)
  settings = {name: flat.get(name) for name in names}
  settings['checkpoint'] = weights_checksum(state)
  if 'classifier.checkpoint' in read:
    content = locate(config.classifier.checkpoint).read_bytes()
    settings['classifier'] = hashlib.sha256(content).hexdigest()[:16]
  if fingerprint := getattr(source, 'fingerprint', None):
    settings['data.fingerprint'] = fingerprint
  return settings


def _record_settings(directory: pathlib.Path, settings: dict[str, Any]) -> None:
  """Writes `settings.json`, or compares the existing one.

  Raises:
    UserError: if the directory holds samples of other settings.
  """
  path = directory / 'settings.json'
  if path.exists():
    old = read_json(path, f'remove {directory}, or set another --config.seed')
    if differing := differences(old, settings):
      raise UserError(
        f'{directory} holds samples of other settings: {differing}; set another --config.seed, or '
        f'remove the directory.'
      )
  elif jax.process_index() == 0:
    reporting.write_atomic(path, json.dumps(settings, indent=2).encode())


def weights_checksum(state: State) -> str:
  """A checksum that tells the EMA weights of a state from others of the same step."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves((state.params_ema, state.model_state)):
    digest.update(np.ascontiguousarray(parallelism.to_host(leaf)))
  return digest.hexdigest()[:16]


class RoundSampler(TaskSampler):
  """Draws batches under the configured task and writes them.

  Args:
    config: the configuration; `sampling`, `data`, `seed` and what the task needs are read.
    sde: the forward SDE.

  Attributes:
    source: the test images, for tasks that use them; else None.

  Raises:
    UserError: for settings that contradict one another, before anything is compiled.
  """

  def __init__(self, config: ConfigDict, sde: SDE):
    _check_settings(config)
    super().__init__(config, sde)
    self._seed, self._settings = config.seed, config.sampling
    self.source = datasets.get_source(config, 'test') if self.task.uses_images else None

  def __call__(
    self,
    sampler: sampling.SamplingFn,
    state: State,
    *,
    number: int,
    size: int,
    directory: pathlib.Path,
    bar: tqdm.tqdm,
  ) -> None:
    """Draws a round and writes its samples, then its report.

    Args:
      sampler: the compiled sampler.
      state: the state whose EMA parameters it uses.
      number: the number of the round, from 0.
      size: how many samples of the batch to keep.
      directory: where the files go.
      bar: the progress bar, which counts NFE.

    Raises:
      FloatingPointError: if a sample has a value that is NaN or infinite.
    """
    index = number * self.shape[0] + np.arange(self.shape[0])
    originals, labels = self._examples(index)
    images = originals / np.float32(255)
    condition = self.condition(images, labels)
    every = self._settings.trajectory_every if number == 0 else 0
    callback = reporting.SamplingProgress(bar, self.nfe, every)
    start = time.perf_counter()
    samples, nfe = self.draw(
      sampler, state, self.rng(self._seed, number), condition=condition, callback=callback
    )
    samples = reporting.to_uint8(samples)[:size]
    seconds = time.perf_counter() - start
    if jax.process_index() != 0:
      return
    arrays = {'samples': samples, 'labels': labels[:size]}
    if self.source is not None:
      observed = self.inverse_scaler(self.task.observed(condition, self.scaler(images)))
      arrays |= {'given': reporting.to_uint8(observed)[:size], 'originals': originals[:size]}
    reporting.write_npz(directory / f'samples_{number}.npz', **arrays)
    if callback.frames:
      reporting.write_trajectory(directory, callback.frames)
    report = {
      'task': self._settings.task,
      'method': self._settings.method,
      'step': int(state.step),
      'seed': self._seed,
      'round': number,
      'samples': len(samples),
      'nfe': nfe,
      'seconds': round(seconds, 3),
      'labels': labels[:size].tolist(),
    }
    text = json.dumps(report, indent=2).encode()
    reporting.write_atomic(directory / f'report_{number}.json', text)

  def _examples(self, index: np.ndarray) -> tuple[GreyLevels, Labels]:
    """Test images as grey levels, in an order that the seed determines, and their labels."""
    if self.source is None:
      return np.zeros(self.shape, np.uint8), self.task.labels(index)
    order = np.random.RandomState(self._seed).permutation(len(self.source))
    examples = [self.source[order[i % len(order)]] for i in index]
    return np.stack([e['image'] for e in examples]), np.stack([e['label'] for e in examples])
