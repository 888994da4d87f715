"""--mode=sample: samples of a trained run under a task, in rounds that survive a kill.

A round is a batch of `sampling.batch_size`, of which the last keeps what is left of
`sampling.num_samples`. The random numbers depend on the seed and the round, or with
`sampling.per_image_seeds` the image, only; a run that was killed resumes with its round.

  samples_<R>.npz     uint8 images and labels; where test images are used, also what was given of
                      them, and the originals
  settings.json       the checkpoint and the settings that the samples depend on; others are refused
  report_<R>.json     task, method, step, seed, network calls, seconds; written last
  grid.png            what was given, the sample and the original side by side
  trajectory.gif/png  with `sampling.trajectory_every`: the first round on its way
"""

import hashlib
import json
import pathlib
import time
import zipfile
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from ml_collections import ConfigDict

import controllable_generation
import datasets
import sampling
import sde_lib
from modes.loading import load_weights
from runtime import configuration, parallelism, reporting
from runtime.configuration import differences
from runtime.errors import UserError
from runtime.rng import stream
from runtime.settings import read_keys
from runtime.workdir import LOCATIONS, at_work, of_model, read_json
from sde_lib import SDE
from train_state import State


def sample(config: ConfigDict, workdir: pathlib.Path, checkpoint_number: int | None) -> None:
  """See `run_lib.sample`."""
  sde = sde_lib.get_sde(config)
  draw = RoundSampler(config, sde)
  read = read_keys(lambda config: RoundSampler(config, sde), config)
  model, state = load_weights(config, workdir, checkpoint_number)
  settings = config.sampling
  name = f'{settings.task}_{settings.method}_step_{int(state.step)}_seed_{config.seed}'
  directory = workdir / 'samples' / name.lower()
  sampler = sampling.get_sampling_fn(config, sde, model, draw.shape, draw.inverse_scaler)
  with at_work(directory, '--workdir'):
    _record_settings(directory, _settings(config, read, draw, state))
    sizes = round_sizes(settings.num_samples, settings.batch_size)
    with tqdm.tqdm(total=len(sizes) * draw.calls, unit='call', disable=None) as bar:
      for number, size in enumerate(sizes):
        if not parallelism.from_first_process(_is_done(directory, number, size)):
          draw(sampler, state, number, size, directory, bar)
        bar.update((number + 1) * draw.calls - bar.n)
    if jax.process_index() == 0:
      reporting.write_comparison(directory, len(sizes), settings.num_samples)
    logging.info('%d samples: %s', settings.num_samples, directory)


def round_sizes(count: int, batch_size: int) -> list[int]:
  """How many samples each round keeps: whole batches, and what is left in the last."""
  return [min(batch_size, count - start) for start in range(0, count, batch_size)]


def _is_done(directory: pathlib.Path, number: int, size: int) -> bool:
  """Whether a round has been written, with at least `size` samples."""
  try:
    report = read_json(directory / f'report_{number}.json', '')
  except UserError:
    return False
  whole = zipfile.is_zipfile(directory / f'samples_{number}.npz')
  return whole and isinstance(report.get('samples'), int) and report['samples'] >= size


def _settings(
  config: ConfigDict, read: tuple[str, ...], draw: 'RoundSampler', state: State
) -> dict[str, Any]:
  """What the samples depend on, given the names of the settings that drawing them has read."""
  free = (*LOCATIONS, 'sampling.num_samples', 'sampling.trajectory_every', 'classifier.checkpoint')
  flat = configuration.flatten(config)
  names = (name for name in sorted({*read, *filter(of_model, flat)}) if name not in free)
  settings = {name: flat.get(name) for name in names}
  settings['checkpoint'] = weights_checksum(state)
  if 'classifier.checkpoint' in read:
    content = pathlib.Path(config.classifier.checkpoint).expanduser().read_bytes()
    settings['classifier'] = hashlib.sha256(content).hexdigest()[:16]
  if fingerprint := getattr(draw.source, 'fingerprint', None):
    settings['data.fingerprint'] = fingerprint
  return settings


def _record_settings(directory: pathlib.Path, settings: dict[str, Any]) -> None:
  """Writes `settings.json`.

  Raises:
    UserError: if the directory holds samples of other settings.
  """
  path = directory / 'settings.json'
  if path.exists():
    old = read_json(path, f'remove {directory}, or set another --config.seed')
    if differing := differences(old, settings):
      raise UserError(
        f'{directory} holds samples of other settings: {differing}; set another --config.seed, or '
        f'remove it.'
      )
  elif jax.process_index() == 0:
    reporting.write_atomic(path, json.dumps(settings, indent=2).encode())


def weights_checksum(state: State) -> str:
  """Tells the weights that samples are drawn with from others of the same step."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves((state.params_ema, state.model_state)):
    digest.update(np.ascontiguousarray(leaf))
  return digest.hexdigest()[:16]


class RoundSampler:
  """Draws one batch under the configured task and writes it.

  Args:
    config: reads `sampling`, `data` and `seed`.
    sde: the forward SDE.

  Raises:
    UserError: for settings that do not go together, before anything is compiled.
  """

  def __init__(self, config: ConfigDict, sde: SDE):
    settings, data = config.sampling, config.data
    datasets.check_batch_size(settings.batch_size, 'sampling.batch_size')
    if settings.num_samples < 1:
      raise UserError(f'sampling.num_samples={settings.num_samples} must be at least 1.')
    self.shape = (settings.batch_size, data.image_size, data.image_size, data.num_channels)
    self.inverse_scaler = datasets.get_data_inverse_scaler(config)
    self._scaler = datasets.get_data_scaler(config)
    self._config, self._settings = config, settings
    self._root = stream(config.seed, 'sample_mode')
    self._task = controllable_generation.get_task(config, sde, self.inverse_scaler)
    zeros = jax.numpy.zeros((2, *self.shape[1:])), jax.numpy.zeros(2, int)
    sampling.check(config, sde, self._task.condition(*zeros))
    method = sampling.get_sampler(config, sde)
    sampling.batch_rng(config, self._root, 0, size=1)
    self.calls = method.n_steps * method.nfe_per_step
    self.source = datasets.get_source(config, 'test') if self._task.uses_images else None

  def __call__(
    self,
    sampler: sampling.SamplingFn,
    state: State,
    number: int,
    size: int,
    directory: pathlib.Path,
    bar: tqdm.tqdm,
  ) -> None:
    """Draws round `number` and writes its first `size` samples."""
    index = number * self.shape[0] + np.arange(self.shape[0])
    originals, labels = self._examples(index)
    images = self._scaler(originals / np.float32(255))
    condition = self._task.condition(jax.numpy.asarray(images), jax.numpy.asarray(labels))
    rng = sampling.batch_rng(self._config, self._root, number, size=self.shape[0])
    every = self._settings.trajectory_every if number == 0 else 0
    callback = reporting.SamplingProgress(bar, self.calls, every)
    start = time.perf_counter()
    samples, nfe = sampler(
      rng, state, condition=parallelism.replicate(condition), callback=callback
    )
    samples = parallelism.to_host(samples)
    reporting.check_finite(samples, 'samples', int(state.step))
    samples = reporting.to_uint8(samples)[:size]
    seconds = time.perf_counter() - start
    if jax.process_index() != 0:
      return
    arrays = {'samples': samples, 'labels': labels[:size]}
    if self.source is not None:
      given = self.inverse_scaler(self._task.observed(condition, images))
      arrays |= {'given': reporting.to_uint8(given)[:size], 'originals': originals[:size]}
    reporting.write_npz(directory / f'samples_{number}.npz', **arrays)
    if callback.frames:
      reporting.write_trajectory(directory, callback.frames)
    report = {
      'task': self._settings.task,
      'method': self._settings.method,
      'step': int(state.step),
      'seed': self._config.seed,
      'round': number,
      'samples': len(samples),
      'nfe': nfe,
      'seconds': round(seconds, 3),
      'labels': labels[:size].tolist(),
    }
    text = json.dumps(report, indent=2).encode()
    reporting.write_atomic(directory / f'report_{number}.json', text)

  def _examples(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images of the test split in an order that the seed draws, and labels."""
    if self.source is None:
      return np.zeros(self.shape, np.uint8), self._task.labels(index)
    order = np.random.RandomState(self._config.seed).permutation(len(self.source))
    examples = [self.source[order[i % len(order)]] for i in index]
    return np.stack([e['image'] for e in examples]), np.stack([e['label'] for e in examples])
