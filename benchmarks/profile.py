"""Where the time of a training step goes, from a trace of the profiler of JAX."""

import collections
import contextlib
import gzip
import json
import pathlib
import re
from collections.abc import Callable

import jax

from runtime.errors import UserError

STEPS = 3
# They last as long as the operations inside them, which the trace has too.
_CONTAINERS = ('while', 'call', 'conditional')

Row = tuple[str, float, float]


def trace(folder: pathlib.Path, step: Callable[[], object]) -> list[Row]:
  """Traces three calls of `step` into `folder`; returns the costliest kinds of operations."""
  before = set(_runs(folder))
  with jax.profiler.trace(folder):
    for _ in range(STEPS):
      step()
  (run,) = set(_runs(folder)) - before
  return costliest(durations(run))


def durations(run: pathlib.Path) -> dict[str, float]:
  """Seconds of each kind of operation in a folder of `plugins/profile`, over all devices.

  The kind is the name of an operation of XLA without the number at its end.

  Raises:
    UserError: if the folder has no trace.
  """
  found = collections.Counter()
  paths = sorted(run.glob('*.trace.json.gz'))
  if not paths:
    raise UserError(f'{run} has no *.trace.json.gz: choose another folder for --profile.')
  for path in paths:
    with gzip.open(path, 'rt', encoding='utf-8') as file:
      events = json.load(file)['traceEvents']
    for event in events:
      with contextlib.suppress(KeyError):
        found[re.sub(r'(\.\d+)+$', '', event['args']['hlo_op'])] += event['dur'] / 1e6
  return {kind: total for kind, total in found.items() if kind not in _CONTAINERS}


def costliest(seconds: dict[str, float], count: int = 10) -> list[Row]:
  """The `count` kinds that take most of the time: name, seconds, share of all."""
  total = sum(seconds.values())
  ordered = sorted(seconds.items(), key=lambda item: -item[1])[:count]
  return [(kind, value, value / total) for kind, value in ordered]


def _runs(folder: pathlib.Path) -> list[pathlib.Path]:
  return list((folder / 'plugins' / 'profile').glob('*/'))
