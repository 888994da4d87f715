"""The process of a run that all others wait for: a step is as slow as the slowest of them."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Shaped

from runtime import parallelism
from runtime.array_types import Array

# Over how long the processes are compared.
_WINDOW_SECONDS = 10.0
# The share of time spent waiting for data that is worth a warning.
_LATE_SHARE = 0.2
# So many times slower than the others, in so many windows in a row, a process is worth a warning.
_SLOW_RATIO = 1.5
_SLOW_WINDOWS = 4
_PROBE_SECONDS = 0.02


class Stragglers:
  """Warns once of each process that all others wait for.

  Two things are compared over windows of ten seconds: the share of time that a process waits for
  its data, and how fast it computes while nothing else runs on its devices.

  Args:
    clock: the time in seconds.
    speed: how fast this process computes, in any unit.
  """

  def __init__(
    self, clock: Callable[[], float] = time.monotonic, speed: Callable[[], float] | None = None
  ):
    self._clock = clock
    self._speed = speed or computing_speed
    self._late: set[int] = set()
    self._slow: set[int] = set()
    self._slow_windows = np.zeros(jax.process_count(), int)
    self._start, self._waited = clock(), 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """What runs in this context waits for the data of this process."""
    start = self._clock()
    yield
    self._waited += self._clock() - start

  def compare(self) -> None:
    """Compares the processes; all of them must call this at the same steps."""
    if jax.process_count() == 1:
      return
    # This waits for the steps that were started: no device is busy after it.
    waits, times = parallelism.gather([self._waited, self._clock() - self._start]).T
    if times[0] < _WINDOW_SECONDS:
      return
    self._compare_waits(waits / times)
    self._compare_speeds(parallelism.gather([self._speed()])[:, 0])
    self._start, self._waited = self._clock(), 0.0

  def _compare_waits(self, shares: Shaped[np.ndarray, 'P']) -> None:  # noqa: F821
    latest = int(np.argmax(shares))
    others = _of_others(shares, latest)
    if shares[latest] > max(_LATE_SHARE, 2 * others) and latest not in self._late:
      self._late.add(latest)
      logging.warning(
        'Process %d waits for its data %.0f %% of the time, the others %.0f %%, and all wait for '
        'it: look at its disk and at what else runs on its machine, raise data.num_workers, or '
        'move its data to a faster disk.',
        latest,
        100 * shares[latest],
        100 * others,
      )

  def _compare_speeds(self, speeds: Shaped[np.ndarray, 'P']) -> None:  # noqa: F821
    ratios = np.array([_of_others(speeds, i) / speed for i, speed in enumerate(speeds)])
    self._slow_windows = np.where(ratios > _SLOW_RATIO, self._slow_windows + 1, 0)
    for process in np.flatnonzero(self._slow_windows >= _SLOW_WINDOWS).tolist():
      if process not in self._slow:
        self._slow.add(process)
        logging.warning(
          'Process %d computes %.1f times as slowly as the others, and all wait for it: look at '
          'what else runs on its machine, and at the clock rate and temperature of its devices.',
          process,
          ratios[process],
        )


def _of_others(values: Shaped[np.ndarray, 'P'], process: int) -> float:  # noqa: F821
  return float(np.median(np.delete(values, process)))


def computing_speed() -> float:
  """How often in a second the devices of this process multiply some matrices."""
  multiply, x = _probe()
  start, count = time.perf_counter(), 0
  while (seconds := time.perf_counter() - start) < _PROBE_SECONDS:
    jax.block_until_ready(multiply(x))
    count += 1
  return count / seconds


@functools.cache
def _probe() -> tuple[Callable[[Float[Array, 'D n n']], Float[Array, 'D n n']], jax.Array]:
  """A program for the devices of this process alone, and what it is called with."""
  size = 128 if jax.default_backend() == 'cpu' else 2048
  devices = jax.local_devices()
  each = NamedSharding(Mesh(np.asarray(devices), 'local'), PartitionSpec('local'))
  matrices = np.broadcast_to(np.eye(size, dtype=np.float32), (len(devices), size, size))
  x = jax.device_put(matrices, each)
  multiply = jax.jit(lambda x: jax.lax.fori_loop(0, 16, lambda _, y: jnp.matmul(y, x), x))
  jax.block_until_ready(multiply(x))  # compiles
  return multiply, x
