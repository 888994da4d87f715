"""One function for each mode of the program: it checks the configuration, then runs the mode."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from modes import convert
from modes import dry_run as dry_run_mode
from modes import evaluate as evaluate_mode
from modes import inspect_data as inspect_mode
from modes import prepare_data as prepare_data_mode
from modes import sample as sample_mode
from modes import stats as stats_mode
from modes import train as train_mode
from modes import train_classifier as classifier_mode
from modes.divergence import NonFiniteLoss
from modes.preparation import prepare
from runtime import configuration, reporting
from runtime import workdir as workdirs
from runtime.files import program_checksum
from train_state import State

if TYPE_CHECKING:
  from report.page import Recipe

__all__ = [
  'NonFiniteLoss',
  'dry_run',
  'evaluate',
  'export_checkpoint',
  'import_checkpoint',
  'inspect_data',
  'make_report',
  'make_stats',
  'prepare_data',
  'sample',
  'train',
  'train_classifier',
]


def _start(
  mode: str, config: ConfigDict, workdir: str | pathlib.Path = ''
) -> tuple[ConfigDict, pathlib.Path]:
  """Starts the console log; returns the checked configuration and the path."""
  reporting.log_to_console()
  config = prepare(config)
  if jax.process_count() > 1:
    flat = configuration.flatten(config)
    workdirs.check_processes(
      mode=mode,
      configuration={key: x for key, x in flat.items() if key not in workdirs.STORAGE},
      packages=workdirs.versions(),
      program=program_checksum(),
    )
  return config, pathlib.Path(workdir).expanduser()


def train(config: ConfigDict, workdir: str | pathlib.Path) -> None:
  """Trains the configured network, or resumes its training.

  It writes to `workdir`: `checkpoints/` (every `training.snapshot_freq` steps, all kept),
  `checkpoints-meta/` (the latest states, from which the same command resumes), `samples/`,
  `metrics.jsonl`, `tensorboard/`, `config.json`, `data.json`, `versions.json` and `stdout.txt`.

  Every batch and every random number is a function of the seed and the step, so a run that was
  killed resumes to the same bits.

  Args:
    config: the configuration.
    workdir: the directory of the run.

  Raises:
    UserError: the configuration or the data are wrong or contradict the run in `workdir`, or
      another process is writing there.
    NonFiniteLoss: the loss or the gradient is NaN or infinite, see `training.on_nonfinite`.
  """
  train_mode.train(*_start('train', config, workdir))


def sample(
  config: ConfigDict, workdir: str | pathlib.Path, checkpoint_number: int | None = None
) -> None:
  """Draws `sampling.num_samples` images with the EMA parameters, under `sampling.task`.

  It writes them to `samples/<task>_<method>_step_<S>_seed_<seed>/`, as `modes.sample` describes.

  Args:
    config: the configuration of the run.
    workdir: its directory.
    checkpoint_number: which of `checkpoints/` to use; by default the newest state.

  Raises:
    UserError: the configuration is wrong, or the checkpoint does not exist.
    FloatingPointError: a sample has a value that is NaN or infinite.
  """
  sample_mode.sample(*_start('sample', config, workdir), checkpoint_number)


def evaluate(config: ConfigDict, workdir: str | pathlib.Path, eval_folder: str = 'eval') -> None:
  """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt` with their EMA parameters.

  It writes to `workdir/eval_folder`: `report.json` and `report.csv`, and the results that they are
  computed from, as `modes.evaluate` describes. The same command resumes an evaluation that was
  killed, to the same numbers.

  Args:
    config: the configuration of the run.
    workdir: its directory.
    eval_folder: the folder inside it.

  Raises:
    UserError: the configuration is wrong, a checkpoint does not exist, or a file cannot be read or
      written.
    FloatingPointError: a result is NaN or infinite.
  """
  evaluate_mode.evaluate(*_start('eval', config, workdir), eval_folder)


def make_stats(config: ConfigDict) -> None:
  """Computes the statistics of a data set, with which samples are compared, and its `sigma_max`.

  Args:
    config: the configuration; `eval` and `data` are read.

  Raises:
    UserError: the configuration is wrong, the weights of the extractor or the data are missing, or
      the file cannot be written.
  """
  stats_mode.write_stats(_start('stats', config)[0])


def inspect_data(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Shows what a network will see of the configured data, before anything is trained on them.

  It writes to `workdir/data/`: `train.png` and `test.png`, grids of the first images;
  `augmented.png`, images as training sees them; and `report.json`, which it also logs and returns:
  the number of images and of skipped files, the range, mean and standard deviation of the scaled
  images, the number of images of each class, images per second, `sigma_max`, and the lines of a
  configuration for the VE and the VP SDE.

  Args:
    config: the configuration.
    workdir: the directory of a run, which need not exist.

  Raises:
    UserError: the configuration or the data are wrong, or the directory cannot be written to.
  """
  return inspect_mode.inspect_data(*_start('inspect_data', config, workdir))


def prepare_data(config: ConfigDict) -> None:
  """Downloads the configured data set if possible, converts it to the cache and verifies it.

  Args:
    config: the configuration, of which `data` is read.

  Raises:
    UserError: the configuration is wrong, or files are damaged, or missing and impossible to
      download by a program.
  """
  prepare_data_mode.prepare_data(_start('prepare_data', config)[0])


def train_classifier(config: ConfigDict, workdir: str | pathlib.Path) -> None:
  """Trains the classifier of `config.classifier` on `config.data`, or resumes its training.

  It writes to `workdir` the same files as `train`, except for samples, and at the end
  `classifier.safetensors`: the EMA parameters, with the metadata needed to use them. A run that was
  killed resumes to the same bits.

  Args:
    config: the configuration.
    workdir: the directory of the run.

  Raises:
    UserError: the configuration or the data are wrong or contradict the run in `workdir`, or the
      labels do not fit the classifier.
    NonFiniteLoss: the loss or the gradient is NaN or infinite, see `training.on_nonfinite`.
  """
  classifier_mode.train_classifier(*_start('train_classifier', config, workdir))


def dry_run(
  config: ConfigDict,
  workdir: str | pathlib.Path = '',
  *,
  mode: str = 'train',
  written: ConfigDict | None = None,
  eval_folder: str = 'eval',
  checkpoint: str | None = None,
  number: int | None = None,
) -> str:
  """What a mode would do, without writing or compiling anything.

  Args:
    config: the configuration.
    workdir: the directory of the run.
    mode: the name of the mode, as of `--mode`.
    written: the configuration as its file has it, with which `config` is compared.
    eval_folder: as of `evaluate`.
    checkpoint: as of `import_checkpoint` and `export_checkpoint`.
    number: the number of the checkpoint that the mode uses.

  Returns:
    A text: the complete configuration, what differs from the file, the devices, the number of
    parameters, the floating point operations and the memory of the training state.

  Raises:
    UserError: as the mode itself, except for what it would find in the data.
  """
  given = config.copy_and_resolve_references()
  config, workdir = _start('dry_run', config, workdir)
  request = dry_run_mode.Request(
    mode, workdir, given if written is None else written, eval_folder, checkpoint, number
  )
  return dry_run_mode.describe(config, request, given)


def import_checkpoint(
  config: ConfigDict, workdir: str | pathlib.Path, checkpoint: str | None
) -> State:
  """Starts a new run in `workdir` from a published checkpoint file, and returns its state.

  The run can then be evaluated, or its training resumed. The checkpoint gets the number that
  `train` would have given it: step / `training.snapshot_freq`, rounded up.

  Args:
    config: the configuration that the file was trained with.
    workdir: the directory of the run, which must hold no checkpoints.
    checkpoint: the file.

  Raises:
    UserError: the file is damaged, of no known format, or does not fit the configuration, or the
      directory has checkpoints. The directory is then unchanged.
  """
  return convert.import_checkpoint(*_start('import', config, workdir), checkpoint)


def export_checkpoint(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  *,
  checkpoint: str | None = None,
  number: int | None = None,
  dtype: str = 'float32',
) -> pathlib.Path:
  """Writes the EMA weights of a run as safetensors, with step and configuration as metadata.

  Tensors are named as in the variables of the Flax module: 'params/Conv_0/kernel'.

  Args:
    config: the configuration of the run.
    workdir: its directory.
    checkpoint: the file to write; by default `export_<step>.safetensors` in `workdir`.
    number: which of `checkpoints/` to export; by default the newest state.
    dtype: the type in which weights are stored. 'float16' halves the file; whatever reads it
      computes in the type of the network. Fourier frequencies stay in float32.

  Returns:
    The path of the file.

  Raises:
    UserError: the checkpoint does not exist, the run has another configuration, the file exists, a
      weight is too large for `dtype`, or `dtype` is neither 'float32' nor 'float16'.
  """
  return convert.export_checkpoint(
    *_start('export', config, workdir), checkpoint=checkpoint, number=number, dtype=dtype
  )


def make_report(
  workdirs: Sequence[str | pathlib.Path],
  path: str | pathlib.Path | None = None,
  recipe: 'Recipe | None' = None,
) -> pathlib.Path:
  """Writes an HTML page about runs, with curves, samples, evaluations, settings and the machine.

  The page is one file that fetches nothing. What several runs have in common is shown once, and
  their curves share their charts. Nothing else is written, so that a run may be in progress.

  Args:
    workdirs: the directories of the runs.
    path: the file; by default `report.html` in the first directory.
    recipe: a configuration to compare the runs with; by default the recorded overrides are shown.

  Returns:
    The path of the file.

  Raises:
    UserError: a directory does not exist or holds no run, or the file cannot be written.
  """
  from modes import report as report_mode  # here, since the other modes need no charts

  return report_mode.make_report(workdirs, path, recipe)
