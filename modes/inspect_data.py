"""`--mode=inspect_data`: what a network will see of the data, before any training."""

import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float
from ml_collections import ConfigDict

import datasets
from configs import recipes
from modes.stats import TrainingImages
from runtime import configuration, progress, reporting
from runtime.array_types import GreyLevels
from runtime.errors import UserError
from runtime.rng import stream
from runtime.workdir import log_start

SHOWN = 64  # images of a grid
_SECONDS = 2.0  # how long the speed of the input is measured
_RECIPES = {'VE': recipes.ve, 'VP': recipes.vp}


def inspect_data(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """See `run_lib.inspect_data`; `config` comes from `preparation.prepare`."""
  if jax.process_count() > 1:
    raise UserError(
      f'--mode=inspect_data runs in one process, not in {jax.process_count()}: leave --coordinator '
      f'out.'
    )
  folder = workdir / 'data'
  reporting.check_writable(folder, '--workdir')
  log_start(config)
  training, test, source = datasets.get_dataset(config, config.data.uniform_dequantization)
  report = {}
  for split, dataset in (('train', training), ('test', test)):
    report[split] = _describe(dataset, config)
    first = dataset.source
    images = [first[i]['image'] for i in range(min(len(first), _capacity(config)))]
    reporting.write_png(folder / f'{split}.png', reporting.image_grid(np.stack(images)))
  reporting.write_png(folder / 'augmented.png', reporting.image_grid(_augmented(training, config)))
  report['images_per_second'] = _speed(training)
  report['settings'] = {name: _lines(recipe, config) for name, recipe in _RECIPES.items()}
  if config.eval.sigma_max_images:
    images = TrainingImages(config, source).read()
    report['sigma_max'] = images.sigma_max()
    report['settings']['VE'].append(images.sigma_max_line(scaler=lambda x: x))  # of [0, 1]
  reporting.write_atomic(folder / 'report.json', json.dumps(report, indent=2).encode())
  _log(report, folder)
  return report


def _capacity(config: ConfigDict) -> int:
  data = config.data
  return min(SHOWN, reporting.grid_capacity((data.image_size, data.image_size, data.num_channels)))


def _describe(dataset: datasets.Dataset, config: ConfigDict) -> dict[str, Any]:
  """Numbers of one split, each image counted once; the moments are of the scaled images."""
  source, low, high = dataset.source, 255, 0
  sums = np.zeros((2, config.data.num_channels))
  labels: list[int] = []
  scaler = datasets.get_data_scaler(config)
  scale = dataset.batch_size
  for batch in progress.bar(dataset.once(), 'reading', len(dataset), unit='images', scale=scale):
    used = batch['weight'] > 0
    images = batch['image'][used]
    low, high = min(low, int(images.min())), max(high, int(images.max()))
    scaled = scaler(images / 255.0)
    sums += scaled.sum((0, 1, 2)), (scaled**2).sum((0, 1, 2))
    labels += batch['label'][used].tolist()
  mean, square = sums / (len(source) * config.data.image_size**2)
  return {
    'images': len(source),
    'skipped': getattr(source, 'num_skipped', 0),
    'cache': str(getattr(source, 'folder', '')),
    'grey levels': [low, high],
    'scaled range': [float(scaler(low / 255)), float(scaler(high / 255))],
    'mean': _rounded(mean),
    'standard deviation': _rounded(np.sqrt(np.maximum(square - mean**2, 0))),
    'classes': _histogram(labels, getattr(source, 'class_names', ())),
  }


def _rounded(values: Float[np.ndarray, ' C']) -> list[float]:
  return [round(float(value), 4) for value in values]


def _histogram(labels: list[int], names: tuple[str, ...]) -> dict[str, int]:
  """The number of images of each class, by its name, or its number if it has no name."""
  counts = np.bincount(np.asarray(labels), minlength=len(names))
  return {
    names[i] if i < len(names) else str(i): int(count)
    for i, count in enumerate(counts)
    if count or i < len(names)
  }


def _augmented(dataset: datasets.Dataset, config: ConfigDict) -> GreyLevels:
  """Images as the network is trained on them, flips, crops and noise included."""
  count, inverse = _capacity(config), datasets.get_data_inverse_scaler(config)
  steps = range(-(-count // dataset.batch_size))
  rng = stream(config.seed, 'train')
  batches = [
    dataset.preprocess(jax.random.fold_in(rng, step), dataset.batch(step)['image'])
    for step in steps
  ]
  return reporting.to_uint8(inverse(np.concatenate(batches)[:count]))


def _speed(dataset: datasets.Dataset) -> int:
  """How many images a second the input delivers, measured for some seconds."""
  batches: Iterator[datasets.Example] = dataset.iterate()
  next(batches)
  start, count = time.perf_counter(), 0
  while (seconds := time.perf_counter() - start) < _SECONDS:
    next(batches)
    count += dataset.batch_size
  return round(count / seconds)


def _lines(recipe: Callable[[ConfigDict], None], config: ConfigDict) -> list[str]:
  """The lines of a configuration that train on these data under the SDE of a recipe."""
  chosen = ConfigDict({name: {} for name in ('training', 'sampling', 'data', 'model')})
  recipe(chosen)
  data = config.data
  for name in ('dataset', 'path', 'image_size', 'num_channels', 'random_flip'):
    if data[name] != '':
      chosen.data[name] = data[name]
  return [f'config.{name} = {value!r}' for name, value in configuration.flatten(chosen).items()]


def _log(report: dict[str, Any], folder: pathlib.Path) -> None:
  for split in ('train', 'test'):
    logging.info(
      '%s: %s', split, ', '.join(f'{k}: {v}' for k, v in report[split].items() if v not in ('', {}))
    )
  logging.info('input: %d images/s', report['images_per_second'])
  for name, lines in report['settings'].items():
    logging.info('To train under the %s SDE, set\n  %s', name, '\n  '.join(lines))
  logging.info('Look at train.png, test.png and augmented.png in %s.', folder)
