"""Predicts the memory that the metrics of 50,000 Inception features take, in a process of its own.

  python -m tests.scaled_metrics

All lengths that memory depends on are a quarter of what they are: the features of an image, the
images, the blocks that they are taken in. Every array of the benchmark is then a sixteenth of what
it would be, where the whole would take minutes.
"""

import functools
import json
import pathlib
import re

from absl import app, flags

import metrics
from benchmarks import inception as benchmark
from models import inception

SCALE = 4


def resident() -> int:
  """What this process occupies now, in KiB."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'VmRSS:\s+(\d+) kB', status).group(1))


def main(argv: list[str]) -> None:
  del argv
  flags.FLAGS.count //= SCALE
  inception.NUM_FEATURES //= SCALE
  inception.NUM_CLASSES //= SCALE
  metrics._BLOCK //= SCALE
  # The rows of distances are 512 at a time, so that these are reduced in the other direction alone.
  metrics._PRECISION_RECALL_SAMPLES //= SCALE**2
  metrics.kernel_distance = functools.partial(metrics.kernel_distance, max_block_size=1024 // SCALE)
  before = resident()
  report = benchmark.time_metrics()
  taken = benchmark.peak_memory() - before
  report['peak_memory_GiB'] = (before + SCALE**2 * taken) / 2**20
  print(json.dumps(report))


if __name__ == '__main__':
  app.run(main)
