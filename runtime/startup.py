"""What has to be set before JAX starts; main.py and the benchmarks share it."""

import os
import pathlib
import platform
import sys
from typing import Any

from absl import logging

from runtime.errors import UserError


def restart_with_settings() -> None:
  """Starts this program again with what is only read when a process starts, where that is missing.

  Huge memory pages, where the C library offers them: XLA takes and returns the memory of all
  activations in each call on CPU; with pages of 4 KiB that alone costs a fifth of a training step.
  Paths in UTF-8, whatever the locale: those that write checkpoints know no other.
  """
  settings = {}
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    settings['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
  if sys.getfilesystemencoding() != 'utf-8':
    settings['PYTHONUTF8'] = '1'
  if settings:
    os.environ.update(settings)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_compiled_programs() -> None:
  """Lets JAX reuse what it compiled in an earlier run on this machine, unless told where to."""
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  directory = cache / 'score_sde' / f'xla-{platform.node()}'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(directory))


def start_jax(
  config: Any,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Makes the devices of the CPU, and joins the other processes of the run.

  Args:
    config: its batch sizes have to be shared evenly.
    coordinator: host:port of the first process; None for a run of one process.
    num_processes: how many there are; None where the cluster tells.
    process_id: which one this is; likewise.

  Raises:
    UserError: if the processes cannot be joined.
  """
  import jax

  if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    try:
      jax.config.update('jax_num_cpu_devices', 1 if coordinator else _cpu_devices(config))
    except RuntimeError:
      logging.warning(
        'The configuration file computes with JAX as it is loaded, which fixes the number of CPU '
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
      f'not make a run of several processes ({reason}): give all three, the same host:port '
      f'everywhere and numbers from 0.'
    ) from error


def _cpu_devices(config: Any) -> int:
  """How many devices JAX shall make of the CPU: one for each core, as batches and memory allow.

  XLA runs many convolutions on one core only, so that two devices of one core each train up to
  twice as fast as one device of two cores. Every device holds a copy of the training state, hence
  the limit. Processes of a run that has several of them may share a machine and take one each.
  """
  sections = ('training', 'eval', 'classifier', 'sampling')
  sizes = [config.get(section, {}).get('batch_size', 1) for section in sections]
  if not all(isinstance(size, int) for size in sizes):
    return 1  # the configuration is refused later, with a sentence
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return max(n for n in range(1, min(cores, 4) + 1) if not any(size % n for size in sizes))
