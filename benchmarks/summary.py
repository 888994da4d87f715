"""Prints reports of `python -m benchmarks --json=FILE` as a Markdown table.

python -m benchmarks.summary FILE
"""

import json
import pathlib
import sys
from typing import Any

_HEAD = (
  '| configuration | settings | batch | part | median (s) | images/s | GFLOP/s '
  '| share of the matrix product | compiled (MiB) |\n|---|---|---|---|---|---|---|---|---|'
)


def rows(report: dict[str, Any]) -> list[str]:
  """One row for each part of a report."""
  name = pathlib.Path(report['config'].partition(':')[0])
  name = '/'.join(name.with_suffix('').parts[-2:])
  settings = ', '.join(f'{key}={value}' for key, value in report['overrides'].items())
  return [
    f'| `{name}` | {settings} | {report["batch_size"]} | {kind} | {part["seconds"]["median"]:.4g} '
    f'| {part["images_per_second"]:.4g} | {part["GFLOP_per_second"]:.4g} '
    f'| {part["share_of_gemm_peak"]:.0%} | {part["compiled_MiB"]:.4g} |'
    for kind, part in report['parts'].items()
  ]


def main(arguments: list[str]) -> None:
  """Prints the table of the reports in a file, and what they were measured on."""
  if len(arguments) != 1 or not pathlib.Path(arguments[0]).is_file():
    sys.exit('Give one file that python -m benchmarks --json=FILE has written.')
  text = pathlib.Path(arguments[0]).read_text(encoding='utf-8')
  reports = [json.loads(line) for line in text.splitlines()]
  machines = {f'{r["devices"]} x {r["device_kind"]} ({r["hardware"]})' for r in reports}
  print(', '.join(sorted(machines)), '\n')
  print('\n'.join([_HEAD, *(row for report in reports for row in rows(report))]))


if __name__ == '__main__':
  main(sys.argv[1:])
