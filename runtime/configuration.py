"""Configurations: their keys and types, and how they are written, compared and shown."""

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.defaults import get_default_configs
from runtime.errors import UserError

# Keys of the reference's configurations that nothing reads, and the one value that they may have:
# any other would be ignored without a word.
LEGACY: dict[str, Callable[[Any], Any]] = {
  'model.attention_type': lambda config: 'ddpm',
  'model.conv_size': lambda config: 3,
  'model.interpolation': lambda config: 'bilinear',
  'model.sigma_begin': lambda config: config.model.sigma_max,
  'optim.amsgrad': lambda config: False,
  'training.loss': lambda config: config.training.sde,
}


def complete(config: ConfigDict, extra: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
  """The configuration with its absent keys filled in, and its keys and types checked.

  Args:
    config: as a configuration file made it.
    extra: keys beside the common ones, by section, each with an example of its value (None: any).

  Raises:
    UserError: one sentence on the first key or type that is wrong.
  """
  filled = get_default_configs()
  with filled.unlocked():
    for section, values in _without_legacy(config).items():
      if section not in filled:
        raise UserError(_unknown('section', section, filled.keys()))
      if isinstance(values, ConfigDict) != isinstance(filled[section], ConfigDict):
        raise UserError(f'config.{section}={values!r} is not what belongs there.')
      if not isinstance(values, ConfigDict):
        _check_type(section, values, filled[section])
        filled[section] = values
        continue
      known = {**extra.get(section, {}), **filled[section]}
      for key, value in values.items():
        if key not in known:
          raise UserError(_unknown(f'config.{section} key', key, known))
        if known[key] is not None:
          _check_type(f'{section}.{key}', value, known[key])
        filled[section][key] = value
  return filled


def _without_legacy(config: ConfigDict) -> ConfigDict:
  """The configuration without the keys of the reference that nothing reads.

  Raises:
    UserError: if one has a value that would be ignored.
  """
  config = config.copy_and_resolve_references()
  config.unlock()
  if 'device' in config:  # JAX uses all devices that there are
    del config['device']
  for name, meant in LEGACY.items():
    section, key = name.split('.')
    if key not in config.get(section, {}):
      continue
    value = config[section][key]
    del config[section][key]
    if value != meant(config):
      raise UserError(
        f'config.{name}={value!r} is read by nothing, so it must be {meant(config)!r}, which is '
        f'what happens: remove it or set it to that.'
      )
  return config


def _unknown(what: str, name: str, known: Any) -> str:
  close = difflib.get_close_matches(name, known, n=1)
  hint = f' Did you mean {close[0]}?' if close else ''
  return f'Unknown {what} {name!r}: choose one of {", ".join(sorted(known))}.{hint}'


def _check_type(name: str, value: Any, example: Any) -> None:
  allowed = type(example)
  if allowed is float:
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
  elif allowed in (tuple, list):
    right = isinstance(value, (tuple, list))
  else:
    right = isinstance(value, allowed) and isinstance(value, bool) == (allowed is bool)
  if not right:
    raise UserError(
      f'config.{name}={value!r} is of type {type(value).__name__}; it must be of type '
      f'{allowed.__name__}, such as {example!r}.'
    )


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """Leaves by dotted name, as JSON stores them."""
  flat = {}
  for key, value in json.loads(json.dumps(plain(config))).items():
    if isinstance(value, dict):
      flat |= {f'{key}.{name}': leaf for name, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """A configuration, or what has been read from `config.json`, as nested dictionaries."""
  return config.to_dict() if isinstance(config, ConfigDict) else config


def differences(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  guarded: Callable[[str], bool] = lambda name: True,
) -> str:
  """The guarded settings that differ between two flat configurations, for a message.

  What only one of them has is named if that is all: another method has other settings.

  Args:
    old: as recorded.
    new: as they are now.
    guarded: whether a setting counts.

  Returns:
    Each with both values; '' if none differs.
  """
  names = sorted(name for name in old.keys() | new.keys() if guarded(name))
  differing = [name for name in names if old.get(name) != new.get(name)]
  both = [name for name in differing if name in old and name in new]
  return ', '.join(
    f'{name} (was {old.get(name)!r}, is {new.get(name)!r})' for name in both or differing
  )
