"""The comparison of a report with an older one of the same configuration."""

import json
import pathlib
from typing import Any

from benchmarks.report import align
from runtime.errors import UserError

# What must agree for the times to say something about the code.
CONDITIONS = (
  'hardware',
  'cores',
  'devices',
  'device_kind',
  'versions',
  'batch_size',
  'data',
  'overrides',
)

Report = dict[str, Any]


def read(path: str) -> dict[str, Report]:
  """The newest report on each configuration in a file of JSON lines.

  Raises:
    UserError: if the file is missing or holds anything but reports.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
    reports = [json.loads(line) for line in lines if line.strip()]
    found = {report['config']: report for report in reports if report['parts'] is not None}
  except OSError as error:
    raise UserError(f'--compare={path} cannot be read ({error.strerror}): {_FIX}') from error
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'--compare={path} does not hold reports of this command: {_FIX}') from error
  if not found:
    raise UserError(f'--compare={path} is empty: {_FIX}')
  return found


_FIX = 'name a file that --json wrote.'


def differences(old: Report, new: Report) -> list[str]:
  """What was different about two measurements, one line each."""
  return [
    f'{name}: {old.get(name)} before, {new.get(name)} now'
    for name in CONDITIONS
    if old.get(name) != new.get(name)
  ]


def compare(reports: dict[str, Report], new: Report) -> str:
  """A table of the old and new median times of each part, and their ratios.

  A change counts as within the spread if the quartiles of the two overlap. Conditions that differ
  are listed above the table.
  """
  old = reports.get(new['config'])
  if old is None:
    return f'Nothing to compare: the old file has no {new["config"]}, only {", ".join(reports)}.'
  text = ''
  if found := differences(old, new):
    text = 'NOT THE SAME CONDITIONS, so the ratios do not measure a change of the code:\n'
    text += ''.join(f'  {line}\n' for line in found)
  rows = [['', 'old (s)', 'new (s)', 'new / old', '']]
  for name, part in new['parts'].items():
    if name not in old['parts']:
      rows.append([name, '', f'{part["seconds"]["median"]:.4g}', '', 'not in the old report'])
      continue
    before, after = old['parts'][name]['seconds'], part['seconds']
    within = (
      before['lower_quartile'] <= after['upper_quartile']
      and after['lower_quartile'] <= before['upper_quartile']
    )
    ratio = after['median'] / before['median']
    numbers = [f'{value:.4g}' for value in (before['median'], after['median'])]
    rows.append([name, *numbers, f'{ratio:.3f}', 'within the spread' if within else ''])
  return text + align(rows)
