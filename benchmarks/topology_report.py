"""The tables of docs/scaling.md, from the lines that `benchmarks.topology` wrote.

  python -m benchmarks.topology_report

It compiles nothing. Scaling compares the rooflines of rows that differ in the number of chips only,
with the same number of images on each.
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.topology import CHIPS

Row = dict[str, Any]

_SHOWN_ELSEWHERE = ('model.dtype', 'parallel.fsdp', 'parallel.spatial')


def _name(row: Row) -> str:
  """The configuration and what was changed in it."""
  changed = [
    f'{name.split(".")[1]}={value}'
    for name, value in row['settings'].items()
    if name not in _SHOWN_ELSEWHERE
  ]
  short = row['config'].split('/')[-1].removesuffix('_continuous').removesuffix('_ncsnpp')
  return ', '.join([short, *changed])


def _what(row: Row) -> list[str]:
  layout = f'{row["chips"] // row["fsdp"] // row["spatial"]} x {row["fsdp"]} x {row["spatial"]}'
  return [
    _name(row),
    row['program'],
    row['topology'],
    layout,
    str(row['batch']),
    row['dtype'],
    row['effort'],
  ]


def _table(header: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
  yield '| ' + ' | '.join(header) + ' |'
  yield '|' + '---|' * len(header)
  for row in rows:
    yield '| ' + ' | '.join(row) + ' |'


_WHAT = ['configuration', 'program', 'topology', 'data x fsdp x spatial', 'batch', 'dtype', 'level']


def total_bytes(row: Row) -> int:
  """The bytes of main memory that a device needs for a program."""
  return row['argument_bytes'] + row['output_bytes'] - row['aliased_bytes'] + row['temporary_bytes']


def _of_memory(row: Row) -> list[str]:
  chip = CHIPS[row['topology'].split(':')[0]]
  if 'error' in row:
    return [*_what(row), '', '', row['error'][:90], '', '', _minutes(row)]
  collectives = ', '.join(
    f'{kind} {_size(row["collective_bytes"][kind])} in {count}'
    for kind, count in row['collective_counts'].items()
  )
  layout = row['layout_changes']
  return [
    *_what(row),
    f'{row["argument_bytes"] / 1e9:.3f}',
    f'{row["temporary_bytes"] / 1e9:.3f}',
    f'{total_bytes(row) / chip.memory:.0%}',
    collectives or 'none',
    f'{layout["at_convolutions"]} of {layout["count"]}, {_size(layout["bytes"])}',
    _minutes(row),
  ]


def _size(count: int) -> str:
  """A number of bytes."""
  return f'{count / 1e6:.3g} MB' if count >= 1e5 else f'{count} bytes'


def _minutes(row: Row) -> str:
  return f'{row["compile_cpu_seconds"] / 60:.1f}'


def _of_speed(row: Row) -> list[str]:
  limits = row['roofline']
  share = limits['compute_ms'] / limits['step_ms']
  return [
    *_what(row),
    f'{row["analytic_flops"] / 1e12:.3f}',
    f'{row["main_memory_bytes"] / 1e9:.2f}',
    *(f'{limits[name]:.2f}' for name in ('compute_ms', 'memory_ms', 'links_ms', 'step_ms')),
    f'{share:.0%}',
    '' if limits['compiler_ms'] is None else f'{limits["compiler_ms"]:.0f}',
  ]


def _scaling(rows: list[Row]) -> Iterator[list[str]]:
  groups: dict[str, list[Row]] = {}
  for row in rows:
    key = (*_what(row)[:2], row['topology'].split(':')[0], row['dtype'], row['effort'])
    share = row['batch'] // row['chips']
    same = json.dumps([*key, share, row['fsdp'], row['spatial']])
    groups.setdefault(same, []).append(row)
  for group in groups.values():
    group.sort(key=lambda row: row['chips'])
    first = group[0]
    if len(group) == 1:
      continue
    apart = lambda row: row['roofline']['compute_ms'] + row['roofline']['links_ms']
    for row in group:
      yield [
        *_what(row),
        f'{first["roofline"]["step_ms"] / row["roofline"]["step_ms"]:.1%}',
        f'{apart(first) / apart(row):.1%}',
      ]


def report(rows: list[Row]) -> str:
  """The three tables in Markdown."""
  good = [row for row in rows if 'error' not in row]
  memory = [
    'arguments GB',
    'temporaries GB',
    'of memory',
    'collectives',
    'layout changes',
    'CPU min',
  ]
  speed = ['TFLOP', 'traffic GB', 'compute', 'memory', 'links', 'step', 'of peak', 'compiler']
  parts = (
    _table(_WHAT + memory, map(_of_memory, rows)),
    _table(_WHAT + speed, map(_of_speed, good)),
    _table([*_WHAT, 'overlapped', 'one after the other'], _scaling(good)),
  )
  return '\n\n'.join('\n'.join(part) for part in parts)


if __name__ == '__main__':
  file = pathlib.Path(sys.argv[1] if sys.argv[1:] else 'benchmarks/topology.jsonl')
  print(report([json.loads(line) for line in file.read_text().splitlines()]))
