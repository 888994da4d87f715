"""Trains, evaluates and converts score models; `python main.py --help` lists the flags."""

import os
import pathlib
import platform
import runpy
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Configuration file, such as configs/vp/mnist_ddpmpp_continuous.py. Any field can be overridden: '
  '--config.training.batch_size=64.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run: checkpoints, samples, logs. The same one continues a run.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  None,
  ['train', 'sample', 'eval', 'stats', 'train_classifier', 'import', 'export'],
  'train: train, or go on training where the run in --workdir stopped. '
  'sample: draw images from the run in --workdir, as config.sampling says; with '
  'config.sampling.task=inpaint, colorize, superres or class under a condition. '
  'eval: evaluate the checkpoints of the run in --workdir. '
  'stats: make the statistics of the data that eval compares samples with; needs no --workdir. '
  'train_classifier: train, or go on training, the noise-conditional classifier. '
  'import: start the run in --workdir from a published checkpoint, --checkpoint. '
  'export: write the EMA weights of the run in --workdir as safetensors.',
)
_EVAL_FOLDER = flags.DEFINE_string(
  'eval_folder', 'eval', 'Folder inside --workdir that the results of --mode=eval go to.'
)
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'The file that --mode=import reads (Flax of 2021, .pth of the PyTorch port, an export), or that '
  '--mode=export writes (default: export_<step>.safetensors in --workdir).',
)
_CHECKPOINT_NUMBER = flags.DEFINE_integer(
  'checkpoint_number',
  None,
  'The checkpoint that --mode=sample or export takes: N of checkpoints/checkpoint_N. Default: the '
  'newest.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'host:port of the first process, for a run of several processes.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of processes of the run.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; what `ml_collections` reports by traceback becomes a sentence."""
  options = dict(argument.lstrip('-').partition('=')[::2] for argument in argv[1:])
  path = options.get('config', '')
  if path and not os.path.isfile(path):
    sys.exit(f'--config={path} does not exist: give a file such as configs/vp/*.py.')
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError):
    sys.exit(_unknown_override(path, options))


def _unknown_override(path: str, options: dict[str, str]) -> str:
  """Names the first `--config.x.y` that the configuration file does not have."""
  for option in options:
    section = runpy.run_path(path)['get_config']()
    prefix, *keys = option.split('.')
    for depth, key in enumerate(keys if prefix == 'config' else []):
      if key not in section:
        where = '.'.join(['config', *keys[:depth]])
        return f'Unknown {where} key {key!r}: choose one of {", ".join(sorted(section))}.'
      section = section[key]
  return 'A --config override does not fit the configuration file.'


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument {argv[1]!r}: all arguments are flags.')
  # Imported here so that --help and a misspelt flag answer at once.
  import jax

  import classifier_training
  import conversion
  import run_lib
  from errors import UserError

  if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_num_cpu_devices', _cpu_devices(_CONFIG.value))
  if _COORDINATOR.value is not None:
    jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  try:
    config, workdir, checkpoint = _CONFIG.value, _WORKDIR.value, _CHECKPOINT.value
    modes = {
      'train': lambda: run_lib.train(config, workdir),
      'sample': lambda: run_lib.sample(config, workdir, _CHECKPOINT_NUMBER.value),
      'eval': lambda: run_lib.evaluate(config, workdir, _EVAL_FOLDER.value),
      'stats': lambda: run_lib.make_stats(config),
      'train_classifier': lambda: classifier_training.train_classifier(config, workdir),
      'import': lambda: conversion.import_checkpoint(config, workdir, checkpoint),
      'export': lambda: conversion.export_checkpoint(
        config, workdir, checkpoint, _CHECKPOINT_NUMBER.value
      ),
    }
    modes[_MODE.value]()
  except (UserError, FloatingPointError) as error:
    logging.get_absl_handler().flush()
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    sys.exit(1)


def _cpu_devices(config: Any) -> int:
  """How many devices JAX shall make of the CPU: one for each core, as batches and memory allow.

  XLA runs many convolutions on one core only, so that two devices of one core each train up to
  twice as fast as one device of two cores. Every device holds a copy of the training state, hence
  the limit. Processes of a run that has several of them may share a machine and take one each.
  """
  if _COORDINATOR.value is not None:
    return 1
  sections = ('training', 'eval', 'classifier', 'sampling')
  sizes = [config.get(section, {}).get('batch_size', 1) for section in sections]
  if not all(isinstance(size, int) for size in sizes):
    return 1  # the configuration is refused later, with a sentence
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return max(n for n in range(1, min(cores, 4) + 1) if not any(size % n for size in sizes))


def _keep_compiled_programs() -> None:
  """Lets JAX reuse what it compiled in an earlier run on this machine, unless told where to."""
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  directory = cache / 'score_sde' / f'xla-{platform.node()}'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(directory))


def _use_huge_pages() -> None:
  """Starts this program again with huge memory pages on, where the C library offers them.

  XLA takes and returns the memory of all activations in each call on CPU; with pages of 4 KiB that
  alone costs a fifth of a training step. The C library reads this setting only when it starts.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == '__main__':
  _use_huge_pages()
  _keep_compiled_programs()
  flags.mark_flags_as_required(['config', 'mode'])
  flags.register_multi_flags_validator(
    ['workdir', 'mode'],
    lambda given: given['workdir'] is not None or given['mode'] == 'stats',
    'Flag --workdir must have a value other than None.',
  )
  app.run(main, flags_parser=parse_flags)
