"""Starts main.py as people do, waits for it, and reads what it wrote."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = 'tests/tiny_config.py'


def command(workdir, *overrides, mode='train', config=CONFIG):
  return [
    sys.executable,
    'main.py',
    f'--mode={mode}',
    f'--config={config}',
    f'--workdir={workdir}',
    *overrides,
  ]


def environment(devices=1):
  """Of a process that compiles quickly, as its programs run for less time than that takes."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }


def start(workdir, *overrides, devices=1, **kwargs):
  return subprocess.Popen(
    command(workdir, *overrides, **kwargs),
    cwd=ROOT,
    env=environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process):
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  return output


def run(workdir, *overrides, **kwargs):
  return finish(start(workdir, *overrides, **kwargs))


MEASURED = ('images_per_second', 'memory')  # which differ from run to run


def history(workdir):
  """(step, metric) -> value, without measured ones, and that no entry stands twice."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  entries = [((line['step'], name), value) for line in lines for name, value in line.items()]
  entries = [(key, value) for key, value in entries if key[1] not in ('step', *MEASURED)]
  assert len(dict(entries)) == len(entries)
  return dict(entries)


def samples(workdir):
  """Directory of samples -> grey levels (B, H, W, C)."""
  paths = sorted((workdir / 'samples').glob('*/sample.npz'))
  return {path.parent.name: np.load(path)['samples'] for path in paths}


def start_together(workdir, *overrides, count=2, devices=1, own=((), ()), **kwargs):
  """The processes of one run, which find each other on this machine; each may have own flags."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  flags = (f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}')
  return [
    start(workdir, *overrides, *flags, *own[i], f'--process_id={i}', devices=devices, **kwargs)
    for i in range(count)
  ]


def finish_together(group):
  """Waits for the processes of one run; none survives a failure of another."""
  try:
    return [finish(process) for process in group]
  finally:
    for process in group:
      process.kill()


def wait_for(condition, process, seconds=120):
  """Polls, without sleeping long, until `condition` holds or the process ends."""
  deadline = time.monotonic() + seconds
  while not condition() and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.002)
