"""What formats of checkpoint files share: what they give, and how they read hostile files."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
from ml_collections import ConfigDict

from runtime import weights
from runtime.errors import UserError
from runtime.registry import Registry
from runtime.weights import Arrays, enumerate_names

FORMATS = Registry('checkpoint format')
register_format = FORMATS.register


@dataclasses.dataclass(frozen=True)
class AdamMoments:
  """Adam's moving averages of the gradient and of its square, after `count` updates."""

  count: int
  mu: Arrays
  nu: Arrays


@dataclasses.dataclass(frozen=True)
class ImportedCheckpoint:
  """What a file of another origin says, under our names and in our layouts.

  Attributes:
    step: training steps taken.
    params: parameters.
    params_ema: their moving average; without one the parameters stand for it.
    moments: of the optimizer; None if the file has none.
    model_state: other collections of the network.
    settings: configuration fields that the file knows; a contradiction is an error.
  """

  step: int
  params: Arrays
  params_ema: Arrays | None = None
  moments: AdamMoments | None = None
  model_state: Arrays = dataclasses.field(default_factory=dict)
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Contents:
  """Dictionaries and lists in a file of another origin; what is not as it should be is a sentence.

  Attributes:
    path: of the file.
    value: what is in it.
    fix: what to do about a file that lacks something.
  """

  path: pathlib.Path
  value: Any
  fix: str

  def at(self, kind: type, *keys: str | int) -> Any:
    """The value under these keys, the outermost first.

    Raises:
      UserError: if one of them is missing, naming what is there instead; if the value is not of
        this kind.
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
    """Whether something is under these keys, and neither None nor empty."""
    value = functools.reduce(_inner, keys, self.value)
    return value is not None and not (isinstance(value, Mapping | list) and not value)

  def number(self, *keys: str | int) -> float:
    """The number under these keys; an array of one element is one."""
    value = self.at(object, *keys)
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
      value = value.item()
    if not isinstance(value, int | float):
      self.refuse(f'has {_described(value)} as {_joined(keys)}, where a number must be')
    return value

  def count(self, *keys: str | int) -> int:
    """The number of steps or updates under these keys."""
    value = self.number(*keys)
    if not 0 <= value < 2**31 or value % 1:
      self.refuse(f'has {_joined(keys)}={value:.6g}, which must be a whole number in [0, 2^31)')
    return int(value)

  def tree(self, *keys: str | int) -> dict[str, np.ndarray]:
    """The arrays under these keys by path, without a level 'params' around all of them."""
    if self.at(dict, *keys).keys() == {'params'}:
      keys = (*keys, 'params')
    return weights.flatten(self.at(dict, *keys))

  def refuse(self, problem: str) -> NoReturn:
    raise UserError(f'{self.path} {problem}: {self.fix}.')


def _inner(value: Any, key: str | int) -> Any:
  try:
    return value[key]
  except (KeyError, IndexError, TypeError):
    return None


def _joined(keys: Iterable[str | int]) -> str:
  return '/'.join(map(str, keys))


def _described(value: Any) -> str:
  if isinstance(value, Mapping) and value:
    return f'a dictionary of {enumerate_names(value)}'
  size = f' of length {len(value)}' if isinstance(value, Mapping | list | tuple | str) else ''
  return f'a value of type {type(value).__name__}{size}'


class Format(abc.ABC):
  """A file format. Subclass and register; the name should read well after "as"."""

  @abc.abstractmethod
  def recognises(self, head: bytes) -> bool:
    """Whether a file that begins with `head` is of this format."""

  @abc.abstractmethod
  def read(self, path: pathlib.Path, config: ConfigDict) -> ImportedCheckpoint:
    """Reads a file. Whatever is raised is reported as a damaged file; a `UserError` as it is."""
