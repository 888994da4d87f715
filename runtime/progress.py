"""How far a long task is, how fast it is and how long it will take, on terminals and in logs."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import tqdm
from absl import logging

_SECONDS = 30  # between two lines of a log
_LINE = '{desc}: {n_fmt} of {total_fmt} {unit}, {rate_noinv_fmt}, {remaining} left'


def bar(
  iterable: Iterable[Any] | None = None,
  what: str = '',
  total: int | None = None,
  *,
  unit: str,
  initial: int = 0,
  scale: int = 1,
  **settings: Any,
) -> tqdm.tqdm:
  """A progress bar on a terminal; elsewhere a line of the log every 30 seconds.

  Args:
    iterable: what to go through; None if the caller calls `update`.
    what: what is being done.
    total: the number of parts; by default the length of `iterable`.
    unit: what is counted, such as 'images'.
    initial: how many parts are done already.
    scale: how many units a part has.
    **settings: other settings of `tqdm.tqdm`.
  """
  settings = {'unit_scale': scale if scale > 1 else False, **settings}
  settings |= {'desc': what, 'total': total, 'unit': unit, 'initial': initial}
  settings['disable'] = jax.process_index() != 0
  if sys.stderr.isatty():
    return tqdm.tqdm(iterable, **settings)
  return tqdm.tqdm(
    iterable,
    **settings,
    file=_LogLines(),
    bar_format=_LINE,
    mininterval=_SECONDS,
    maxinterval=2 * _SECONDS,
    miniters=1,
    delay=_SECONDS,
  )


class _LogLines(io.TextIOBase):
  """A file whose lines go to the log; the carriage returns of a progress bar are left out."""

  def write(self, text: str) -> int:
    if line := text.strip():
      logging.info('%s', line)
    return len(text)


def duration(seconds: float | None) -> str:
  """A time such as '5:02' or '29:03:12'; '?' if it is unknown."""
  return '?' if seconds is None else tqdm.tqdm.format_interval(seconds)


class Pace:
  """The speed of steps, and the time that is left for a task that other work interrupts.

  Args:
    total: the number of steps of the whole task.
    clock: the time in seconds.
  """

  def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
    self._total, self._clock = total, clock
    self._first: tuple[int, float] | None = None
    self._lap: tuple[int, float] | None = None

  def resume(self, step: int) -> None:
    """Starts the clock of the steps, at first and after every interruption."""
    self._lap = step, self._clock()
    self._first = self._first or self._lap

  def lap(self, step: int) -> tuple[float | None, float | None]:
    """Steps per second since the last call of `lap` or `resume`, and the seconds that are left.

    The time that is left is that of all remaining steps with as many interruptions as before. Both
    are None as long as no step has been timed.
    """
    now = self._clock()
    if self._lap is None or step == self._lap[0]:
      return None, None
    (begin, start), (first, since) = self._lap, self._first
    self._lap = step, now
    left = (now - since) / (step - first) * (self._total - step)
    return (step - begin) / max(now - start, 1e-9), left


def memory() -> int | None:
  """Bytes in use: the peak of the fullest device, or of this process if devices do not say."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  if peaks := [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]:
    return max(peaks)
  try:
    with open('/proc/self/statm', encoding='ascii') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except OSError:  # no Linux
    return None
