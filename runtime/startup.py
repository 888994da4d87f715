"""Settings that must be made before JAX starts; main.py and the benchmarks share them."""

import _thread
import math
import os
import pathlib
import platform
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from absl import logging
from ml_collections import ConfigDict

from runtime import configuration
from runtime.errors import UserError

if TYPE_CHECKING:
  from runtime.peers import Peers


# How long JAX waits for a sign of life of a process.
_HEARTBEAT_SECONDS = 100


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


def ending_signals() -> list[int]:
  """The signals that ask this process to end: SIGTERM, and unless they are ignored two others.

  SIGINT, that of Ctrl-C, is ignored in the background of a script, and SIGHUP, sent when a terminal
  closes, under nohup.
  """
  numbers = [getattr(signal, name, None) for name in ('SIGINT', 'SIGHUP')]  # Windows has no SIGHUP
  heeded = [n for n in numbers if n is not None and signal.getsignal(n) != signal.SIG_IGN]
  return [signal.SIGTERM, *heeded]


def unraisable(dropped: Any) -> None:
  """A `sys.unraisablehook`, for exceptions in code that Python calls where nobody can catch them.

  A signal that interrupts such code, a finalizer or what JAX does after each garbage collection,
  would be lost: it comes again. An event loop that ends with a failed save is reported by the save.
  """
  if isinstance(dropped.exc_value, KeyboardInterrupt):
    number = (dropped.exc_value.args or (signal.SIGINT,))[0]
    again = threading.Timer(0.05, _signal_main, [number])
    again.daemon = True
    again.start()
  elif str(dropped.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(dropped)


def _signal_main(number: int) -> None:
  if hasattr(signal, 'pthread_kill'):  # which also wakes a thread that sleeps or waits
    signal.pthread_kill(threading.main_thread().ident, number)
  else:
    _thread.interrupt_main(number)


def user_cache() -> pathlib.Path:
  """The folder of what this program keeps for later runs of the user."""
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  return cache / 'score_sde'


def keep_compiled_programs() -> None:
  """Keeps compiled programs for later runs on this machine, unless the user chose a directory."""
  directory = user_cache() / f'xla-{platform.node()}'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(directory))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')


def _warn_if_programs_are_not_kept() -> None:
  """Says so if every start will compile anew; JAX would not."""
  directory = os.environ.get('JAX_COMPILATION_CACHE_DIR', '')
  if not directory or '://' in directory:
    return
  try:
    os.makedirs(directory, exist_ok=True)
    writable = os.access(directory, os.W_OK)
  except OSError:
    writable = False
  if not writable:
    logging.warning(
      'Compiled programs are not kept, because %s cannot be written to: every start compiles anew. '
      'Set JAX_COMPILATION_CACHE_DIR to another folder.',
      directory,
    )


def start_jax(
  config: ConfigDict,
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> 'Peers | None':
  """Sets the number of CPU devices, and joins the other processes of the run.

  Args:
    config: the configuration, whose batch sizes the devices must share evenly.
    coordinator: host:port of the first process; 'auto' asks the cluster (Slurm, Open MPI, a Cloud
      TPU, Kubernetes) for everything; None is a run of one process.
    num_processes: the number of processes; None asks the cluster.
    process_id: the number of this process, from 0; None asks the cluster.

  Returns:
    The watch over the other processes; None in a run of one process.

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
  _warn_if_programs_are_not_kept()
  if coordinator is None:
    _warn_of_separate_runs()
    return None
  address = None if coordinator == 'auto' else coordinator
  try:
    jax.distributed.initialize(
      address, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
    )
  except (ValueError, RuntimeError) as error:
    reason = str(error).splitlines()[0]
    given = (
      f'--coordinator={coordinator}, --num_processes={num_processes}, --process_id={process_id}'
    )
    raise UserError(
      f'{given} do not start a run of several processes ({reason}): give all three, with the same '
      f'host:port in all processes and process_id from 0, or --coordinator=auto under Slurm, Open '
      f'MPI or on a Cloud TPU.'
    ) from error
  return _watch_peers()


def _watch_peers() -> 'Peers | None':
  import jax
  from jax._src import distributed  # the only place that knows what --coordinator=auto has found

  from runtime.peers import Peers

  if jax.process_count() == 1:
    return None
  host = distributed.global_state.coordinator_address.rpartition(':')[0].strip('[]')
  try:
    return Peers(jax.process_index(), jax.process_count(), host)
  except OSError as error:
    logging.warning(
      'The processes cannot watch each other (%s): if one dies, JAX notices after up to %d s.',
      error,
      _HEARTBEAT_SECONDS,
    )
    return None


def _warn_of_separate_runs() -> None:
  """Says so if a launcher has started several processes that will each be a run of its own."""
  for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'):
    if int(os.environ.get(name, 1)) > 1:
      logging.warning(
        '%s=%s, but --coordinator is not set: each process is a run of its own. For one run of all '
        'processes set --coordinator=auto.',
        name,
        os.environ[name],
      )
  if ',' in os.environ.get('TPU_WORKER_HOSTNAMES', ''):
    logging.warning('This is one host of a TPU pod: set --coordinator=auto to use all of them.')


def _cpu_devices(config: ConfigDict) -> int:
  """The number of CPU devices: one for each core, up to four, that share all batches evenly.

  XLA runs many convolutions on one core only, so that two devices of one core each train up to
  twice as fast as one device of two cores. Every device holds a copy of the training state, hence
  the limit.
  """
  sections = ('training', 'eval', 'classifier', 'sampling')
  sizes = [configuration.look_up(config, section, 'batch_size', 1) for section in sections]
  if not all(isinstance(size, int) for size in sizes):
    return 1  # the configuration is refused later, with a sentence
  layout = [configuration.look_up(config, 'parallel', axis, 1) for axis in ('fsdp', 'spatial')]
  if not all(isinstance(size, int) and size > 0 for size in layout):
    return 1  # refused later as well
  together = math.prod(layout)
  most = max(min(available_cores(), 4), together)
  fitting = [n for n in range(together, most + 1, together) if not any(size % n for size in sizes)]
  return max(fitting, default=together)


def available_cores() -> int:
  """The number of processor cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
