"""The exception type that stands for every mistake in the user's input."""


class UserError(ValueError):
  """Bad input. The message is one sentence: the value, the constraint and the fix.

  `main.py` prints the message without a traceback; a library caller catches it as a `ValueError`.
  """
