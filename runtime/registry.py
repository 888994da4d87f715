"""Tables from a configuration's names to the classes or functions behind them."""

from typing import Any

from runtime.errors import UserError


class Registry:
  """A table of named objects that users extend with a decorator.

  The case of a name does not matter, whether it is registered or looked up.

  Args:
    kind: what the table holds, as it should read in an error ("predictor").
  """

  def __init__(self, kind: str):
    self.kind = kind
    self._entries: dict[str, tuple[str, Any]] = {}  # name as registered, and object

  def register(self, cls: Any = None, *, name: str | None = None) -> Any:
    """Decorator, `@register` or `@register(name='...')`; the default name is the object's own.

    Registering again under the same name what has the same qualified name replaces it: a notebook
    cell or a configuration file may run twice.

    Raises:
      ValueError: if something else has the name.
    """
    if cls is None:
      return lambda cls: self.register(cls, name=name)
    name = cls.__name__ if name is None else name
    taken, other = self._entries.get(name.lower(), (name, cls))
    if other is not cls and other.__qualname__ != cls.__qualname__:
      raise ValueError(f'A {self.kind} named {taken!r} is already registered; choose another name.')
    self._entries[name.lower()] = name, cls
    return cls

  def get(self, name: str) -> Any:
    """The object registered as `name`.

    Raises:
      UserError: if nothing is; the message lists the names there are.
    """
    if not isinstance(name, str) or name.lower() not in self._entries:
      raise UserError(f'Unknown {self.kind} {name!r}: choose one of {", ".join(self.names())}.')
    return self._entries[name.lower()][1]

  def names(self) -> list[str]:
    """All names as they were registered, sorted."""
    return sorted(name for name, _ in self._entries.values())
