"""Sample quality against NFE (function evaluations of the network), for samplers of a trained run.

  python -m benchmarks.sampling --config=configs/vp/mnist_ddpmpp_continuous.py --workdir=runs/demo

For each sampler it draws `--count` images and prints their Frechet distance to the training images
in the features of `eval.extractor`, and the seconds per image. As many test images give the
baseline, because the distance grows as the images become fewer. `--plot=FILE` plots the results.
"""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tqdm
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import datasets
import evaluation
import metrics
import sampling
import sde_lib
from modes.loading import load_weights
from modes.preparation import prepare
from runtime import parallelism, reporting, startup
from runtime.array_types import GreyLevels
from train_state import State

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'A run with a checkpoint.')
_COUNT = flags.DEFINE_integer('count', 1000, 'Images for each sampler.')
_BATCH = flags.DEFINE_integer('batch', 100, 'Images in a batch.')
_METHODS = flags.DEFINE_list('methods', None, 'Names of rows to run; all by default.')
_PLOT = flags.DEFINE_string('plot', None, 'File for a plot of the results.')
_OUT = flags.DEFINE_string('out', None, 'File to which the results are appended as JSON lines.')

PC = {'method': 'pc', 'predictor': 'reverse_diffusion', 'corrector': 'langevin'}
EULER = {'method': 'pc', 'predictor': 'euler_maruyama', 'corrector': 'none'}
ROWS = {
  'PC': [PC | {'n_steps': n} for n in (25, 100, 1000)],
  'Euler-Maruyama': [EULER | {'n_steps': n} for n in (50, 250)],
  'ODE (RK45)': [{'method': 'ode', 'rtol': tol, 'atol': tol} for tol in (1e-3, 1e-5)],
}
for name, method, options, steps in (
  ('DDIM', 'ddim', {}, (10, 20, 50)),
  ('DDIM eta=1', 'ddim', {'eta': 1.0}, (10, 20, 50)),
  ('Heun', 'heun', {}, (6, 11, 25)),
  ('Heun churn', 'heun', {'churn': 10.0}, (6, 11, 25)),
  ('DPM-Solver++(2M)', 'dpm_solver++', {}, (10, 20, 50)),
  ('DPM-Solver++(2M) eta=1', 'dpm_solver++', {'eta': 1.0}, (10, 20, 50)),
):
  ROWS[name] = [{'method': method, 'n_steps': n, **options} for n in steps]


def images_of(config: ConfigDict, split: str) -> GreyLevels:
  """All images of a split as grey levels (N, H, W, C)."""
  source = datasets.get_source(config, split)
  return np.stack([source[i]['image'] for i in range(len(source))])


def measure(
  config: ConfigDict,
  sde: sde_lib.SDE,
  model: nn.Module,
  *,
  state: State,
  distance: Callable[[GreyLevels], float],
) -> dict[str, Any]:
  """Draws images with one sampler.

  Args:
    config: the configuration of the sampler.
    sde: the forward SDE.
    model: the score network.
    state: its state.
    distance: the Frechet distance of images (N, H, W, C) to the training images.

  Returns:
    NFE, distance and seconds per image.
  """
  data = config.data
  shape = (_BATCH.value, data.image_size, data.image_size, data.num_channels)
  inverse_scaler = datasets.get_data_inverse_scaler(config)
  sampler = sampling.get_sampling_fn(config, sde, model, shape, inverse_scaler)
  images, start = [], time.perf_counter()
  for i in tqdm.trange(-(-_COUNT.value // _BATCH.value), disable=None):
    samples, nfe = sampler(jax.random.PRNGKey(i), state)
    images.append(reporting.to_uint8(parallelism.to_host(samples)))
    start = time.perf_counter() if i == 0 else start  # the first compiles
  seconds = (time.perf_counter() - start) / max(1, len(images) - 1) / _BATCH.value
  images = np.concatenate(images)[: _COUNT.value]
  return {'nfe': nfe, 'distance': distance(images), 'seconds/image': round(seconds, 4)}


def plot(rows: list[dict[str, Any]], path: str) -> None:
  """Plots distance against NFE, with the rows that have no NFE as baselines."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.5))
  for name in dict.fromkeys(row['name'] for row in rows):
    points = sorted((r['nfe'], r['distance']) for r in rows if r['name'] == name and 'nfe' in r)
    if points:
      axes.plot(*zip(*points, strict=True), 'o-', label=name, markersize=4)
  for row in rows:
    if 'nfe' not in row:
      axes.axhline(row['distance'], color='gray', linestyle=':', label=row['name'])
  axes.set(xscale='log', yscale='log', xlabel='NFE', ylabel='Frechet distance')
  axes.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
  """Prints one JSON line for each sampler and number of steps."""
  del argv
  logging.set_verbosity(logging.WARNING)
  startup.start_jax(_CONFIG.value)
  base = prepare(_CONFIG.value)
  sde = sde_lib.get_sde(base)
  model, state = load_weights(base, pathlib.Path(_WORKDIR.value).expanduser())
  extractor = evaluation.get_extractor(base)

  def described(images: GreyLevels) -> tuple[np.ndarray, np.ndarray]:
    moments = metrics.moments(extractor(images)['pool_3'])
    return moments.mean, moments.covariance()

  reference = described(images_of(base, 'train'))
  distance = lambda images: round(metrics.frechet_distance(reference, described(images)), 3)
  rows = []

  def add(row: dict[str, Any]) -> None:
    rows.append(row)
    print(json.dumps(row), flush=True)
    if _OUT.value:
      with open(_OUT.value, 'a') as file:
        file.write(json.dumps(row) + '\n')

  test = np.random.RandomState(0).permutation(images_of(base, 'test'))[: _COUNT.value]
  add({'name': f'{len(test)} test images', 'distance': distance(test)})
  for name in _METHODS.value or ROWS:
    for settings in ROWS[name]:
      config = base.copy_and_resolve_references()
      config.sampling.update(settings)
      config = prepare(config)
      result = measure(config, sde, model, state=state, distance=distance)
      add({'name': name, **settings, **result})
  if _PLOT.value:
    plot(rows, _PLOT.value)


if __name__ == '__main__':
  startup.restart_with_settings()
  startup.keep_compiled_programs()
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
