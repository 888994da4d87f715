"""Weights as arrays by name: from the MessagePack of Flax, and into the tree of a network.

The files are third-party, so their content is bounded and checked before it is used.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import safetensors.numpy

PyTree = Any

# Arrays by the path of their parameter, as in 'ResnetBlockBigGANpp_0/Conv_0/kernel'. In a damaged
# file they may be anything: `fit` checks them.
Arrays = Mapping[str, object]

_SHOWN = 8  # names in a message
_LONGEST_NAME = 200  # characters of a name in a message
_MOST_ENTRIES = 100_000  # the training state of the deepest published network has 5,000
_MOST_AXES = 64


def restore_flax(data: bytes) -> PyTree:
  """Inverts `flax.serialization.to_bytes`: dictionaries of dictionaries, arrays and numbers.

  Raises:
    Exception: of any kind, if the bytes are damaged or have another format.
  """
  entries_left = _MOST_ENTRIES

  def count(items: Any) -> None:
    nonlocal entries_left
    entries_left -= 1 + len(items)
    if entries_left < 0:
      raise ValueError(f'more than {_MOST_ENTRIES} entries')

  def try_array(code: int, content: bytes) -> None:
    msgpack.unpackb(content, raw=True, max_array_len=_MOST_AXES, max_map_len=0)

  # The first pass keeps nothing: a list claims its length before its items follow, and an empty
  # dictionary, one byte in the file, takes 64 bytes of memory.
  msgpack.unpackb(
    data,
    object_hook=count,
    list_hook=count,
    ext_hook=try_array,
    max_map_len=_MOST_ENTRIES,
    max_array_len=_MOST_AXES,
  )
  return flax.serialization.msgpack_restore(data)


def to_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
  """The content of a file of safetensors, the same for the same arguments."""
  content = safetensors.numpy.save(dict(arrays), dict(metadata))
  # The library writes the metadata in another order each time. A header is its length in 8 bytes,
  # and JSON with spaces behind it.
  end = 8 + int.from_bytes(content[:8], 'little')
  header = json.dumps(
    json.loads(content[8:end]), sort_keys=True, separators=(',', ':'), ensure_ascii=False
  ).encode()
  return content[:8] + header.ljust(end - 8) + content[end:]


def flatten(tree: Mapping) -> dict[str, Any]:
  """The leaves of nested dictionaries by path, names joined by '/'."""
  return flax.traverse_util.flatten_dict(tree, sep='/')


class Misfit(ValueError):
  """The arrays are not those of the network; the message names the missing, unexpected, ..."""


def fit(arrays: Arrays, like: PyTree) -> PyTree:
  """Arranges arrays as a tree; leading axes of length one may differ.

  Args:
    arrays: the arrays by path.
    like: a tree of arrays, or of their shapes, with the structure of the result.

  Raises:
    Misfit: if an array is missing, unexpected, of another shape or not finite.
  """
  expected = flatten(like)
  common = expected.keys() & arrays.keys()
  numbers = {name for name in common if _is_numbers(arrays[name])}
  shape = {name: np.shape(arrays[name]) for name in numbers}
  fitting = {
    name
    for name in numbers
    if _without_leading_ones(shape[name]) == _without_leading_ones(expected[name].shape)
  }
  problems = {
    'missing': expected.keys() - common,
    'unexpected': arrays.keys() - common,
    'not arrays of numbers': common - numbers,
    'of another shape': {
      f'{name} {shape[name]} instead of {expected[name].shape}' for name in numbers - fitting
    },
    'not finite': {name for name in fitting if not np.isfinite(arrays[name]).all()},
  }
  found = [f'{kind}: {enumerate_names(names)}' for kind, names in problems.items() if names]
  if found:
    raise Misfit('; '.join(found))
  fitted = {
    name: np.asarray(arrays[name], leaf.dtype).reshape(leaf.shape)
    for name, leaf in expected.items()
  }
  return flax.traverse_util.unflatten_dict(fitted, sep='/')


def _is_numbers(x: Any) -> bool:
  return isinstance(x, np.ndarray | np.generic | jax.Array) and jnp.isdtype(
    x.dtype, ('real floating', 'integral')
  )


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
  return next((shape[i:] for i, n in enumerate(shape) if n != 1), ())


def enumerate_names(names: Iterable[Any]) -> str:
  """The first few of these names, made printable and cut, and the number of the others."""
  names = sorted(map(str, names))
  shown = [name if name.isprintable() else ascii(name) for name in names[:_SHOWN]]
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return (', '.join(name[:_LONGEST_NAME] for name in shown) or 'none') + more
