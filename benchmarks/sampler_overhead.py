"""The time of a function evaluation of the network inside a sampler, against the bare network.

  python -m benchmarks.sampler_overhead --config=configs/vp/mnist_ddpmpp_continuous.py

It runs Euler-Maruyama, with one evaluation in each step, and the bare compiled network in turn, and
prints the median times of an evaluation and their ratio as one JSON line. It uses the same process
settings as main.py: huge memory pages and one device for each core.
"""

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import config_flags

import datasets
import sampling
import sde_lib
import train_state
from models import utils as mutils
from modes.preparation import prepare
from runtime import parallelism, startup
from runtime.array_types import Images, PerExample

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file.')
_NFE = flags.DEFINE_integer('calls', 20, 'Function evaluations of the network in a run.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Runs of each of the two, in turn.')

PyTree = Any


def main(argv: list[str]) -> None:
  """Prints the report."""
  del argv
  logging.set_verbosity(logging.WARNING)
  startup.start_jax(_CONFIG.value)
  config = prepare(_CONFIG.value)
  euler = {'method': 'pc', 'predictor': 'euler_maruyama', 'corrector': 'none'}
  config.sampling.update({**euler, 'n_steps': _NFE.value})
  sde = sde_lib.get_sde(config)
  data = config.data
  shape = (config.training.batch_size, data.image_size, data.image_size, data.num_channels)
  model, state = train_state.init_state(jax.random.PRNGKey(0), config)
  state = parallelism.replicate(state)
  inverse_scaler = datasets.get_data_inverse_scaler(config)
  sampler = sampling.get_sampling_fn(config, sde, model, shape, inverse_scaler)

  @jax.jit
  def network(params: PyTree, x: Images, labels: PerExample) -> Images:
    return mutils.get_model_fn(model, params, state.model_state)(x, labels)[0]

  x = jax.device_put(jnp.ones(shape), parallelism.batch_sharding())
  labels = jax.device_put(jnp.ones(shape[0]), parallelism.batch_sharding())

  def bare() -> None:
    for _ in range(_NFE.value):
      jax.block_until_ready(network(state.params_ema, x, labels))

  def inside() -> None:
    jax.block_until_ready(sampler(jax.random.PRNGKey(0), state)[0])

  times = {bare: [], inside: []}
  for repeat in range(_REPEATS.value + 1):
    for function, seconds in times.items():
      start = time.perf_counter()
      function()
      if repeat:  # the first compiles
        seconds.append((time.perf_counter() - start) / _NFE.value)
  alone, in_sampler = (statistics.median(seconds) for seconds in times.values())
  print(
    json.dumps(
      {
        'devices': jax.device_count(),
        'batch': shape[0],
        'network alone [s]': round(alone, 5),
        'inside the sampler [s]': round(in_sampler, 5),
        'overhead': round(in_sampler / alone - 1, 4),
      }
    )
  )


if __name__ == '__main__':
  startup.restart_with_settings()
  startup.keep_compiled_programs()
  flags.mark_flags_as_required(['config'])
  app.run(main)
