"""Opens a trained network, whatever it is stored as."""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from formats import export
from models.utils import create_model
from modes.convert import read_weights
from modes.loading import load_weights
from modes.preparation import prepare
from runtime import configuration, parallelism
from runtime import workdir as workdirs
from runtime.errors import UserError
from runtime.files import locate
from score_sde.trained_model import TrainedModel

Source = str | pathlib.Path | ConfigDict | Mapping[str, Any]


def load(
  path: str | pathlib.Path,
  *,
  checkpoint_number: int | None = None,
  config: Source | None = None,
) -> TrainedModel:
  """Opens a trained network with its EMA parameters.

  Args:
    path: the directory of a run, or a file: an export, or a published checkpoint (Flax of 2021,
      `.pth` of the PyTorch port), which needs a `config`. A path that does not exist is looked for
      in the repository.
    checkpoint_number: which of a run's `checkpoints/`; by default its newest state.
    config: what the network was trained with, see `load_config`. A run and an export bring theirs.

  Raises:
    UserError: if nothing is there, it is damaged, or it does not fit the configuration.
  """
  path = _existing(path)
  settings = _read(path if config is None else config)
  with settings.unlocked():
    settings.parallel = {'fsdp': 1, 'spatial': 1}  # the devices of the training may not be here
  settings = prepare(settings)
  if path.is_dir():
    return TrainedModel(settings, *load_weights(settings, path, checkpoint_number))
  if checkpoint_number is not None:
    raise UserError(
      f'checkpoint_number={checkpoint_number} chooses among the checkpoints of a run, but {path} '
      f'is a file: leave it out.'
    )
  state = parallelism.replicate(read_weights(settings, path))
  return TrainedModel(settings, create_model(settings), state)


def load_config(source: Source) -> ConfigDict:
  """A configuration, complete and checked.

  Args:
    source: a configuration file, such as 'configs/vp/mnist_ddpmpp_continuous.py' or
      'file.py:argument'; the directory of a run; an export; or a configuration.

  Raises:
    UserError: if there is no configuration, or for the first key or value that is wrong.
  """
  return prepare(_read(source))


def _read(source: Source) -> ConfigDict:
  """The configuration as written."""
  if not isinstance(source, str | pathlib.Path):
    return ConfigDict(source).copy_and_resolve_references()
  name, _, argument = str(source).partition('.py:')
  if argument:
    return configuration.read_file(str(_existing(f'{name}.py')), argument)
  path = _existing(source)
  if path.suffix == '.py':
    return configuration.read_file(str(path))
  if not path.is_dir():
    return _config_of(path, _of_export(path))
  recorded = workdirs.read_config(path)
  if recorded is None:
    raise UserError(
      f'{path} has no config.json: name the directory of a run, or give the configuration that it '
      f'was trained with as config=.'
    )
  return _config_of(path, configuration.flatten(recorded))


def _config_of(path: pathlib.Path, flat: Mapping[str, Any]) -> ConfigDict:
  try:
    return ConfigDict(configuration.unflatten(flat))
  except (TypeError, ValueError, AttributeError) as error:
    raise UserError(
      f'The configuration in {path} is damaged ({error}): give it as config=.'
    ) from error


def _of_export(path: pathlib.Path) -> dict[str, Any]:
  recorded = export.read_config(path)
  if recorded is None:
    raise UserError(
      f'{path} does not record a configuration, as exports do: give the one that it was trained '
      f"with, such as config='configs/ve/cifar10_ncsnpp_continuous.py'."
    )
  return recorded


def _existing(path: str | pathlib.Path) -> pathlib.Path:
  found = locate(path)
  if not found.exists():
    raise UserError(f'{found} does not exist: name the directory of a run or a file.')
  return found
