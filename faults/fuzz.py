"""Searches for files that break a parser, guided by the code that they reach.

python -m faults.fuzz torch --minutes=30

It needs atheris (pip install atheris==3.0.0), which exists for Linux and Python 3.11 to 3.13 and is
no requirement of this project. The targets and their rules are those of `faults.targets`. It begins
with the files of `tests/corpus/TARGET`, goes on after each finding, and writes every new one to the
folder of `--findings`; where the process itself dies, the file that killed it is there too.
"""

import argparse
import hashlib
import logging
import pathlib
import sys
import tempfile
import time
import traceback

import atheris

# Coverage of these is followed, and of parsers of others; JAX would only slow it down.
_OURS = ['evaluation', 'formats', 'models.classifier', 'modes', 'report', 'runtime', 'score_sde']
_OTHERS = ['flax.serialization', 'pickletools', 'tarfile', 'zipfile']
with atheris.instrument_imports(include=[*_OURS, 'sources', *_OTHERS]):
  from faults import targets


def fuzz(name: str, *, minutes: float, corpus: pathlib.Path, findings: pathlib.Path) -> None:
  """Fuzzes a target, and ends the process.

  Args:
    name: of the target.
    minutes: how long.
    corpus: the folder for files that reach new code.
    findings: the folder for those that break the parser.
  """
  findings.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(tempfile.mkdtemp(dir='/dev/shm')) / name
  seen: set[str] = set()
  start = time.monotonic()

  def one(content: bytes) -> None:
    try:
      targets.check(name, content, scratch)
    except targets.Finding as finding:
      place = traceback.format_exception(finding.__cause__)[-3:-1] if finding.__cause__ else ''
      cause = type(finding.__cause__ or finding).__name__
      where = f'{cause} {"".join(place).strip()}'
      if where in seen:
        return
      seen.add(where)
      digest = hashlib.sha256(content).hexdigest()[:8]
      (findings / f'{name}-{digest}').write_bytes(content)
      seconds = time.monotonic() - start
      print(f'FINDING {name}-{digest} after {seconds:.0f} s: {finding}\n{where}', flush=True)

  options = [
    f'-max_total_time={minutes * 60:.0f}',
    f'-artifact_prefix={findings}/{name}-',
    '-max_len=65536',
    '-rss_limit_mb=6000',
    '-timeout=60',
    '-print_final_stats=1',
    '-verbosity=1',
  ]
  seeds = targets.CORPUS / name
  atheris.Setup([sys.argv[0], *options, str(corpus), str(seeds)], one)
  atheris.Fuzz()


def main() -> None:
  """Fuzzes the target of the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('target', choices=list(targets.TARGETS))
  parser.add_argument('--minutes', type=float, default=30)
  parser.add_argument('--corpus', type=pathlib.Path, help='a folder to continue from')
  parser.add_argument('--findings', type=pathlib.Path, default=pathlib.Path('runs/fuzz'))
  given = parser.parse_args()
  logging.disable(logging.CRITICAL)
  corpus = given.corpus or pathlib.Path(tempfile.mkdtemp(prefix='corpus-'))
  corpus.mkdir(parents=True, exist_ok=True)
  fuzz(given.target, minutes=given.minutes, corpus=corpus, findings=given.findings)


if __name__ == '__main__':
  main()
