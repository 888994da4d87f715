"""Network calls per second inside a sampler against bare network calls.

  python -m benchmarks.sampler_overhead --config=configs/vp/mnist_ddpmpp_continuous.py

Runs Euler-Maruyama, one call in each step, and the bare compiled network in turn, and prints the
median times of a call and their ratio as one JSON line. Start it as main.py starts itself, with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 and one device for each core.
"""

import json
import statistics
import time

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

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file.')
_CALLS = flags.DEFINE_integer('calls', 20, 'Network calls in a run.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Runs of each, in turn.')


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  startup.start_jax(_CONFIG.value)
  config = prepare(_CONFIG.value)
  euler = {'method': 'pc', 'predictor': 'euler_maruyama', 'corrector': 'none'}
  config.sampling.update({**euler, 'n_steps': _CALLS.value})
  sde = sde_lib.get_sde(config)
  data = config.data
  shape = (config.training.batch_size, data.image_size, data.image_size, data.num_channels)
  model, state = train_state.init_state(jax.random.PRNGKey(0), config)
  state = parallelism.replicate(state)
  inverse_scaler = datasets.get_data_inverse_scaler(config)
  sampler = sampling.get_sampling_fn(config, sde, model, shape, inverse_scaler)

  @jax.jit
  def network(params, x, labels):
    return mutils.get_model_fn(model, params, state.model_state)(x, labels)[0]

  x = jax.device_put(jnp.ones(shape), parallelism.batch_sharding())
  labels = jax.device_put(jnp.ones(shape[0]), parallelism.batch_sharding())

  def bare():
    for _ in range(_CALLS.value):
      jax.block_until_ready(network(state.params_ema, x, labels))

  def inside():
    jax.block_until_ready(sampler(jax.random.PRNGKey(0), state)[0])

  times = {bare: [], inside: []}
  for repeat in range(_REPEATS.value + 1):
    for function, seconds in times.items():
      start = time.perf_counter()
      function()
      if repeat:  # the first compiles
        seconds.append((time.perf_counter() - start) / _CALLS.value)
  call, in_sampler = (statistics.median(seconds) for seconds in times.values())
  print(
    json.dumps(
      {
        'devices': jax.device_count(),
        'batch': shape[0],
        'network call [s]': round(call, 5),
        'call inside the sampler [s]': round(in_sampler, 5),
        'overhead': round(in_sampler / call - 1, 4),
      }
    )
  )


if __name__ == '__main__':
  startup.restart_with_settings()
  startup.keep_compiled_programs()
  flags.mark_flags_as_required(['config'])
  app.run(main)
