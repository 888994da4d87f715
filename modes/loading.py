"""Loads the trained network of a run, for the modes that use one."""

import pathlib

import flax.linen as nn
from absl import logging
from ml_collections import ConfigDict

import train_state
from runtime import workdir as workdirs
from train_state import State


def check_weights(config: ConfigDict, workdir: pathlib.Path, number: int | None) -> None:
  """Refuses what `load_weights` would refuse, but reads no weights."""
  workdirs.check_run(config, workdir, workdirs.of_model)
  workdirs.check_state(workdir, number)


def load_weights(
  config: ConfigDict, workdir: pathlib.Path, number: int | None = None
) -> tuple[nn.Module, State]:
  """The network of the run in `workdir` and a saved state that has only the EMA parameters.

  Args:
    config: the configuration of the run.
    workdir: its directory.
    number: which of `checkpoints/`; by default the newest state.

  Raises:
    UserError: if the state does not exist, or the run has another configuration.
  """
  if workdirs.read_config(workdir) is None:
    logging.warning(
      '%s has no config.json: the configuration cannot be compared with that of the run.', workdir
    )
  check_weights(config, workdir, number)
  model, like = train_state.abstract_state(config)
  return model, workdirs.load_state(workdir, train_state.weights_only(like), number)
