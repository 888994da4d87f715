"""Speed and memory of configurations: training, network, sampler and likelihood.

  python -m benchmarks configs/vp/mnist_ddpmpp_continuous.py
  python -m benchmarks configs/ve/cifar10_ncsnpp_continuous.py --batch_size=4 --parts=train,forward
  python -m benchmarks CONFIG --json=before.json   # later: --compare=before.json

Each configuration is measured in a new process with the devices and settings of main.py. The parts
are one step of --mode=train, the bare network, an evaluation of the network inside the configured
sampler, and one of the drift and its divergence inside the likelihood. The last line on each
configuration is the report in JSON.
"""

import argparse
import ast
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NoReturn

from benchmarks import compare, report
from benchmarks.request import PARTS, Request
from runtime.errors import UserError


class _Parser(argparse.ArgumentParser):
  """A parser whose complaints are one sentence."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message} (python -m benchmarks --help lists the flags).')


def parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  result = _Parser(
    prog='python -m benchmarks',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = result.add_argument
  add('configs', nargs='+', metavar='CONFIG', help='Configuration files, or file.py:argument.')
  add('--parts', default=','.join(PARTS), help='Some of %(default)s.')
  add('--runs', default='7', help='How often each part is timed; %(default)s by default.')
  add('--batch_size', metavar='N', help='Overrides training.batch_size; all parts use it.')
  add(
    '--set',
    action='append',
    default=[],
    metavar='SECTION.KEY=VALUE',
    help='Overrides a field of the configuration; may be repeated.',
  )
  add(
    '--data',
    default='random',
    choices=('random', 'real'),
    help='random: images of noise, which need no files. real: the data set of the configuration.',
  )
  add('--cold', action='store_true', help='Compile everything, in an empty temporary cache.')
  add('--json', metavar='FILE', help='Append the reports to this file, one line each.')
  add('--compare', metavar='FILE', help='Compare with the newest reports in this file.')
  add('--profile', metavar='DIR', help='Trace three training steps and list what they consist of.')
  return result


def requests(arguments: argparse.Namespace) -> list[Request]:
  """One request for each configuration.

  Raises:
    UserError: if a flag has an impossible value or a file is missing.
  """
  parts = tuple(part.strip() for part in arguments.parts.split(','))
  for part in parts:
    if part not in PARTS:
      raise UserError(
        f'--parts has {part!r}, which is not a part: choose some of {",".join(PARTS)}.'
      )
  if arguments.profile and 'train' not in parts:
    raise UserError(
      f'--profile={arguments.profile} traces the training step, which --parts={arguments.parts} '
      f'leaves out: add train.'
    )
  for path in (config.partition(':')[0] for config in arguments.configs):
    if not pathlib.Path(path).is_file():
      raise UserError(f'{path} does not exist: name a file such as those in configs/vp/.')
  overrides = {} if arguments.data == 'real' else {'data.dataset': 'random'}
  if arguments.batch_size is not None:
    overrides['training.batch_size'] = _positive('--batch_size', arguments.batch_size)
  overrides |= dict(map(_override, arguments.set))
  return [
    Request(
      config,
      parts=parts,
      runs=_positive('--runs', arguments.runs),
      overrides=overrides,
      cold=arguments.cold,
      profile=arguments.profile or '',
    )
    for config in arguments.configs
  ]


def _positive(flag: str, value: str) -> int:
  if not value.strip().isdecimal() or int(value) < 1:
    raise UserError(f'{flag}={value} must be a whole number of at least 1.')
  return int(value)


def _override(text: str) -> tuple[str, Any]:
  name, equals, value = text.partition('=')
  if not equals or name.count('.') != 1 or not all(name.split('.')):
    raise UserError(
      f'--set {text!r} is not section.key=value: write --set model.nf=64, for example.'
    )
  with contextlib.suppress(ValueError, SyntaxError):
    value = ast.literal_eval(value)  # else it is a string
  return name, value


def _check_writable(arguments: argparse.Namespace) -> None:
  """Creates what the flags name, before measurements that could not be written take their time."""
  try:
    if arguments.json:
      open(arguments.json, 'a').close()
    if arguments.profile:
      os.makedirs(arguments.profile, exist_ok=True)
  except OSError as error:
    flag = '--json' if error.filename == arguments.json else '--profile'
    raise UserError(
      f'{flag}={error.filename} cannot be written ({error.strerror}): choose another place.'
    ) from error


def measure(request: Request) -> dict[str, Any] | None:
  """Measures a configuration in a new process; returns None if it failed and said why."""
  with tempfile.TemporaryDirectory() as folder:
    environment = dict(os.environ)
    if request.cold:
      environment['JAX_COMPILATION_CACHE_DIR'] = folder
    process = subprocess.run(
      [sys.executable, '-m', 'benchmarks.worker', json.dumps(dataclasses.asdict(request))],
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )
  if process.returncode:
    if process.returncode < 0:
      print(f'{request.config}: killed by signal {-process.returncode}.', file=sys.stderr)
    return None
  return json.loads(process.stdout.splitlines()[-1])


def main(argv: Sequence[str]) -> int:
  """Prints a table and the JSON of each configuration; returns 1 if any failed, else 0.

  Raises:
    UserError: if a flag is wrong; then nothing is measured.
  """
  arguments = parser().parse_args(argv)
  asked = requests(arguments)
  old = compare.read(arguments.compare) if arguments.compare else None
  _check_writable(arguments)
  failed = False
  for request in asked:
    found = measure(request)
    if found is None:
      failed = True
      continue
    print(report.table(found))
    if 'profile' in found:
      print('\n' + report.profile_table(found['profile']))
    if old is not None:
      print(f'\nAgainst {arguments.compare}:\n{compare.compare(old, found)}')
    line = json.dumps(found)
    if arguments.json:
      with open(arguments.json, 'a', encoding='utf-8') as file:
        file.write(line + '\n')
    print(f'\n{line}', flush=True)
  return int(failed)


if __name__ == '__main__':
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    sys.exit(str(error))
