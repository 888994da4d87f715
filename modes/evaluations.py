"""The evaluations of a checkpoint under `--mode=eval`: loss, bits/dim, sample quality.

An evaluation is a registered class, which `eval.enable_<name>` turns on:

    @register_evaluation(name='mine')
    class Mine(Evaluation): ...
"""

import abc
import itertools
import pathlib
from collections.abc import Iterator
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
from runtime import configuration, parallelism, progress, reporting
from runtime.array_types import Array, GreyLevels, RandomKey, Scalar
from runtime.errors import UserError
from runtime.npz_file import is_whole
from runtime.registry import Registry
from runtime.rng import stream
from runtime.settings import read_keys
from runtime.workdir import STORAGE
from sde_lib import SDE
from train_state import State

EVALUATIONS = Registry('evaluation')
register_evaluation = EVALUATIONS.register

# The settings that the numbers of all evaluations depend on, by the beginnings of their names.
_COMMON = ('seed', 'data.', 'model.', 'training.sde', 'training.continuous', 'eval.batch_size')


class Evaluation(abc.ABC):
  """Computes one kind of numbers of a checkpoint, and keeps its results in files.

  The constructor raises `UserError` for settings that cannot be evaluated, before any computation.

  Attributes:
    name: the registered name, which `meta.json` records.
    depends_on: beginnings of the names of the settings that its numbers depend on.
    source: the images that its numbers are about; None if it needs none.

  Args:
    config: the configuration, from `preparation.prepare`.
    folder: where the files go.
    sde: the forward SDE.
    model: the score network.
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
    """The settings that the numbers depend on, by name; results of other settings are refused."""
    flat = configuration.flatten(self.config)
    names = (name for name in sorted(flat) if name.startswith(_COMMON + self.depends_on))
    settings = {name: flat[name] for name in names if name not in STORAGE}
    fingerprint = getattr(self.source, 'fingerprint', None)
    return settings | ({'data.fingerprint': fingerprint} if fingerprint else {})

  @abc.abstractmethod
  def is_done(self, number: int) -> bool:
    """Whether the files of checkpoint `number` exist and are intact."""

  @abc.abstractmethod
  def run(self, number: int, state: State) -> None:
    """Computes the missing files of checkpoint `number`; all processes call this.

    Args:
      number: the number of the checkpoint.
      state: its state, with EMA parameters but neither other parameters nor optimizer state.
    """

  @abc.abstractmethod
  def numbers(self, number: int) -> dict[str, Any]:
    """Reads the numbers of checkpoint `number` from the files, by their names in the report."""

  def write(self, path: pathlib.Path, **arrays: reporting.Storable) -> None:
    """Writes an .npz file of results, complete or not at all, in the first process."""
    if jax.process_index() == 0:
      if path.exists():
        logging.warning('%s was damaged; its results have been computed again.', path)
      reporting.write_npz(path, **arrays)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def _missing(paths: list[pathlib.Path], name: str) -> list[int]:
  """The indices of the files without an intact array `name`, for the first process."""
  first = jax.process_index() == 0
  found = (parallelism.from_first_process(first and is_whole(path, name)) for path in paths)
  return [i for i, whole in enumerate(found) if not whole]


@register_evaluation(name='loss')
class Loss(Evaluation):
  """The training objective (Eq. 7, or SMLD's or DDPM's) over the test split, each example once.

  Its number is `loss`, the mean over the examples, weighted by the size of the batches.
  """

  name = 'loss'
  depends_on = ('training.reduce_mean', 'training.likelihood_weighting')

  def __init__(self, config: ConfigDict, folder: pathlib.Path, sde: SDE, model: nn.Module):
    super().__init__(config, folder, sde, model)
    dequantization = config.data.uniform_dequantization
    _, self._dataset, _ = datasets.get_dataset(config, dequantization, evaluation=True)
    self.source = self._dataset.source
    step_fn = losses.build_step_fn(config, sde, model, train=False)
    preprocess = self._dataset.preprocess

    @jax.jit
    def batch_loss(rng: RandomKey, state: State, batch: dict[str, Array]) -> Scalar:
      data_rng, step_rng = jax.random.split(rng)
      images = preprocess(data_rng, batch['image'])
      return step_fn((step_rng, state), {'image': images, 'weight': batch['weight']})[1]

    self._batch_loss = batch_loss

  def _path(self, number: int) -> pathlib.Path:
    return self.folder / f'ckpt_{number}_loss.npz'

  def is_done(self, number: int) -> bool:
    """See `Evaluation.is_done`."""
    return is_whole(self._path(number), 'mean_loss')

  def run(self, number: int, state: State) -> None:
    """Writes `ckpt_<number>_loss.npz`.

    Raises:
      FloatingPointError: if a loss is NaN or infinite.
    """
    root = jax.random.fold_in(stream(self.config.seed, 'eval'), state.step)
    dataset, values, counts = self._dataset, [], []
    scale = dataset.batch_size
    batches = progress.bar(dataset.once(), 'loss', len(dataset), unit='images', scale=scale)
    for i, batch in enumerate(batches):
      batch = parallelism.global_batch({key: batch[key] for key in ('image', 'weight')})
      values.append(float(self._batch_loss(jax.random.fold_in(root, i), state, batch)))
      counts.append(dataset.count(i))
    reporting.check_finite(np.asarray(values), 'losses', int(state.step))
    mean = np.average(np.float64(values), weights=counts)
    self.write(self._path(number), all_losses=np.float64(values), mean_loss=mean)

  def numbers(self, number: int) -> dict[str, Any]:
    """The mean loss."""
    return {'loss': float(_read(self._path(number))['mean_loss'])}


@register_evaluation(name='bpd')
class BitsPerDim(Evaluation):
  """Bits/dim of `eval.bpd_dataset`, each image `eval.bpd_repeats` times with other noise.

  Its number is `bpd_<split>`, the mean over images and repeats. A round is one batch of one repeat.
  """

  name = 'bpd'
  depends_on = ('likelihood.', 'eval.bpd')

  def __init__(self, config: ConfigDict, folder: pathlib.Path, sde: SDE, model: nn.Module):
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
    self._likelihood_fn = likelihood.from_config(config, sde, model, inverse_scaler=inverse_scaler)

  def _files(self, number: int) -> list[pathlib.Path]:
    rounds = self._repeats * len(self._dataset)
    return [self.folder / f'{self._split}_ckpt_{number}_bpd_{r}.npz' for r in range(rounds)]

  def is_done(self, number: int) -> bool:
    """See `Evaluation.is_done`."""
    return all(is_whole(path, 'bpd') for path in self._files(number))

  def run(self, number: int, state: State) -> None:
    """Writes the missing files `<split>_ckpt_<number>_bpd_<R>.npz`: `bpd` (images,) and `nfe`.

    Raises:
      FloatingPointError: if a likelihood is NaN or infinite.
    """
    root = jax.random.fold_in(stream(self.config.seed, 'bpd'), state.step)
    files, batches = self._files(number), len(self._dataset)
    missing = _missing(files, 'bpd')
    rounds = progress.bar(
      self._images(missing),
      f'bits/dim of checkpoint {number}',
      len(files),
      unit='images',
      initial=len(files) - len(missing),
      scale=self._dataset.batch_size,
    )
    for r, images in rounds:
      rng = jax.random.fold_in(root, r)
      bpd, _, nfe = self._likelihood_fn(rng, state, parallelism.global_batch(images))
      bpd = parallelism.to_host(bpd)[: self._dataset.count(r % batches)]
      reporting.check_finite(bpd, 'bits/dim', int(state.step))
      self.write(files[r], bpd=bpd, nfe=nfe)

  def _images(self, rounds: list[int]) -> Iterator[tuple[int, GreyLevels]]:
    """The increasing `rounds`, each with this process's part of its images."""
    for repeat, group in itertools.groupby(rounds, lambda r: r // len(self._dataset)):
      wanted = list(group)
      batches = self._dataset.once(wanted[0] - repeat * len(self._dataset))
      for r, batch in zip(range(wanted[0], wanted[-1] + 1), batches, strict=False):
        if r in wanted:
          yield r, batch['image']

  def numbers(self, number: int) -> dict[str, Any]:
    """The mean of bits/dim; with `bpd_warnings` if it is below zero, which cannot be."""
    images = np.concatenate([_read(path)['bpd'] for path in self._files(number)])
    bpd = float(np.mean(images, dtype=np.float64))
    numbers = {f'bpd_{self._split}': bpd}
    warning = likelihood.doubt(bpd)
    if not warning:
      return numbers
    logging.warning('%s', warning)
    return numbers | {'bpd_warnings': [warning]}


@register_evaluation(name='sampling')
class Samples(Evaluation):
  """Draws `eval.num_samples` samples and compares their features with those of the data.

  Its numbers are FID, KID, Inception score, precision and recall, as `evaluation.sample_metrics`
  names them. A round is one batch of samples.
  """

  name = 'sampling'
  depends_on = ('eval.num_samples', 'eval.extractor')

  def __init__(self, config: ConfigDict, folder: pathlib.Path, sde: SDE, model: nn.Module):
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
    sampler = sampling.get_sampler(config, sde)
    self._nfe = sampler.n_steps * sampler.nfe_per_step  # an estimate where the steps adapt

  def settings(self) -> dict[str, Any]:
    """As `Evaluation.settings`, with the settings that the sampler reads."""
    flat = configuration.flatten(self.config)
    keys = read_keys(self._reads, self.config)
    settings = super().settings() | {key: flat.get(key) for key in keys}
    if self._stats is None:
      return settings
    return settings | {'eval.stats_path': self._stats.checksum()}

  def _reads(self, config: ConfigDict) -> None:
    """Reads the settings that samples depend on."""
    sampling.check(config, self.sde)
    sampling.batch_rng(config, jax.random.PRNGKey(0), 0, size=1)

  def _files(self, number: int, kind: str) -> list[pathlib.Path]:
    rounds = -(-self._count // self._size)
    return [self.folder / f'ckpt_{number}_host_0' / f'{kind}_{r}.npz' for r in range(rounds)]

  def _report(self, number: int) -> pathlib.Path:
    return self.folder / f'report_{number}.npz'

  def is_done(self, number: int) -> bool:
    """See `Evaluation.is_done`."""
    if self._extractor is not None:
      return is_whole(self._report(number), 'warnings')
    return all(is_whole(path, 'samples') for path in self._files(number, 'samples'))

  def run(self, number: int, state: State) -> None:
    """Writes the missing files `samples_<R>.npz` and `statistics_<R>.npz`, and the report of all.

    Raises:
      FloatingPointError: if a sample has a value that is NaN or infinite.
    """
    root = jax.random.fold_in(stream(self.config.seed, 'sample'), state.step)
    drawn, described = self._files(number, 'samples'), self._files(number, 'statistics')
    last = (drawn, 'samples') if self._extractor is None else (described, 'logits')
    missing = _missing(*last)
    with progress.bar(
      what=f'samples of checkpoint {number}',
      total=len(drawn) * self._nfe,
      initial=(len(drawn) - len(missing)) * self._nfe,
      unit='NFE',
    ) as bar:
      for r in missing:
        start = bar.n
        if _missing([drawn[r]], 'samples'):
          rng = sampling.batch_rng(self.config, root, r, size=self._size)
          samples = self._draw(rng, state, bar)[: self._count - r * self._size]
          self.write(drawn[r], samples=samples)
        else:  # killed between the two files
          samples = _read(drawn[r])['samples']
        if self._extractor is not None:
          self.write(described[r], **self._extractor(samples))
        bar.update(start + self._nfe - bar.n)
    if self._extractor is not None and jax.process_index() == 0:
      self._compare(number, described)

  def _draw(self, rng: RandomKey, state: State, bar: tqdm.tqdm) -> GreyLevels:
    callback = reporting.SamplingProgress(bar, self._nfe)
    samples = parallelism.to_host(self._sampling_fn(rng, state, callback=callback)[0])
    reporting.check_finite(samples, 'samples', int(state.step))
    return reporting.to_uint8(samples)

  def _compare(self, number: int, described: list[pathlib.Path]) -> None:
    parts = [_read(path) for path in described]
    pool_3, logits = (np.concatenate([part[key] for part in parts]) for key in ('pool_3', 'logits'))
    del parts
    name = self._extractor.name
    numbers, warnings = evaluation.sample_metrics(name, self._stats, pool_3=pool_3, logits=logits)
    self.write(self._report(number), **numbers, warnings=np.asarray(warnings, np.str_))

  def numbers(self, number: int) -> dict[str, Any]:
    """The metrics, the name of the reference data and their split-half baseline, and warnings."""
    if self._extractor is None:
      return {}
    content = _read(self._report(number))
    warnings = content.pop('warnings').tolist()
    for warning in warnings:
      logging.warning('%s', warning)
    numbers = {key: value.item() for key, value in content.items()}
    of = {'reference': self._stats.name, 'floor': self._stats.split_half, 'warnings': warnings}
    return numbers | {key: value for key, value in of.items() if value}
