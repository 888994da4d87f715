"""Measures one configuration, in a process of its own that `python -m benchmarks` starts.

The request is one argument in JSON. The report is the last line of the output, in JSON too.
"""

import json
import sys

from benchmarks.request import Request
from runtime import startup
from runtime.errors import UserError


def main(request: Request) -> None:
  """Prints the report; a mistake of the user ends the process with a sentence."""
  # JAX reads the settings of this process when it is imported.
  import jax

  from benchmarks import measure

  try:
    print(json.dumps(measure.measure(request)))
  except UserError as error:
    sys.exit(str(error))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    sys.exit(f'{str(error).splitlines()[0]} Set a smaller --batch_size.')


if __name__ == '__main__':
  startup.restart_with_settings()
  startup.keep_compiled_programs()
  main(Request(**json.loads(sys.argv[1])))
