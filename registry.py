"""Tables from a configuration's names to the classes or functions behind them."""

from typing import Any

from errors import UserError


class Registry:
  """A table of named objects that users extend with a decorator.

  Args:
    kind: what the table holds, as it should read in an error ("predictor").
  """

  def __init__(self, kind: str):
    self.kind = kind
    self._entries: dict[str, Any] = {}

  def register(self, cls: Any = None, *, name: str | None = None) -> Any:
    """Decorator, `@register` or `@register(name='...')`; the default name is the object's own.

    Registering again under the same name what has the same qualified name replaces it: a notebook
    cell or a configuration file may run twice.

    Raises:
      ValueError: if something else has the name.
    """
    if cls is None:
      return lambda cls: self.register(cls, name=name)
    key = cls.__name__ if name is None else name
    taken = self._entries.get(key)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
      raise ValueError(f'A {self.kind} named {key!r} is already registered; choose another name.')
    self._entries[key] = cls
    return cls

  def get(self, name: str) -> Any:
    """The object registered as `name`.

    Raises:
      UserError: if nothing is; the message lists the names there are.
    """
    if name not in self._entries:
      raise UserError(f'Unknown {self.kind} {name!r}: choose one of {", ".join(self.names())}.')
    return self._entries[name]

  def names(self) -> list[str]:
    return sorted(self._entries)
