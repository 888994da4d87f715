"""Signals that ask a run to stop."""

import pathlib
import shlex
import signal
import sys
import threading
from typing import Any

import jax

from runtime import parallelism
from runtime.startup import ending_signals


def to_resume() -> str:
  """The sentence that says how to resume."""
  program = sys.argv[0]
  if pathlib.Path(program).name != 'main.py':
    return 'To resume, make the same call again.'
  return f'To resume, run: {shlex.join(sys.orig_argv)}'


class Preemption:
  """Turns SIGTERM, SIGINT and SIGHUP into a request to save and stop.

  A second SIGINT stops at once. Use it as a context manager, which handles the signals until it
  exits.
  """

  def __enter__(self) -> 'Preemption':
    self._signalled = False
    # Only the main thread may handle signals; a training elsewhere is stopped by its caller.
    in_main = threading.current_thread() is threading.main_thread()
    numbers = ending_signals() if in_main else []
    self._previous = {number: signal.signal(number, self._handle) for number in numbers}
    return self

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if self._signalled and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._signalled = True

  def requested(self, agreed: bool) -> bool:
    """Whether the run should stop now.

    Args:
      agreed: whether all processes call this at the same step; a run of several processes stops
        only then, and all of its processes together.
    """
    if jax.process_count() == 1:
      return self._signalled
    return agreed and parallelism.any_process(self._signalled)

  def __exit__(self, *exc_info: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
