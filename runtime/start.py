"""What a training was started with and on, so that a report can say it later."""

import collections
import datetime
import pathlib
import platform
import re
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from runtime.startup import available_cores


def description() -> dict[str, Any]:
  """The content of `start.json`: time, configuration file, its overrides, and the machine."""
  kinds = collections.Counter(device.device_kind for device in jax.devices())
  return {
    'time': datetime.datetime.now().astimezone().isoformat(' ', 'seconds'),
    **_recipe(),
    'devices': ', '.join(f'{count} x {kind}' for kind, count in kinds.items()),
    'processes': jax.process_count(),
    'cpu': _cpu(),
    'cores': available_cores(),
    'memory_gib': _memory(),
  }


def _recipe() -> dict[str, Any]:
  """The file given as `--config`, and each override with the values of the recipe and of the run.

  Both are None in a program that defines no such flag.
  """
  defined = flags.FLAGS
  try:
    name = config_flags.get_config_filename(defined['config'])
  except (KeyError, TypeError):  # no such flag, or one of another kind
    return {'config': None, 'overrides': None}
  given = config_flags.get_override_values(defined['config'])
  overrides = {
    key: {'recipe': defined[f'config.{key}'].default, 'run': value} for key, value in given.items()
  }
  return {'config': name, 'overrides': overrides}


def _cpu() -> str | None:
  """The name of the processor; None where the system does not tell."""
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8')
  except OSError:
    return platform.processor() or None
  found = re.search(r'^model name\s*:\s*(.+)$', text, re.MULTILINE)
  return found[1] if found else platform.processor() or None


def _memory() -> float | None:
  """The memory of the host in GiB; None where the system does not tell."""
  try:
    text = pathlib.Path('/proc/meminfo').read_text(encoding='utf-8')
  except OSError:
    return None
  found = re.search(r'^MemTotal:\s*(\d+) kB$', text, re.MULTILINE)
  return round(int(found[1]) / 2**20, 1) if found else None
