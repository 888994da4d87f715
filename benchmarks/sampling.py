"""Quality against network calls, for the sampling methods on a trained run.

  python -m benchmarks.sampling --config=configs/vp/mnist_ddpmpp_continuous.py --workdir=runs/demo

For each method it draws `--count` images and prints the Frechet distance to the training images in
the space of their leading principal components (of pixels in [0, 1]), and the seconds it took. The
distance of the test images is the floor. `--plot=FILE` draws the table.
"""

import json
import pathlib
import time

import jax
import numpy as np
import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

import configuration
import datasets
import parallelism
import reporting
import sampling
import sampling_run
import sde_lib

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'A run with a checkpoint.')
_COUNT = flags.DEFINE_integer('count', 1000, 'Images for each method.')
_BATCH = flags.DEFINE_integer('batch', 100, 'Images in a batch.')
_METHODS = flags.DEFINE_list('methods', None, 'Names of rows to run; all by default.')
_PLOT = flags.DEFINE_string('plot', None, 'File for a plot of the table.')
_OUT = flags.DEFINE_string('out', None, 'JSON lines are added here, and read for the plot.')

COMPONENTS = 64

PC = {'method': 'pc', 'predictor': 'reverse_diffusion', 'corrector': 'langevin'}
ROWS = {
  'PC': [PC | {'n_steps': n} for n in (1000, 100, 25)],
  'Euler-Maruyama': [{'method': 'pc', 'n_steps': n, 'corrector': 'none'} for n in (1000, 250, 50)],
  'ODE (RK45)': [{'method': 'ode', 'rtol': tol, 'atol': tol} for tol in (1e-3, 1e-5)],
}
for name, method, options, times in (
  ('DDIM', 'ddim', {}, (10, 20, 50)),
  ('DDIM eta=1', 'ddim', {'eta': 1.0}, (10, 20, 50)),
  ('Heun', 'heun', {}, (6, 11, 25)),
  ('Heun churn', 'heun', {'churn': 10.0}, (6, 11, 25)),
  ('DPM-Solver++(2M)', 'dpm_solver++', {}, (10, 20, 50)),
  ('DPM-Solver++(2M) eta=1', 'dpm_solver++', {'eta': 1.0}, (10, 20, 50)),
):
  ROWS[name] = [{'method': method, 'n_steps': n, **options} for n in times]


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
  """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of vectors, (n, d)."""
  (m1, c1), (m2, c2) = ((v.mean(0), np.cov(v, rowvar=False)) for v in (x, y))
  values, vectors = np.linalg.eigh(c1)
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c2 @ root), 0)).sum()
  return float(np.sum((m1 - m2) ** 2) + np.trace(c1) + np.trace(c2) - 2 * cross)


class Projection:
  """Leading principal components of a set of images."""

  def __init__(self, images: np.ndarray):
    x = self._flat(images)
    self.mean = x.mean(0)
    self.components = np.linalg.svd(x - self.mean, full_matrices=False)[2][:COMPONENTS]

  def _flat(self, images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0

  def __call__(self, images: np.ndarray) -> np.ndarray:
    return (self._flat(images) - self.mean) @ self.components.T


def images_of(config, split: str) -> np.ndarray:
  source = datasets.get_source(config, split)
  return np.stack([source[i]['image'] for i in range(len(source))])


def measure(config, sde, model, state, projection, reference) -> dict:
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
  distance = frechet_distance(projection(images), reference)
  return {'nfe': nfe, 'distance': round(distance, 3), 'seconds/image': round(seconds, 4)}


def plot(rows: list[dict], path: str) -> None:
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.5))
  for name in dict.fromkeys(row['name'] for row in rows):
    points = sorted((r['nfe'], r['distance']) for r in rows if r['name'] == name and 'nfe' in r)
    if points:
      axes.plot(*zip(*points, strict=True), 'o-', label=name, markersize=4)
  for row in rows:
    if 'nfe' not in row:
      axes.axhline(row['distance'], color='gray', linestyle=':', label=row['name'])
  axes.set(xscale='log', yscale='log', xlabel='network calls', ylabel='Frechet distance')
  axes.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  base = configuration.prepare(_CONFIG.value)
  sde = sde_lib.get_sde(base)
  model, state = sampling_run.trained_state(base, pathlib.Path(_WORKDIR.value), None)
  train, test = images_of(base, 'train'), images_of(base, 'test')
  projection = Projection(train)
  reference = projection(train)
  rows = []

  def add(row):
    rows.append(row)
    print(json.dumps(row), flush=True)
    if _OUT.value:
      with open(_OUT.value, 'a') as file:
        file.write(json.dumps(row) + '\n')

  add({'name': 'test images', 'distance': round(frechet_distance(projection(test), reference), 3)})
  for name in _METHODS.value or ROWS:
    for settings in ROWS[name]:
      config = base.copy_and_resolve_references()
      config.sampling.update(settings)
      config = configuration.prepare(config)
      result = measure(config, sde, model, state, projection, reference)
      add({'name': name, **settings, **result})
  if _PLOT.value:
    plot(rows, _PLOT.value)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
