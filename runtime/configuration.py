"""Configurations: their keys and types, and how they are written, compared and shown."""

import difflib
import json
import reprlib
import runpy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.defaults import get_default_configs
from runtime.errors import UserError

# Keys of the 2021 configurations that nothing reads, and the one value that each may have: any
# other value would be ignored silently.
LEGACY: dict[str, Callable[[Any], Any]] = {
  'model.attention_type': lambda config: 'ddpm',
  'model.conv_size': lambda config: 3,
  'model.interpolation': lambda config: 'bilinear',
  'model.sigma_begin': lambda config: config.model.sigma_max,
  'optim.amsgrad': lambda config: False,
  'training.loss': lambda config: config.training.sde,
}


# What the numbers of a setting must stay below: a whole one in 64 bits, others in single precision.
_LARGEST = {int: 2**63, float: 1e38}


def read_file(path: str, argument: str = '') -> ConfigDict:
  """The result of `get_config()`, or `get_config(argument)`, of a configuration file.

  Raises:
    UserError: if the file has no such function, or exits, as a program does.
  """
  try:
    get_config = runpy.run_path(path).get('get_config')
  except SystemExit as error:
    raise UserError(f'{path} exits ({error}): name a configuration file, not a program.') from error
  if get_config is None:
    raise UserError(f'{path} has no function get_config(): define one that returns a ConfigDict.')
  try:
    return get_config(argument) if argument else get_config()
  except TypeError as error:
    raise UserError(
      f'{path}: {error}; write {path}:argument, or leave the argument out.'
    ) from error


def complete(config: ConfigDict, extra: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
  """The configuration with absent keys set to their defaults and all keys and types checked.

  Args:
    config: the result of a configuration file's `get_config()`.
    extra: the keys that are allowed beside the common ones, by section, each with an example of its
      value; None allows a value of any type.

  Raises:
    UserError: if a section or key is unknown, or a value has the wrong type.
  """
  filled = get_default_configs()
  with filled.unlocked():
    for section, values in _without_legacy(config).items():
      if section not in filled:
        raise UserError(_unknown('section', section, filled.keys()))
      if isinstance(values, ConfigDict) != isinstance(filled[section], ConfigDict):
        kinds = 'a section of keys', 'a single value'
        is_section = isinstance(values, ConfigDict)
        raise UserError(
          f'config.{section}={values!r} is {kinds[not is_section]}: set it to {kinds[is_section]}.'
        )
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


def override(
  config: ConfigDict, section: str, values: Mapping[str, Any], fixed: Iterable[str] = ()
) -> ConfigDict:
  """A copy of a complete configuration with other values in one section, but for the `fixed` keys.

  Raises:
    UserError: if a key is unknown or fixed, or a value has the wrong type.
  """
  changed = config.copy_and_resolve_references()
  known = set(config[section]) - set(fixed)
  with changed.unlocked():
    for key, value in values.items():
      if key not in known:
        raise UserError(_unknown(f'config.{section} key', key, known))
      _check_type(f'{section}.{key}', value, config[section][key])
      changed[section][key] = value
  return changed


def look_up(config: ConfigDict, section: str, key: str, default: Any) -> Any:
  """The value of a key in a configuration that may lack it, or have no such section of keys."""
  values = config.get(section)
  return values.get(key, default) if isinstance(values, ConfigDict) else default


def _without_legacy(config: ConfigDict) -> ConfigDict:
  """The configuration without the keys of the 2021 code that nothing reads.

  Raises:
    UserError: if such a key has a value that would be ignored.
  """
  config = config.copy_and_resolve_references()
  config.unlock()
  if 'device' in config:  # JAX uses all devices
    del config['device']
  for name, meant in LEGACY.items():
    section, key = name.split('.')
    values = config.get(section)
    if not isinstance(values, ConfigDict) or key not in values:
      continue
    value = values[key]
    del values[key]
    if value != meant(config):
      raise UserError(
        f'config.{name}={value!r} is not supported, only {meant(config)!r} is: remove the key or '
        f'set that value.'
      )
  return config


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
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
  numbers = value if isinstance(value, (tuple, list)) else [value]
  for number in numbers:
    limit = _LARGEST.get(type(number))
    if limit and not -limit < number < limit:  # the comparison is false for NaN
      raise UserError(
        f'config.{name}={reprlib.repr(value)} is beyond the range of a number: set it to one such '
        f'as {example!r}.'
      )


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """The values of a configuration by dotted name, such as 'optim.lr', as JSON stores them."""
  flat = {}
  for key, value in json.loads(json.dumps(plain(config))).items():
    if isinstance(value, dict):
      flat |= {f'{key}.{name}': leaf for name, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`: nested dictionaries from values by dotted name."""
  nested: dict[str, Any] = {}
  for name, value in flat.items():
    *sections, key = name.split('.')
    section = nested
    for part in sections:
      section = section.setdefault(part, {})
    section[key] = value
  return nested


def plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """A configuration, or the content of a `config.json`, as nested dictionaries."""
  return config.to_dict() if isinstance(config, ConfigDict) else config


def differences(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  guarded: Callable[[str], bool] = lambda name: True,
) -> str:
  """Lists the guarded settings that differ between two flat configurations, for a message.

  Settings that only one of the two has are listed only if no other differs: another sampler, say,
  reads other settings, and its own name then tells more. A setting that did not exist when the old
  ones were recorded had the effect of its common default.

  Args:
    old: the recorded settings.
    new: the settings of this run.
    guarded: whether the setting of a name counts.

  Returns:
    Each differing setting with both values; '' if none differs.
  """
  defaults = flatten(get_default_configs())
  old = {name: defaults[name] for name in new if name in defaults} | dict(old)
  names = sorted(name for name in old.keys() | new.keys() if guarded(name))
  differing = [name for name in names if old.get(name) != new.get(name)]
  both = [name for name in differing if name in old and name in new]
  return ', '.join(
    f'{name} (was {old.get(name)!r}, is {new.get(name)!r})' for name in both or differing
  )
