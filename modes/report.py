"""`--mode=report`: one HTML page about one or several runs, which needs nothing but a browser.

It reads the directories of the runs as they are, also while they are being trained, and writes
nothing but the page.
"""

import datetime
import pathlib
from collections.abc import Sequence

from report import page, reading
from report.page import Recipe
from runtime.errors import UserError
from runtime.files import write_atomic

_BEGINNING = b'<!doctype html>'


def make_report(
  workdirs: Sequence[str | pathlib.Path],
  path: str | pathlib.Path | None = None,
  recipe: Recipe | None = None,
) -> pathlib.Path:
  """See `run_lib.make_report`."""
  directories = [pathlib.Path(workdir).expanduser() for workdir in workdirs]
  if not directories:
    raise UserError('--workdir names no directory: name that of a run, or several with commas.')
  target = pathlib.Path(path).expanduser() if path else directories[0] / 'report.html'
  if target.is_dir():
    raise UserError(f'--report={path} is a directory: name a file in it, such as report.html.')
  if not _is_replaceable(target):
    raise UserError(f'{target} is no report, and is not replaced: set --report to another file.')
  html = page.render(reading.read_runs(directories), recipe, datetime.datetime.now())
  try:
    write_atomic(target, html)
  except OSError as error:
    raise UserError(
      f'The report cannot be written to {target} ({error.strerror}): set --report to a file in a '
      f'folder of yours.'
    ) from error
  return target


def _is_replaceable(target: pathlib.Path) -> bool:
  """Whether there is no file, an empty one, or a page."""
  try:
    with target.open('rb') as file:
      return file.read(len(_BEGINNING)).lower() in (b'', _BEGINNING)
  except OSError:  # there is no file, or writing it will fail too
    return True


def split_workdirs(text: str) -> list[str]:
  """The directories of `a,b,c`; a single one, if there is a directory of this whole name."""
  names = [text] if pathlib.Path(text).expanduser().is_dir() else text.split(',')
  return [name.strip() for name in names if name.strip()]
