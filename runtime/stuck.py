"""Ends a program that does not hear a signal.

Python handles signals between two instructions of its main thread. That thread may wait for a
compiled program, such as the solution of an ODE, for minutes.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

_SECONDS_TO_HEAR = 5.0


def handle(
  numbers: Iterable[int], handler: Callable[[int, Any], None], end: Callable[[int], None]
) -> None:
  """Sets the handler of signals, in place of which `end` is called if it does not run for a while.

  Call it once, in the main thread. While a signal has another handler, `end` is not called for it;
  nor once a signal has been heard, for what follows, such as a debugger, takes its own time.

  Args:
    numbers: the signals.
    handler: (number of the signal, frame), as of `signal.signal`.
    end: ends the program, given the number; it is called in another thread, after five seconds.
  """
  heard = threading.Event()

  def hear(number: int, frame: Any) -> None:
    heard.set()
    handler(number, frame)

  for number in numbers:
    signal.signal(number, hear)
  if not hasattr(os, 'register_at_fork'):  # on Windows, where Ctrl-C is all that comes
    return
  sent, written = os.pipe()
  os.set_blocking(written, False)
  signal.set_wakeup_fd(written, warn_on_full_buffer=False)
  # A child shares the pipe, but its signals are not those of this process.
  os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

  def watch() -> None:
    while True:
      (number,) = os.read(sent, 1)
      if signal.getsignal(number) is hear and not heard.wait(_SECONDS_TO_HEAR):
        end(number)

  threading.Thread(target=watch, daemon=True).start()
