"""The exception type that stands for every mistake in the user's input, and the exit statuses."""

import enum


class Exit(enum.IntEnum):
  """How `main.py` ends. After a signal n that saved nothing it is 128 + n, as shells have it."""

  REFUSED = 1  # a setting or the data
  NOT_FINITE = 65  # a loss, a gradient or a sample
  FAULT = 70  # of the program, with a traceback
  MEMORY = 71  # too little, on the host or on a device
  STORAGE = 74  # a file cannot be written or read
  LOST_PROCESS = 75  # of a run of several: rerun the same command


class UserError(ValueError):
  """Bad input. The message is one sentence: the value, the constraint and the fix.

  `main.py` prints the message without a traceback; a library caller catches it as a `ValueError`.

  Attributes:
    status: what `main.py` exits with.
  """

  status = Exit.REFUSED

  def __init__(self, message: object = ''):
    # A value or a reason that it quotes may have several lines.
    super().__init__(' '.join(line.strip() for line in str(message).splitlines()))
