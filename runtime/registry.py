"""Tables from a configuration's names to the classes or functions behind them."""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from runtime.errors import UserError

_OF_FLAX = ('parent', 'name')  # fields that every Flax module has beside its own


class Registry:
  """A table of named objects that users extend with a decorator.

  The case of a name does not matter, whether it is registered or looked up.

  Args:
    kind: what the table holds, as it should read in an error ("predictor").
    keys: configuration keys by the names of the fields, for fields whose key has another name.
  """

  def __init__(self, kind: str, keys: Mapping[str, str] | None = None):
    self.kind = kind
    self._keys = dict(keys or {})
    self._entries: dict[str, tuple[str, Any]] = {}  # name as registered, and object
    self._located: dict[str, tuple[str, str]] = {}  # name as registered, and its module

  def register(self, cls: Any = None, *, name: str | None = None) -> Any:
    """Decorator, `@register` or `@register(name='...')`; the default name is the object's own.

    An object with the same qualified name as the registered one replaces it, because a notebook
    cell or a configuration file may run twice.

    Raises:
      ValueError: if another object is registered under the name.
    """
    if cls is None:
      return lambda cls: self.register(cls, name=name)
    name = cls.__name__ if name is None else name
    taken, other = self._entries.get(name.lower(), (name, cls))
    if other is not cls and other.__qualname__ != cls.__qualname__:
      raise ValueError(f'A {self.kind} named {taken!r} is already registered: choose another name.')
    self._entries[name.lower()] = name, cls
    return cls

  def locate(self, module: str, *names: str) -> None:
    """Says that importing `module` registers `names`, which is put off until one is used."""
    self._located |= {name.lower(): (name, module) for name in names}

  def get(self, name: Any) -> Any:
    """The object registered as `name`.

    Raises:
      UserError: if no object has the name; the message lists the registered names.
    """
    key = name.lower() if isinstance(name, str) else None
    if key in self._located and key not in self._entries:
      importlib.import_module(self._located[key][1])
    if key not in self._entries:
      raise UserError(
        f'Unknown {self.kind} {name!r}: choose one of {", ".join(sorted(self.names()))}.'
      )
    return self._entries[key][1]

  def names(self) -> list[str]:
    """All names, as they were registered and in the order of registration."""
    return [name for name, _ in (self._located | self._entries).values()]

  def fields(self, name: Any) -> dict[str, Any]:
    """The keys of a configuration that the object registered as `name` reads, with their defaults.

    They are the fields of a dataclass, or the keyword-only parameters of a function or of another
    class. A field without a default has None.

    Raises:
      UserError: if no object has the name.
    """
    return {
      self._keys.get(field, field): default for field, default in _fields(self.get(name)).items()
    }

  def all_fields(self) -> set[str]:
    """The keys that at least one registered object reads."""
    return {field for name in self.names() for field in self.fields(name)}

  def build(self, name: str, settings: ConfigDict | Mapping[str, Any], *args: Any) -> Any:
    """Calls the object registered as `name` with those settings that are fields of it.

    Args:
      name: the name of the object.
      settings: values by key; a field whose key is absent keeps its default.
      *args: positional arguments, which come before the settings.

    Raises:
      UserError: if no object has the name, or the object itself raises it.
    """
    entry = self.get(name)
    values = {field: self._keys.get(field, field) for field in _fields(entry)}
    return entry(*args, **{f: settings[key] for f, key in values.items() if key in settings})


def _fields(entry: Any) -> dict[str, Any]:
  """Names and defaults of the fields of a dataclass, or of keyword-only parameters."""
  if dataclasses.is_dataclass(entry):
    found = [(f.name, f.default) for f in dataclasses.fields(entry) if f.name not in _OF_FLAX]
  else:
    parameters = inspect.signature(entry).parameters.values()
    found = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
  missing = (dataclasses.MISSING, inspect.Parameter.empty)
  return {
    name: None if any(default is none for none in missing) else default for name, default in found
  }
