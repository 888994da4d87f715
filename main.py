"""Trains, evaluates and converts score models; `python main.py --help` lists the flags."""

import logging as python_logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs.defaults import get_default_configs
from runtime import completion, configuration, startup, stuck
from runtime.errors import Exit, UserError

if TYPE_CHECKING:
  from runtime.peers import Peers

_GRACE_SECONDS = 4.0

try:
  _CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'Configuration file, such as configs/vp/mnist_ddpmpp_continuous.py; file.py:argument if its '
    'get_config takes an argument. Any field can be overridden: --config.training.batch_size=64.',
  )
except flags.Error as error:  # a --flagfile is read at once
  sys.exit(str(error))
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Directory of the run: checkpoints, samples, logs. The same one resumes a run. --mode=report '
  'takes several, with commas between them.',
)
_MODE = flags.DEFINE_enum(
  'mode',
  None,
  [
    'train',
    'sample',
    'eval',
    'stats',
    'prepare_data',
    'inspect_data',
    'train_classifier',
    'import',
    'export',
    'report',
  ],
  'train: train, or resume the training in --workdir where it stopped. '
  'sample: draw images from the run in --workdir, as config.sampling says; '
  'config.sampling.task=inpaint, colorize, superres or class sets the conditioning. '
  'eval: evaluate the checkpoints of the run in --workdir. '
  'stats: compute the statistics of the data with which eval compares samples; needs no '
  '--workdir. '
  'inspect_data: show in --workdir what the network will see of the data, and print the settings '
  'that fit them. '
  'prepare_data: download the data set if a program can, convert it to the cache in '
  'data.cache_dir and verify it; needs no --workdir. '
  'train_classifier: train, or resume training, the noise-conditional classifier. '
  'import: start the run in --workdir from a published checkpoint, --checkpoint. '
  'export: write the EMA weights of the run in --workdir as safetensors. '
  'report: write an HTML page about the runs in --workdir; needs no --config.',
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
  'The checkpoint that --mode=sample or export uses: N of checkpoints/checkpoint_N. Default: the '
  'newest.',
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'float16'],
  'The type in which --mode=export stores the weights. float16 halves the file and rounds them.',
)
_REPORT = flags.DEFINE_string(
  'report', None, 'The page that --mode=report writes (default: report.html in --workdir).'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'For a run of several processes: host:port of the first one, or auto, which asks Slurm, Open MPI '
  'or the Cloud TPU for it and for the next two flags.',
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of processes of the run.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')


_COMPLETION = flags.DEFINE_enum(
  'completion',
  None,
  [*completion.SCRIPTS, 'keys'],
  'Print the script with which a shell completes the flags of this program, to be loaded by '
  'eval "$(python main.py --completion=bash)"; or the keys of --config.',
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run',
  False,
  'Only check the configuration and print it, what the command line changed in it, the devices, '
  'the size of the network and its floating point operations. Nothing is written or compiled.',
)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake that `ml_collections` reports by traceback is a sentence."""
  path, argument, given = '', '', {}
  try:
    given = _given(flags.FLAGS.read_flags_from_files(argv[1:]))
    path, _, argument = given.get('config', '').partition(':')
    if path and not os.path.isfile(path):
      sys.exit(f'--config={path} does not exist: name a file such as those in configs/vp/.')
    if wanted := given.get('completion'):
      _complete(wanted, path, argument)
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError) as error:
    sys.exit(_explain(path, argument, given) or f'{error} (main.py --help lists the flags.)')


def _complete(wanted: str, path: str, argument: str) -> None:
  """Prints what `--completion` asks for, and ends the program; the flag refuses other values."""
  if wanted == 'keys':
    config = configuration.read_file(path, argument) if path else get_default_configs()
    print('\n'.join(f'--config.{name}=' for name in configuration.flatten(config)))
    sys.exit()
  if wanted in completion.SCRIPTS:
    print(completion.script(wanted, flags.FLAGS.get_key_flags_for_module(sys.argv[0])))
    sys.exit()


def _given(arguments: list[str]) -> dict[str, str]:
  """The flags of a command line by name, written as `--a=b`, `-a=b` or `--a b`.

  Raises:
    flags.Error: if it names two configurations.
  """
  given = {}
  for argument, following in zip(arguments, [*arguments[1:], ''], strict=True):
    name, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-'):
      value = value if equals else following
      if name == 'config' and name in given:
        raise flags.Error(f'--config is given twice, as {given[name]} and {value}: name one file.')
      given[name] = value
  return given


def _explain(path: str, argument: str, given: dict[str, str]) -> str:
  """The mistake in a configuration file or in the overrides of it; '' if none is found."""
  if not path:
    return ''
  try:
    config = configuration.read_file(path, argument)
  except UserError as error:
    return f'--config={error}'
  return _unknown_override(config, given)


def _unknown_override(config: ConfigDict, given: dict[str, str]) -> str:
  """The first override `--config.x.y` that the configuration does not have; '' if it has all."""
  for name in given:
    section, (prefix, *keys) = config, name.split('.')
    for depth, key in enumerate(keys if prefix == 'config' else []):
      where = '.'.join(['config', *keys[:depth]])
      if not hasattr(section, 'keys'):
        return f'--{name}: {where} is a value, not a section; set it as --{where}=...'
      if key not in section:
        return f'Unknown {where} key {key!r}: choose one of {", ".join(sorted(section))}.'
      section = section[key]
    if prefix == 'config' and keys and hasattr(section, 'keys'):
      return f'--{name} is a section: set one of {", ".join(sorted(section))} in it.'
  return ''


def main(argv: list[str]) -> None:
  """Runs the mode of the parsed flags; a `UserError` ends the program with its message."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument {argv[1]!r}: all arguments are flags.')
  peers = None
  stuck.handle(startup.ending_signals(), _interrupt, lambda number: _stop(number, peers))
  sys.unraisablehook = startup.unraisable
  try:
    if _MODE.value == 'report':
      _write_report()
      return
    peers = startup.start_jax(
      _CONFIG.value,
      coordinator=_COORDINATOR.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
    )
    if _DRY_RUN.value:
      print(_dry_run())
    else:
      _modes(_CONFIG.value, _WORKDIR.value)[_MODE.value]()
  except KeyboardInterrupt as interrupt:
    _ignore_signals()
    _stop(interrupt.args[0] if interrupt.args else signal.SIGINT, peers)
  except Exception as error:
    if flags.FLAGS.pdb_post_mortem:
      raise
    _ignore_signals()
    status, message = _explained(error)
    if peers and status in (Exit.FAULT, Exit.STORAGE):
      peers.await_loss()  # of which this error may be a consequence
    _say_last(message)
    _end(status, peers)
  if peers:
    peers.leave()


def _dry_run() -> str:
  """The text of `--dry_run`."""
  import run_lib

  given = _given(flags.FLAGS.read_flags_from_files(sys.argv[1:]))
  path, _, argument = given['config'].partition(':')
  return run_lib.dry_run(
    _CONFIG.value,
    _WORKDIR.value or '',
    mode=_MODE.value,
    written=configuration.read_file(path, argument),
    eval_folder=_EVAL_FOLDER.value,
    checkpoint=_CHECKPOINT.value,
    number=_CHECKPOINT_NUMBER.value,
  )


def _ignore_signals() -> None:
  """Lets no second signal interrupt the end of the program, which takes seconds at most."""
  for number in startup.ending_signals():
    signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: Any) -> None:
  raise KeyboardInterrupt(number)


def _modes(config: ConfigDict, workdir: str) -> dict[str, Callable[[], object]]:
  """What each mode runs, except for `report`."""
  # Imported here so that --help and a misspelt flag are answered at once.
  import run_lib

  number, checkpoint = _CHECKPOINT_NUMBER.value, _CHECKPOINT.value
  return {
    'train': lambda: run_lib.train(config, workdir),
    'sample': lambda: run_lib.sample(config, workdir, number),
    'eval': lambda: run_lib.evaluate(config, workdir, _EVAL_FOLDER.value),
    'stats': lambda: run_lib.make_stats(config),
    'inspect_data': lambda: run_lib.inspect_data(config, workdir),
    'prepare_data': lambda: run_lib.prepare_data(config),
    'train_classifier': lambda: run_lib.train_classifier(config, workdir),
    'import': lambda: run_lib.import_checkpoint(config, workdir, checkpoint),
    'export': lambda: run_lib.export_checkpoint(
      config, workdir, checkpoint=checkpoint, number=number, dtype=_DTYPE.value
    ),
  }


def _write_report() -> None:
  """Runs `--mode=report`, which needs neither JAX nor a device: it starts without them.

  Raises:
    UserError: the runs cannot be read, or the page cannot be written.
  """
  if _DRY_RUN.value:
    raise UserError('--mode=report computes nothing that --dry_run could spare: leave it out.')
  from modes import report
  from report.page import Recipe

  recipe = None
  if _CONFIG.value is not None:
    recipe = Recipe(config_flags.get_config_filename(flags.FLAGS['config']), _CONFIG.value)
  path = report.make_report(report.split_workdirs(_WORKDIR.value), _REPORT.value, recipe)
  print(f'{path}: {path.stat().st_size / 1e6:.1f} MB, open it in a browser.')


def _explained(error: Exception) -> tuple[int, str]:
  """What the program exits with after an error, and what it says: a traceback if it is a fault."""
  ours = f'{type(error).__name__}: {error}'
  if isinstance(error, UserError):
    return error.status, ours
  if isinstance(error, FloatingPointError):
    return Exit.NOT_FINITE, ours
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
    return Exit.MEMORY, (
      f'OutOfMemory: {_first_line(error)} Lower the batch size of the mode '
      f'(training.batch_size, sampling.batch_size, eval.batch_size) or, to train, set '
      f'model.remat=True or training.grad_accum_steps.'
    )
  if isinstance(error, OSError):
    where = f': {error.filename}' if error.filename else ''
    return Exit.STORAGE, (
      f'OSError: {error.strerror or error}{where}. The files written before are intact; fix the '
      f'cause and rerun the same command, which resumes.'
    )
  return Exit.FAULT, traceback.format_exc()


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or ['no memory is left.'])[0]


def _stop(number: int, peers: 'Peers | None') -> NoReturn:
  from runtime.preemption import to_resume

  _say_last(f'Stopped by a signal; the files written before are intact. {to_resume()}')
  _end(128 + number, peers)


def _end(status: int, peers: 'Peers | None') -> NoReturn:
  """Ends the program after a failure, soon, whatever threads still wait for a save or for data."""
  if peers:
    peers.fail(status)
  deadline = threading.Timer(_GRACE_SECONDS, os._exit, [status])
  deadline.daemon = True
  deadline.start()
  sys.exit(status)


def _say_last(message: str) -> None:
  logging.get_absl_handler().flush()
  # A save that failed in the background may still log: the sentence comes last, in one write.
  python_logging.disable(python_logging.CRITICAL)
  sys.stderr.write(f'{message}\n')
  sys.stderr.flush()
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stderr__.fileno())  # nor do other threads


if __name__ == '__main__':
  startup.restart_with_settings()
  startup.keep_compiled_programs()
  flags.mark_flag_as_required('mode')
  flags.register_multi_flags_validator(
    ['config', 'mode'],
    lambda given: given['config'] is not None or given['mode'] in (None, 'report'),
    'Flag --config must name a configuration file, such as those in configs/vp/.',
  )
  flags.register_multi_flags_validator(
    ['workdir', 'mode'],
    lambda given: bool(given['workdir']) or given['mode'] in ('stats', 'prepare_data'),
    'Flag --workdir must name a directory.',
  )
  try:
    try:
      app.run(main, flags_parser=parse_flags)
    finally:
      sys.stdout.flush()
  except BrokenPipeError:  # nobody reads on, as in main.py --help | head
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
