"""Runs a tiny training and its evaluation for long, and watches memory, threads and open files.

python -m faults.long_run --steps=5000 --rounds=30

All of them must stay flat after the first fifth of the run, and the disk must hold no more
checkpoints than it is told to keep.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from faults.kills import CONFIG, REPOSITORY

_MIB = 2**20
# Of the peak: allocators and caches of compiled programs settle late.
_MOST_GROWTH = 1.05
_KEPT = 3  # checkpoints, besides those that the evaluation needs


@dataclasses.dataclass(frozen=True)
class Usage:
  """What a process uses at one moment: resident bytes, threads and open files."""

  memory: int
  threads: int
  files: int


def usage(pid: int) -> Usage | None:
  """What a process uses now; None if it has ended."""
  process = pathlib.Path(f'/proc/{pid}')
  try:
    pages = int((process / 'statm').read_text().split()[1])
    threads = len(os.listdir(process / 'task'))
    return Usage(pages * os.sysconf('SC_PAGE_SIZE'), threads, len(os.listdir(process / 'fd')))
  except (FileNotFoundError, ProcessLookupError, IndexError):
    return None


def watch(*arguments: str, seconds: float) -> list[Usage]:
  """Runs the program to its end and looks at it every so many seconds.

  Raises:
    RuntimeError: if it fails.
  """
  command = [sys.executable, 'main.py', f'--config={CONFIG}', *arguments]
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  with tempfile.TemporaryFile() as log:
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
    found = []
    while process.poll() is None:
      found.append(usage(process.pid))
      try:
        process.wait(seconds)
      except subprocess.TimeoutExpired:
        continue
    if process.returncode:
      log.seek(0)
      raise RuntimeError(f'{" ".join(command)} has failed:\n{log.read().decode()}')
  return [entry for entry in found if entry]


def growth(values: list[int]) -> float:
  """The median of the last fifth of a run, divided by that of the second fifth."""
  part = max(1, len(values) // 5)
  return statistics.median(values[-part:]) / statistics.median(values[part : 2 * part])


def row(name: str, found: list[Usage], seconds: float) -> str:
  """A line of a Markdown table: the start, the middle and the end of a run, and its growth."""
  moments = [found[int(share * (len(found) - 1))] for share in (0.2, 0.6, 1.0)]
  columns = [
    ' / '.join(f'{entry.memory / _MIB:.0f}' for entry in moments),
    ' / '.join(str(entry.threads) for entry in moments),
    ' / '.join(str(entry.files) for entry in moments),
  ]
  return f'| {name}, {seconds:.0f} s | {" | ".join(columns)} |'


def main() -> None:
  """Runs both, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=5000)
  parser.add_argument('--rounds', type=int, default=30, help='checkpoints that are evaluated')
  parser.add_argument('--seconds', type=float, default=0.5, help='between two looks')
  given = parser.parse_args()
  every = given.steps // (given.rounds + _KEPT)
  kept = given.rounds + _KEPT - 1
  last = given.steps // every
  with tempfile.TemporaryDirectory(prefix='long-run-') as folder:
    workdir = pathlib.Path(folder)
    common = (
      f'--workdir={workdir}',
      f'--config.training.n_iters={given.steps - given.steps % every}',
      f'--config.training.snapshot_freq={every}',
      f'--config.training.snapshot_freq_for_preemption={every}',
      f'--config.training.keep_checkpoints=last:{kept}',
    )
    evaluation = (
      f'--config.eval.stats_path={workdir}/stats.npz',
      '--config.eval.enable_sampling=True',
      '--config.eval.num_samples=128',
      '--config.eval.enable_bpd=True',
      '--config.eval.bpd_repeats=1',
      f'--config.eval.begin_ckpt={last - given.rounds + 1}',
      f'--config.eval.end_ckpt={last}',
    )
    watch('--mode=stats', evaluation[0], seconds=given.seconds)
    rows, grown = [], []
    for name, arguments in (
      (f'{given.steps} training steps', ('--mode=train', *common)),
      (f'{given.rounds} rounds of evaluation', ('--mode=eval', *common, *evaluation)),
    ):
      start = time.monotonic()
      found = watch(*arguments, seconds=given.seconds)
      rows.append(row(name, found, time.monotonic() - start))
      for field in dataclasses.fields(Usage):
        factor = growth([getattr(entry, field.name) for entry in found])
        if factor > _MOST_GROWTH:
          grown.append(f'{name}: {field.name} has grown by a factor of {factor:.2f}')
    count = len(list((workdir / 'checkpoints').glob('checkpoint_*')))
    if count != kept:
      grown.append(f'{count} checkpoints instead of {kept}')
  print('| run | MiB at 20, 60, 100 % | threads | open files |\n|---|---|---|---|')
  print('\n'.join(rows + grown))
  sys.exit(bool(grown))


if __name__ == '__main__':
  main()
