"""What formats of checkpoint files share: their result, and a safe way to read hostile files."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np
from ml_collections import ConfigDict

from runtime import weights
from runtime.errors import UserError
from runtime.registry import Registry
from runtime.weights import enumerate_names

Content = Any  # dictionaries, lists, arrays, numbers, ...: whatever a file can say
# By the path of a parameter, as in 'ResnetBlockBigGANpp_0/Conv_0/kernel'. They should be arrays,
# which only `weights.fit` makes sure of.
Leaves = Mapping[str, Content]
Kind = TypeVar('Kind')

FORMATS = Registry('checkpoint format')
register_format = FORMATS.register


@dataclasses.dataclass(frozen=True)
class AdamMoments:
  """The state of Adam.

  Attributes:
    count: number of updates.
    mu: moving averages of the gradient, by path.
    nu: moving averages of the square of the gradient, by path.
  """

  count: int
  mu: Leaves
  nu: Leaves


@dataclasses.dataclass(frozen=True)
class ImportedCheckpoint:
  """The content of an imported checkpoint, under our names and in our layouts.

  Attributes:
    step: number of training steps.
    params: the parameters, by path.
    params_ema: their moving averages, by path; if it is None, the parameters take their place.
    moments: the state of the optimizer; None if the file has none.
    model_state: the other collections of the network, by path.
    settings: values of the configuration that the file records; it is an error if the configuration
      has others.
  """

  step: int
  params: Leaves
  params_ema: Leaves | None = None
  moments: AdamMoments | None = None
  model_state: Leaves = dataclasses.field(default_factory=dict)
  settings: Mapping[str, Content] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Contents:
  """The nested dictionaries and lists of an imported file; each defect raises a clear `UserError`.

  Attributes:
    path: of the file.
    value: its content.
    fix: what the user can do about a defective file, to complete the sentence of an error.
  """

  path: pathlib.Path
  value: Content
  fix: str

  def at(self, kind: type[Kind], *keys: str | int) -> Kind:
    """The value under these keys, the outermost first.

    Raises:
      UserError: if one of the keys is missing, naming what its place holds instead, or if the value
        is not of this kind.
    """
    value = self.value
    for depth, key in enumerate(keys):
      inner = _inner(value, key)
      if inner is None:
        where, what = _joined(keys[:depth]) or 'it', _described(value)
        self.refuse(f'has no {_joined(keys[: depth + 1])} ({where} is {what})')
      value = inner
    if not isinstance(value, kind):
      self.refuse(
        f'has {_described(value)} as {_joined(keys)}, where one of type {kind.__name__} must be'
      )
    return value

  def has(self, *keys: str | int) -> bool:
    """Whether the value under these keys exists and is neither None nor empty."""
    value = functools.reduce(_inner, keys, self.value)
    return value is not None and not (isinstance(value, Mapping | list) and not value)

  def number(self, *keys: str | int) -> float:
    """The number under these keys; an array of one element counts as a number.

    Raises:
      UserError: if a key is missing or the value is not a number.
    """
    value = self.at(object, *keys)
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
      value = value.item()
    if not isinstance(value, int | float):
      self.refuse(f'has {_described(value)} as {_joined(keys)}, where a number must be')
    return value

  def count(self, *keys: str | int) -> int:
    """The number of steps or updates under these keys.

    Raises:
      UserError: if a key is missing or the value is not a whole number in [0, 2^31).
    """
    value = self.number(*keys)
    if not 0 <= value < 2**31 or value % 1:
      self.refuse(f'has {_joined(keys)}={value:.6g}, which must be a whole number in [0, 2^31)')
    return int(value)

  def tree(self, *keys: str | int) -> dict[str, Content]:
    """The leaves under these keys by path, without a level 'params' around all of them.

    Raises:
      UserError: if a key is missing or the value is not a dictionary.
    """
    if self.at(dict, *keys).keys() == {'params'}:
      keys = (*keys, 'params')
    return weights.flatten(self.at(dict, *keys))

  def refuse(self, problem: str) -> NoReturn:
    """Raises a `UserError` that names the file, this problem and the fix."""
    raise UserError(f'{self.path} {problem}: {self.fix}.')


def _inner(value: Content, key: str | int) -> Content:
  try:
    return value[key]
  except (KeyError, IndexError, TypeError):
    return None


def _joined(keys: Iterable[str | int]) -> str:
  return '/'.join(map(str, keys))


def _described(value: Content) -> str:
  if isinstance(value, Mapping) and value:
    return f'a dictionary of {enumerate_names(value)}'
  size = f' of length {len(value)}' if isinstance(value, Mapping | list | tuple | str) else ''
  return f'a value of type {type(value).__name__}{size}'


class Format(abc.ABC):
  """A file format. Register a subclass of it, under a name that reads well after "as"."""

  @abc.abstractmethod
  def recognises(self, head: bytes) -> bool:
    """Whether a file that begins with `head` is of this format."""

  @abc.abstractmethod
  def read(self, path: pathlib.Path, config: ConfigDict) -> ImportedCheckpoint:
    """Reads a file.

    Args:
      path: of the file.
      config: the complete configuration of the run that it is imported into.

    Raises:
      UserError: if the file cannot be imported; it is reported as it is.
      Exception: of any other kind is reported as a damaged file.
    """
