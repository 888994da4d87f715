"""Which settings of a configuration something depends on: those that it reads."""

from collections.abc import Callable
from typing import Any

import ml_collections


def read_keys(build: Callable[[Any], Any], config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The dotted names of the settings that `build(config)` reads, such as 'sampling.eta'.

  So a guard against mixing results needs no list of what each method reads, and holds for methods
  that users register. A setting counts as read if its value is asked for, or that of a section as a
  whole (`config.sampling.to_dict()`); also one that is not there, asked for by `get` or `in`.

  Args:
    build: makes, and traces if it may read later, what the results depend on.
    config: what it reads.

  Returns:
    The names in alphabetical order.
  """
  names: set[str] = set()
  build(_View(config, '', names))
  return tuple(sorted(names))


class _View:
  """A configuration, or a section of it, that notes which of its leaves are read."""

  def __init__(self, content: ml_collections.ConfigDict, prefix: str, names: set[str]):
    self._content, self._prefix, self._names = content, prefix, names

  @property
  def __class__(self) -> type:
    """It passes for what it shows, wherever a type is checked."""
    return type(self._content)

  def __getitem__(self, key: str) -> Any:
    value = self._content[key]
    if isinstance(value, ml_collections.ConfigDict):
      return _View(value, f'{self._prefix}{key}.', self._names)
    self._names.add(self._prefix + key)
    return value

  def get(self, key: str, default: Any = None) -> Any:
    if key not in self:
      return default
    return self[key]

  def __contains__(self, key: str) -> bool:
    if not isinstance(self._content.get(key), ml_collections.ConfigDict):
      self._names.add(self._prefix + key)
    return key in self._content

  def __getattr__(self, name: str) -> Any:
    if name in self._content:
      return self[name]
    self._read_all()
    return getattr(self._content, name)  # `items`, `to_dict` and the like

  def __iter__(self) -> Any:
    self._read_all()
    return iter(self._content)

  def _read_all(self) -> None:
    for key in self._content:
      if isinstance(value := self[key], _View):
        value._read_all()

  def __reduce_ex__(self, protocol: int) -> Any:
    """A copy is the plain configuration, of which all may be read."""
    self._read_all()
    return self._content.__reduce_ex__(protocol)
