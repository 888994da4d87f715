"""Throughput of the FID Inception network, and what the metrics of 50,000 features cost.

  python -m benchmarks.inception             # images per second and share of the matrix product
  python -m benchmarks.inception --features  # time and memory of statistics and metrics

Either prints one JSON line. The weights are random, because the speed does not depend on them. The
first times resizing, the network and the copies to and from the device, for 32x32 images, and
counts the operations of the compiled program as XLA does. The second reports the peak memory of the
whole process as Linux counts it.
"""

import json
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

import evaluation
import metrics
from benchmarks.machine import gemm_peak, peak_memory
from models import inception

_FEATURES = flags.DEFINE_bool('features', False, 'Time the metrics instead of the network.')
_COUNT = flags.DEFINE_integer('count', 50_000, 'How many features.')
_BATCHES = flags.DEFINE_integer('batches', 5, 'Batches to time, after one that is not.')

PyTree = Any


def random_params(seed: int = 0) -> PyTree:
  """Random weights of the Inception network under which activations keep their size."""
  rng = np.random.RandomState(seed)

  def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = max(1, int(np.prod(leaf.shape[:-1])))
    return (rng.randn(*leaf.shape) * (2 / fan_in) ** 0.5 * (leaf.ndim > 1)).astype(np.float32)

  return jax.tree.map(draw, inception.abstract_params())


def time_network() -> dict[str, object]:
  """Measures the throughput of the network and returns the entries of the report."""
  extractor = evaluation.inception_extractor(random_params(), 'tfgan', 'random')
  size = extractor.global_batch_size()
  images = np.random.RandomState(0).randint(0, 256, (size, 32, 32, 3)).astype(np.uint8)
  lowered = jax.jit(extractor.forward).lower(extractor.params, images)
  flop = lowered.cost_analysis()['flops']
  start = time.perf_counter()
  extractor(images)
  compile_seconds = time.perf_counter() - start
  times, peaks = [], []
  for _ in range(_BATCHES.value):
    start = time.perf_counter()
    extractor(images)
    times.append(time.perf_counter() - start)
    peaks.append(gemm_peak())
  seconds, peak = statistics.median(times), statistics.median(peaks)
  return {
    'batch_size': size,
    'devices': jax.device_count(),
    'GFLOP_per_image': round(flop / size / 1e9, 2),
    'compile_and_first_batch_seconds': round(compile_seconds, 1),
    'images_per_second': round(size / seconds, 2),
    'GFLOP_per_second': round(flop / seconds / 1e9, 1),
    'gemm_peak_GFLOP_per_second': round(peak / 1e9, 1),
    'share_of_gemm_peak': round(flop / seconds / peak, 3),
    'minutes_for_50k': round(50_000 * seconds / size / 60, 1),
    'device': jax.devices()[0].device_kind,
  }


def time_metrics() -> dict[str, object]:
  """Measures the time and memory of statistics and metrics; returns the entries of the report."""
  rng = np.random.default_rng(0)
  shape = (_COUNT.value, inception.NUM_FEATURES)
  real, fake = (rng.standard_normal(shape, np.float32) for _ in range(2))
  fake += 0.05
  seconds, numbers = {}, {}
  start = time.perf_counter()
  of_real = metrics.moments(real)
  stats = evaluation.DatasetStats(
    of_real.mean, of_real.covariance(), len(real), real, {}, {}, 'random'
  )
  seconds['statistics'] = time.perf_counter() - start
  start = time.perf_counter()
  logits = rng.standard_normal((len(fake), inception.NUM_CLASSES), np.float32)
  numbers, _ = evaluation.sample_metrics('random', stats, pool_3=fake, logits=logits)
  seconds['metrics'] = time.perf_counter() - start
  return {
    'features': _COUNT.value,
    **{f'{name}_seconds': round(value, 1) for name, value in seconds.items()},
    'peak_memory_GiB': round(peak_memory() / 2**20, 2),
    **{name: round(value, 4) for name, value in numbers.items()},
  }


def main(argv: list[str]) -> None:
  """Prints the report."""
  del argv
  print(json.dumps(time_metrics() if _FEATURES.value else time_network()))


if __name__ == '__main__':
  app.run(main)
