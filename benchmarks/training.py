"""Training speed of a configuration: images per second, and share of the machine's peak speed.

  python -m benchmarks.training --config=configs/vp/mnist_ddpmpp_continuous.py
  python -m benchmarks.training --config=configs/ve/cifar10_ncsnpp_continuous.py \
      --config.training.batch_size=4 --config.data.dataset=random

It prints one JSON line. A step is that of `--mode=train`: preprocessing, loss, gradient, clipping,
Adam and EMA, on the devices and with the settings of main.py. Its floating point operations count
as three forward passes, and the peak speed is that of a matrix product. The data set `random` needs
no files.
"""

import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import datasets
import losses
import sde_lib
import train_state
from modes import train as train_mode
from modes.preparation import prepare
from runtime import parallelism, startup
from runtime.rng import stream

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file.')
_STEPS = flags.DEFINE_integer('steps', 5, 'Steps to time, after two that are not.')


@datasets.register_dataset(name='random')
def random_images(config: ConfigDict, split: str) -> datasets.ArraySource:
  """A data set of 64 images of noise."""
  del split
  data = config.data
  shape = (64, data.image_size, data.image_size, data.num_channels)
  images = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
  return datasets.ArraySource(images, np.zeros(64))


def seconds(function: Callable[[], object], repeats: int) -> list[float]:
  """The durations of `repeats` calls."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return times


def gemm_peak(size: int = 2048) -> float:
  """Floating point operations per second of the fastest of ten square matrix products."""
  a = jnp.ones((size, size))
  product = jax.jit(jnp.matmul)
  seconds(lambda: product(a, a), 2)
  return 2 * size**3 / min(seconds(lambda: product(a, a), 10))


def main(argv: list[str]) -> None:
  """Prints the report."""
  del argv
  startup.start_jax(_CONFIG.value)
  config = prepare(_CONFIG.value)
  batch_size = config.training.batch_size
  train_ds, _, _ = datasets.get_dataset(config)
  sde = sde_lib.get_sde(config)
  model, state = train_state.init_state(jax.random.PRNGKey(config.seed), config)
  forward = jax.jit(lambda p, x, t: model.apply({'params': p}, x, t, train=False))
  image = jnp.zeros((batch_size, *train_ds.source[0]['image'].shape))
  analysis = forward.lower(state.params, image, jnp.ones(batch_size)).cost_analysis()
  step_flop = 3 * analysis['flops']

  state = parallelism.replicate(state)  # as in training; else the second step compiles again
  train_step = train_mode.compile_train_step(
    losses.build_step_fn(config, sde, model, train=True),
    train_ds.preprocess,
    stream(config.seed, 'train'),
    table=train_ds.table('image'),
  )
  batches = train_ds.inputs(0, 'image')
  input_times, step_times, peaks = [], [], []
  for step in range(_STEPS.value + 2):
    start = time.perf_counter()
    batch = next(batches)
    input_times.append(time.perf_counter() - start)
    start = time.perf_counter()
    state, _ = train_step(state, [batch])
    jax.block_until_ready(state)
    step_times.append(time.perf_counter() - start)
    if step == 0:
      compile_seconds = step_times[0]
    peaks.append(gemm_peak())
  step_seconds = statistics.median(step_times[2:])
  peak = statistics.median(peaks)
  report = {
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    'batch_size': batch_size,
    'GFLOP_per_step': round(step_flop / 1e9, 1),
    'compile_and_first_step_seconds': round(compile_seconds, 1),
    'step_seconds_median': round(step_seconds, 3),
    'step_seconds_min': round(min(step_times[2:]), 3),
    'images_per_second': round(batch_size / step_seconds, 2),
    'GFLOP_per_second': round(step_flop / step_seconds / 1e9, 1),
    'gemm_peak_GFLOP_per_second': round(peak / 1e9, 1),
    'share_of_gemm_peak': round(step_flop / step_seconds / peak, 3),
    'input_share_of_step': round(statistics.median(input_times[2:]) / step_seconds, 5),
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
  }
  print(json.dumps(report))


if __name__ == '__main__':
  startup.restart_with_settings()
  startup.keep_compiled_programs()
  flags.mark_flag_as_required('config')
  app.run(main)
