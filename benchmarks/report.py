"""The readable tables of a report."""

from collections.abc import Sequence
from typing import Any

# The rows: their names, and the keys of a part that they show.
_ROWS = {
  'median (s)': 'median',
  'fastest (s)': 'min',
  'lower quartile (s)': 'lower_quartile',
  'upper quartile (s)': 'upper_quartile',
  'images/s': 'images_per_second',
  'GFLOP': 'GFLOP',
  'GFLOP/s': 'GFLOP_per_second',
  'matrix product (GFLOP/s)': 'gemm_peak_GFLOP_per_second',
  'share of it': 'share_of_gemm_peak',
  'first call (s)': 'first_call_seconds',
  'compiling (s)': 'compile_seconds',
  'programs from the cache': 'cache',
  'memory, compiled (MiB)': 'compiled_MiB',
  'memory, resident (MiB)': 'resident_MiB',
  'share of the input': 'input_share_of_step',
  'share of the forward rate': 'sampler_share_of_forward',
  'forward passes': 'likelihood_forwards',
}


def align(rows: Sequence[Sequence[str]]) -> str:
  """Columns side by side, the first to the left and the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *others in rows:
    cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    lines.append('  '.join([first.ljust(widths[0]), *cells]).rstrip())
  return '\n'.join(lines)


def table(report: dict[str, Any]) -> str:
  """The parts of a report side by side, below what was measured and where."""
  versions = ', '.join(f'{name} {version}' for name, version in report['versions'].items())
  head = (
    f'{report["config"]}: batch {report["batch_size"]}, data {report["data"]}, '
    f'{report["parameters"]:,} parameters\n'
    f'{report["devices"]} x {report["device_kind"]}, {report["cores"]} cores of '
    f'{report["hardware"]}; {versions}\n'
    'train: for one step; the others: for one evaluation of the network or drift (NFE)\n'
  )
  parts = {name: _cells(part) for name, part in report['parts'].items()}
  rows = [['', *parts]]
  for title, key in _ROWS.items():
    if any(key in cells for cells in parts.values()):
      rows.append([title, *(cells.get(key, '') for cells in parts.values())])
  return head + align(rows)


def _cells(part: dict[str, Any]) -> dict[str, str]:
  seconds = part['seconds']
  return {
    **{key: f'{value:.4g}' for key, value in {**part, **seconds}.items() if key != 'seconds'},
    'cache': f'{part["programs_from_cache"]} of {part["programs"]}',
  }


def profile_table(rows: Sequence[tuple[str, float, float]]) -> str:
  """The costliest kinds of operations of the profiled training steps."""
  cells = [[kind, f'{seconds:.4g}', f'{share:.1%}'] for kind, seconds, share in rows]
  return align([['operation of three training steps', 'seconds', 'share'], *cells])
