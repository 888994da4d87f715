"""Samples of a trained run under a task, in rounds that survive a kill.

A round is a batch of `sampling.batch_size`. The random numbers depend on the seed and the round, or
with `sampling.per_image_seeds` the image, only; a run that was killed goes on with the round that
it was in.

  samples_<R>.npz     uint8 images and labels; where test images are used, also what was given of
                      them, and the originals
  settings.json       the configuration of sampling and data; other settings are refused
  report_<R>.json     task, method, step, seed, network calls, seconds; written last
  grid.png            what was given, the sample and the original side by side
  trajectory.gif/png  with `sampling.trajectory_every`: the first round on its way
"""

import json
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tqdm
from absl import logging

import checkpoints
import configuration
import controllable_generation
import datasets
import losses
import parallelism
import reporting
import sampling
import sde_lib
from checkpoints import CheckpointDirectory
from errors import UserError
from losses import State
from sde_lib import SDE


def sample(config: Any, workdir: pathlib.Path, checkpoint_number: int | None) -> None:
  """See `run_lib.sample`."""
  sde = sde_lib.get_sde(config)
  draw = RoundDrawer(config, sde)
  model, state = trained_state(config, workdir, checkpoint_number)
  settings = config.sampling
  name = f'{settings.task}_{settings.method}_step_{int(state.step)}_seed_{config.seed}'
  directory = workdir / 'samples' / name.lower()
  _record_settings(directory, config)
  rounds = -(-settings.num_samples // settings.batch_size)
  sampler = sampling.get_sampling_fn(config, sde, model, draw.shape, draw.inverse_scaler)
  with tqdm.tqdm(total=rounds * draw.calls, unit='call', disable=None) as bar:
    for number in range(rounds):
      done = (directory / f'report_{number}.json').exists()
      if not parallelism.from_first_process(done):
        draw(sampler, state, number, directory, bar)
      bar.update((number + 1) * draw.calls - bar.n)
  if jax.process_index() == 0:
    reporting.write_comparison(directory, rounds, settings.num_samples)
  logging.info('%d samples: %s', settings.num_samples, directory)


def _record_settings(directory: pathlib.Path, config: Any) -> None:
  """Writes `settings.json`.

  Raises:
    UserError: if the directory holds samples of other settings.
  """
  path = directory / 'settings.json'
  settings = configuration.flatten(
    {'sampling': config.sampling.to_dict(), 'data': config.data.to_dict()}
  )
  free = ('sampling.num_samples', 'sampling.trajectory_every')
  settings = {key: value for key, value in settings.items() if key not in free}
  if path.exists():
    old = json.loads(path.read_text())
    differing = [
      f'{key} (was {old.get(key)!r}, is {settings.get(key)!r})'
      for key in sorted(old.keys() | settings.keys())
      if old.get(key) != settings.get(key)
    ]
    if differing:
      raise UserError(
        f'{directory} holds samples of other settings: {", ".join(differing)}; set another '
        f'--config.seed, or remove it.'
      )
  elif jax.process_index() == 0:
    reporting.write_atomic(path, json.dumps(settings, indent=2).encode())


def trained_state(
  config: Any, workdir: pathlib.Path, number: int | None
) -> tuple[nn.Module, State]:
  """The network and a saved state of the run.

  Raises:
    UserError: if there is none.
  """
  model, like = losses.abstract_state(config)
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(f'--workdir={workdir} holds no checkpoints/: train there first, or import.')
  with (
    CheckpointDirectory(workdir / 'checkpoints') as snapshots,
    CheckpointDirectory(workdir / 'checkpoints-meta', keep=2) as latest,
  ):
    if number is not None and number not in snapshots.numbers():
      raise UserError(
        f'--checkpoint_number={number} is not in {workdir}/checkpoints: it has '
        f'{snapshots.numbers()}.'
      )
    if number is not None:
      return model, snapshots.restore(number, like)
    state = checkpoints.restore_newest([latest, snapshots], like)
  if state is None:
    raise UserError(f'--workdir={workdir} holds no checkpoint: train there first, or import.')
  return model, state


class RoundDrawer:
  """Draws one batch under the configured task and writes it.

  Args:
    config: reads `sampling`, `data` and `seed`.
    sde: the forward SDE.

  Raises:
    UserError: for settings that do not go together, before anything is compiled.
  """

  def __init__(self, config: Any, sde: SDE):
    settings, data = config.sampling, config.data
    datasets.check_batch_size(settings.batch_size, 'sampling.batch_size')
    if settings.num_samples < 1:
      raise UserError(f'sampling.num_samples={settings.num_samples} must be at least 1.')
    self.shape = (settings.batch_size, data.image_size, data.image_size, data.num_channels)
    self.inverse_scaler = datasets.get_data_inverse_scaler(config)
    self._scaler = datasets.get_data_scaler(config)
    self._config, self._settings = config, settings
    self._root = configuration.stream(config, 'sample_mode')
    self._task = controllable_generation.get_task(config, sde, self.inverse_scaler)
    zeros = jax.numpy.zeros((2, *self.shape[1:])), jax.numpy.zeros(2, int)
    sampling.check(config, sde, self._task.condition(*zeros))
    method = sampling.get_method(config, sde)
    self.calls = method.n_steps * method.calls_per_step
    self._source = datasets.get_source(config, 'test') if self._task.uses_images else None

  def __call__(
    self,
    sampler: sampling.Sampler,
    state: State,
    number: int,
    directory: pathlib.Path,
    bar: tqdm.tqdm,
  ) -> None:
    index = number * self.shape[0] + np.arange(self.shape[0])
    originals, labels = self._examples(index)
    images = self._scaler(originals / np.float32(255))
    condition = self._task.condition(jax.numpy.asarray(images), jax.numpy.asarray(labels))
    rng = sampling.batch_rng(self._config, self._root, number, self.shape[0])
    every = self._settings.trajectory_every if number == 0 else 0
    watch = reporting.SamplingProgress(bar, self.calls, every)
    start = time.perf_counter()
    samples, nfe = sampler(rng, state, condition=parallelism.replicate(condition), watch=watch)
    samples = reporting.to_uint8(parallelism.to_host(samples))
    seconds = time.perf_counter() - start
    if jax.process_index() != 0:
      return
    arrays = {'samples': samples, 'labels': labels}
    if self._source is not None:
      given = self.inverse_scaler(self._task.given(condition, images))
      arrays |= {'given': reporting.to_uint8(given), 'originals': originals}
    reporting.write_npz(directory / f'samples_{number}.npz', **arrays)
    if watch.frames:
      reporting.write_trajectory(directory, watch.frames)
    report = {
      'task': self._settings.task,
      'method': self._settings.method,
      'step': int(state.step),
      'seed': self._config.seed,
      'round': number,
      'samples': len(samples),
      'nfe': nfe,
      'seconds': round(seconds, 3),
      'labels': labels.tolist(),
    }
    text = json.dumps(report, indent=2).encode()
    reporting.write_atomic(directory / f'report_{number}.json', text)

  def _examples(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images of the test split in an order that the seed draws, and labels."""
    if self._source is None:
      return np.zeros(self.shape, np.uint8), self._task.labels(index)
    order = np.random.RandomState(self._config.seed).permutation(len(self._source))
    examples = [self._source[order[i % len(order)]] for i in index]
    return np.stack([e['image'] for e in examples]), np.stack([e['label'] for e in examples])
