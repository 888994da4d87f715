"""The one exception type that stands for a mistake in what the user gave."""


class UserError(ValueError):
  """Bad input. The message is one sentence: the value, the constraint and the fix.

  `main.py` prints it without a traceback; a library caller catches it as a `ValueError`.
  """
