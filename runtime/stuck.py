"""Ends a program that does not hear a signal.

Python handles signals between two instructions of its main thread. That thread may wait for a
compiled program, such as the solution of an ODE, for minutes.
"""

import os
import signal
import threading
from collections.abc import Callable

_SECONDS_TO_HEAR = 5.0


def end_if_unheard(handler: Callable[..., None], end: Callable[[int], None]) -> None:
  """Calls `end` with the number of a signal that its handler has not heard for five seconds.

  Call it in the main thread, and once. The handler has heard when it is no longer that of the
  signal: whoever catches what it raises sets another one, such as `signal.SIG_IGN`.

  Args:
    handler: the handler of the signals to watch; those with another one are left alone.
    end: ends the program; it is called in another thread.
  """
  if not hasattr(os, 'register_at_fork'):  # on Windows, which has no such signals
    return
  heard, sent = os.pipe()
  os.set_blocking(sent, False)
  signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
  # A child shares the pipe: its signals are not those of this process.
  os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

  def end_if_still(number: int) -> None:
    if signal.getsignal(number) is handler:
      end(number)

  def watch() -> None:
    while True:
      (number,) = os.read(heard, 1)
      timer = threading.Timer(_SECONDS_TO_HEAR, end_if_still, [number])
      timer.daemon = True
      timer.start()

  threading.Thread(target=watch, daemon=True).start()
