"""One function for each mode of the program: checks the configuration and hands it to the mode."""

import pathlib

from ml_collections import ConfigDict

from modes import convert
from modes import evaluate as evaluate_mode
from modes import sample as sample_mode
from modes import stats as stats_mode
from modes import train as train_mode
from modes import train_classifier as classifier_mode
from modes.preparation import prepare
from modes.training_loop import NonFiniteLoss
from runtime import reporting
from train_state import State

__all__ = [
  'NonFiniteLoss',
  'evaluate',
  'export_checkpoint',
  'import_checkpoint',
  'make_stats',
  'sample',
  'train',
  'train_classifier',
]


def _start(config: ConfigDict, workdir: str | pathlib.Path = '') -> tuple[ConfigDict, pathlib.Path]:
  """What every mode starts with: a console log, a checked configuration, a path."""
  reporting.log_to_console()
  return prepare(config), pathlib.Path(workdir).expanduser()


def train(config: ConfigDict, workdir: str | pathlib.Path) -> None:
  """Trains the configured network, or resumes its training.

  Leaves in `workdir`: `checkpoints/` (every `training.snapshot_freq` steps, all kept),
  `checkpoints-meta/` (the latest states, where the same command resumes), `samples/`,
  `metrics.jsonl`, `tensorboard/`, `config.json`, `data.json`, `versions.json` and `stdout.txt`.

  Every batch and every random number is a function of the seed and the step, so a run that was
  killed resumes to the same bits.

  Raises:
    UserError: a configuration or data that are wrong or contradict the run in `workdir`, or another
      process that is at work there.
    NonFiniteLoss: the loss is NaN or infinite.
  """
  train_mode.train(*_start(config, workdir))


def sample(
  config: ConfigDict, workdir: str | pathlib.Path, checkpoint_number: int | None = None
) -> None:
  """Draws `sampling.num_samples` images with the EMA parameters, under `sampling.task`.

  Leaves them in `samples/<task>_<method>_step_<S>_seed_<seed>/`, as `modes.sample` describes.

  Args:
    config: the configuration of the run.
    workdir: its directory.
    checkpoint_number: which of `checkpoints/` to take; by default the newest state.

  Raises:
    UserError: a wrong configuration, or a checkpoint that does not exist.
  """
  sample_mode.sample(*_start(config, workdir), checkpoint_number)


def evaluate(config: ConfigDict, workdir: str | pathlib.Path, eval_folder: str = 'eval') -> None:
  """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt` with their EMA parameters.

  Leaves in `workdir/eval_folder`: `report.json` and `report.csv`, and what they are made from, as
  `modes.evaluate` describes. The same command resumes an evaluation that was killed, to the same
  numbers.

  Raises:
    UserError: a wrong configuration, what cannot be read or written, or a checkpoint that does not
      exist.
  """
  evaluate_mode.evaluate(*_start(config, workdir), eval_folder)


def make_stats(config: ConfigDict) -> None:
  """Makes the statistics of a data set that samples are compared with, and measures `sigma_max`.

  Raises:
    UserError: as `modes.stats.write_stats`.
  """
  stats_mode.write_stats(_start(config)[0])


def train_classifier(config: ConfigDict, workdir: str | pathlib.Path) -> None:
  """Trains, or resumes training, the classifier of `config.classifier` on `config.data`.

  Leaves in `workdir` what `train` does, but for the samples, and at the end
  `classifier.safetensors`: the EMA parameters, with all that is needed to use them. A run that was
  killed resumes to the same bits.

  Raises:
    UserError: a configuration or data that are wrong or contradict the run in `workdir`, or labels
      that do not fit.
    NonFiniteLoss: the loss is NaN or infinite.
  """
  classifier_mode.train_classifier(*_start(config, workdir))


def import_checkpoint(
  config: ConfigDict, workdir: str | pathlib.Path, checkpoint: str | None
) -> State:
  """Makes a published checkpoint file the state of a new run in `workdir`.

  The run can then be evaluated, or its training resumed. The checkpoint gets the number that a run
  of ours would have given it: step / `training.snapshot_freq`, rounded up.

  Args:
    config: of the network and training that the file is from.
    workdir: of the run; must hold no checkpoints.
    checkpoint: the file.

  Raises:
    UserError: a file that is damaged, of no known format, or does not fit the configuration; a
      working directory with checkpoints. The directory is then as it was.
  """
  return convert.import_checkpoint(*_start(config, workdir), checkpoint)


def export_checkpoint(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  checkpoint: str | None = None,
  number: int | None = None,
) -> pathlib.Path:
  """Writes the EMA weights of a run as safetensors, with step and configuration as metadata.

  Tensors are named as in the variables of the Flax module: 'params/Conv_0/kernel'.

  Args:
    config: of the run.
    workdir: of the run.
    checkpoint: the file to write; by default `export_<step>.safetensors` in `workdir`.
    number: of the checkpoint; by default the newest state there is.

  Returns:
    The file.

  Raises:
    UserError: no such checkpoint, a configuration of another run, a file that exists.
  """
  return convert.export_checkpoint(*_start(config, workdir), checkpoint, number)
