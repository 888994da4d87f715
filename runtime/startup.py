"""Settings that must be made before JAX starts; main.py and the benchmarks share them."""

import os
import pathlib
import platform
import sys

from absl import logging
from ml_collections import ConfigDict

from runtime.errors import UserError


def restart_with_settings() -> None:
  """Restarts this program with two settings that a process reads only when it starts, if absent.

  Huge memory pages, where the C library has them: on CPU, XLA allocates and frees the memory of all
  activations in each call, which costs a fifth of a training step with pages of 4 KiB.
  Paths in UTF-8, whatever the locale: Orbax and TensorStore write no others.
  """
  settings = {}
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    settings['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
  if sys.getfilesystemencoding() != 'utf-8':
    settings['PYTHONUTF8'] = '1'
  if settings:
    os.environ.update(settings)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def user_cache() -> pathlib.Path:
  """The folder of what this program keeps for later runs of the user."""
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  return cache / 'score_sde'


def keep_compiled_programs() -> None:
  """Keeps compiled programs for later runs on this machine, unless the user chose a directory."""
  directory = user_cache() / f'xla-{platform.node()}'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(directory))


def start_jax(
  config: ConfigDict,
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Sets the number of CPU devices, and joins the other processes of the run.

  Args:
    config: the configuration, whose batch sizes the devices must share evenly.
    coordinator: host:port of the first process; None for a run of one process.
    num_processes: the number of processes; None asks the cluster.
    process_id: the number of this process, from 0; None asks the cluster.

  Raises:
    UserError: if the processes cannot be joined.
  """
  import jax

  if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    try:
      jax.config.update('jax_num_cpu_devices', 1 if coordinator else _cpu_devices(config))
    except RuntimeError:
      logging.warning(
        'The configuration file runs JAX while it is loaded, which fixes the number of CPU '
        'devices at one: move that into a function to train on all cores.'
      )
  if coordinator is None:
    return
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except (ValueError, RuntimeError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(
      f'--coordinator={coordinator}, --num_processes={num_processes}, --process_id={process_id} do '
      f'not start a run of several processes ({reason}): give all three, with the same host:port '
      f'in all processes and process_id from 0.'
    ) from error


def _cpu_devices(config: ConfigDict) -> int:
  """The number of CPU devices: one for each core, up to four, that share all batches evenly.

  XLA runs many convolutions on one core only, so that two devices of one core each train up to
  twice as fast as one device of two cores. Every device holds a copy of the training state, hence
  the limit.
  """
  sections = ('training', 'eval', 'classifier', 'sampling')
  sizes = [config.get(section, {}).get('batch_size', 1) for section in sections]
  if not all(isinstance(size, int) for size in sizes):
    return 1  # the configuration is refused later, with a sentence
  most = min(available_cores(), 4)
  return max(n for n in range(1, most + 1) if not any(size % n for size in sizes))


def available_cores() -> int:
  """The number of processor cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
