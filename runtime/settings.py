"""Finds the settings of a configuration that a result depends on: those that are read for it."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict


def read_keys(build: Callable[[ConfigDict], Any], config: ConfigDict) -> tuple[str, ...]:
  """The dotted names of the settings that `build(config)` reads, such as 'sampling.eta'.

  With it, a guard against mixing results needs no list of the settings of each sampler, and covers
  samplers that users register. A setting counts as read if its value, or that of a whole section
  (`config.sampling.to_dict()`), is looked up; an absent one counts if `get` or `in` looks for it.

  Args:
    build: builds what the results depend on, and traces it if it may read settings later.
    config: the configuration that `build` is called with.

  Returns:
    The names in alphabetical order.
  """
  names: set[str] = set()
  build(_View(config, '', names))
  return tuple(sorted(names))


class _View:
  """A view of a configuration, or of a section of it, that records which settings are read."""

  def __init__(self, content: ConfigDict, prefix: str, names: set[str]):
    self._content, self._prefix, self._names = content, prefix, names

  @property
  def __class__(self) -> type:
    """A view passes for a `ConfigDict` wherever types are checked."""
    return type(self._content)

  def __getitem__(self, key: str) -> Any:
    value = self._content[key]
    if isinstance(value, ConfigDict):
      return _View(value, f'{self._prefix}{key}.', self._names)
    self._names.add(self._prefix + key)
    return value

  def get(self, key: str, default: Any = None) -> Any:
    if key not in self:
      return default
    return self[key]

  def __contains__(self, key: str) -> bool:
    if not isinstance(self._content.get(key), ConfigDict):
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
    """A copy is a plain configuration, so all of its settings count as read."""
    self._read_all()
    return self._content.__reduce_ex__(protocol)
