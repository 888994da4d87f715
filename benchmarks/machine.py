"""What the benchmarks ask of the machine: its peak speed, memory, versions, and the compiler."""

import contextlib
import importlib.metadata
import pathlib
import platform
import re
import resource
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from runtime.startup import available_cores

_PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy')


_product = jax.jit(jnp.matmul)


def seconds(function: Callable[[], object], repeats: int) -> list[float]:
  """The durations of `repeats` calls."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return times


def gemm_peak(size: int = 2048) -> float:
  """Floating point operations per second of the faster of two square matrix products."""
  a = jnp.ones((size, size))
  return 2 * size**3 / min(seconds(lambda: _product(a, a), 2))


def spread(times: Sequence[float]) -> dict[str, float]:
  """Median, minimum and quartiles, to four digits."""
  names = ('min', 'lower_quartile', 'median', 'upper_quartile')
  values = np.percentile(times, (0, 25, 50, 75))
  return {name: digits(value) for name, value in zip(names, values, strict=True)}


def digits(value: float, count: int = 4) -> float:
  """`value` rounded to `count` digits."""
  return float(f'{value:.{count}g}')


def description() -> dict[str, object]:
  """The hardware and versions on which a measurement depends."""
  return {
    'hardware': _processor(),
    'cores': available_cores(),
    'devices': jax.device_count(),
    'device_kind': jax.devices()[0].device_kind,
    'versions': {
      'python': platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
  }


def _processor() -> str:
  path = pathlib.Path('/proc/cpuinfo')
  found = re.search(r'model name\s*:\s*(.+)', path.read_text()) if path.exists() else None
  return found.group(1).strip() if found else platform.processor() or platform.machine()


def peak_memory() -> int:
  """The peak of this process's resident memory in KiB, since `restart_peak_memory` if that works.

  On Linux it is that of the process status: `getrusage` would count the parent process as well.
  """
  path = pathlib.Path('/proc/self/status')
  found = re.search(r'VmHWM:\s+(\d+) kB', path.read_text()) if path.exists() else None
  if found:
    return int(found.group(1))
  unit = 1024 if platform.system() == 'Darwin' else 1  # bytes there, KiB elsewhere
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def restart_peak_memory() -> None:
  """Lets `peak_memory` start again at the memory that is in use now, where the system allows it."""
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')


class Compilations:
  """What was compiled since this object was made; make one before each part of a benchmark.

  Attributes:
    seconds: the time of the compiler, or of reading programs from the persistent cache.
    programs: the number of programs.
    from_cache: how many of them came from the persistent cache.
  """

  def __init__(self):
    self.seconds, self.programs, self.from_cache = 0.0, 0, 0
    self._before = set(_executables())
    jax.monitoring.register_event_duration_secs_listener(self._duration)
    jax.monitoring.register_event_listener(self._event)

  def _duration(self, event: str, duration: float, **_: object) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      self.seconds += duration
      self.programs += 1

  def _event(self, event: str, **_: object) -> None:
    self.from_cache += event == '/jax/compilation_cache/cache_hits'

  def stop(self) -> None:
    """Ends the counting."""
    jax.monitoring.unregister_event_duration_listener(self._duration)
    jax.monitoring.unregister_event_listener(self._event)

  def memory(self) -> int:
    """Bytes that the largest new program needs on one device: arguments, results and temporaries.

    Results that take the memory of an argument count once.
    """
    sizes = [0]
    for program in set(_executables()) - self._before:
      stats = program.get_compiled_memory_stats()
      sizes.append(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
      )
    return max(sizes)


def _executables() -> list:
  return jax.devices()[0].client.live_executables()
