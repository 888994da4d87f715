"""One program over all devices, laid out as a mesh with the axes `data`, `fsdp` and `spatial`.

Arrays are global. The leading axis of a batch is split over `data` and `fsdp`, the height of images
over `spatial`. Parameters, their moving average and the moments of the optimizer are split over
`fsdp` and gathered where a network uses them (Rajbhandari et al. 2020, "ZeRO: memory optimizations
toward training trillion parameter models", https://arxiv.org/abs/1910.02054); by default `fsdp` and
`spatial` are 1 and every device holds them whole. Random numbers are drawn once for the global
batch, so that results do not depend on the number or the layout of devices and processes.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import linear_call
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from runtime.array_types import Array
from runtime.errors import UserError

PyTree = Any
_AnyBatch = Shaped[Array, 'B *dims']
_Array = Shaped[Array, '*dims']
_Global = Shaped[jax.Array, '*dims']
_Host = Shaped[np.ndarray, '*dims']

BATCH_AXES = ('data', 'fsdp')
# Smaller arrays, such as biases, stay whole: gathering them would cost more than it saves.
_SMALLEST_SPLIT = 2**12

_layout = {'mesh': None}


def lay_out(fsdp: int = 1, spatial: int = 1, devices: Sequence[jax.Device] | None = None) -> None:
  """Lays the devices out as a mesh (data, fsdp, spatial), for everything that is compiled later.

  Args:
    fsdp: over how many devices the parameters are split.
    spatial: over how many devices the height of an image is split.
    devices: the devices; by default those of all processes.

  Raises:
    UserError: if the devices cannot be laid out in this way.
  """
  devices = jax.devices() if devices is None else devices
  for name, size in (('fsdp', fsdp), ('spatial', spatial)):
    if size < 1:
      raise UserError(f'parallel.{name}={size} must be at least 1, which splits nothing.')
  if len(devices) % (fsdp * spatial):
    raise UserError(
      f'parallel.fsdp={fsdp} and parallel.spatial={spatial} need a multiple of {fsdp * spatial} '
      f'devices, but there are {len(devices)}: choose numbers whose product divides that.'
    )
  here = len(devices) // len({device.process_index for device in devices})
  if here % spatial:
    raise UserError(
      f'parallel.spatial={spatial} must divide the {here} devices of a process, because the parts '
      f'of an image stay in one process: choose a divisor of {here}.'
    )
  grid = np.asarray(devices).reshape(-1, fsdp, spatial)
  before = _layout['mesh']
  if before is not None and before.devices.tolist() == grid.tolist():
    return
  if before is not None:
    jax.clear_caches()  # JAX does not know that its programs depend on this mesh
  _layout['mesh'] = Mesh(grid, (*BATCH_AXES, 'spatial'))


def mesh() -> Mesh:
  """The mesh of `lay_out`; by default all devices of all processes along `data`."""
  if _layout['mesh'] is None:
    lay_out()
  return _layout['mesh']


def batch_parts() -> int:
  """The number of parts that a batch is split into."""
  return mesh().shape['data'] * mesh().shape['fsdp']


def replicated() -> NamedSharding:
  """The sharding of an array of which every device holds a whole copy."""
  return NamedSharding(mesh(), PartitionSpec())


def batch_sharding(axis: int = 0) -> NamedSharding:
  """The sharding of an array whose axis number `axis` is split as a batch."""
  return NamedSharding(mesh(), PartitionSpec(*[None] * axis, BATCH_AXES))


def parameter_sharding(x: _Array | jax.ShapeDtypeStruct) -> NamedSharding:
  """The sharding of a parameter, or of an array that goes with it, such as a moment of Adam.

  The longest axis that `fsdp` divides is split; small arrays and those without one stay whole.
  """
  parts = mesh().shape['fsdp']
  lengths = [length if length % parts == 0 else 0 for length in x.shape]
  if parts == 1 or x.size < _SMALLEST_SPLIT or not any(lengths):
    return replicated()
  return NamedSharding(mesh(), PartitionSpec(*[None] * int(np.argmax(lengths)), 'fsdp'))


def shard_batch(x: _AnyBatch) -> _AnyBatch:
  """Inside jit: splits a batch over the devices; an axis that they cannot share stays whole.

  The second axis of an array (B, H, W, C) is split over `spatial`.
  """
  spatial = mesh().shape['spatial']
  axes = [None if x.shape[0] % batch_parts() else BATCH_AXES]
  if spatial > 1 and x.ndim == 4 and x.shape[1] % spatial == 0:
    axes.append('spatial')
  if not any(axes):
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), PartitionSpec(*axes)))


def split_parameters(tree: PyTree) -> PyTree:
  """Inside jit: splits the arrays of a training state as `parameter_sharding` says."""
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, parameter_sharding(x)), tree)


def gather_parameters(params: PyTree) -> PyTree:
  """Inside jit: the whole of parameters that are split over `fsdp`; gradients are split again."""
  if mesh().shape['fsdp'] == 1:
    return params
  return jax.tree.map(_gather_parameter, params)


def _gather_parameter(x: _Array) -> _Array:
  return linear_call(
    lambda _, x: jax.lax.with_sharding_constraint(x, replicated()),
    lambda _, dx: jax.lax.with_sharding_constraint(dx, parameter_sharding(dx)),
    (),
    x,
  )


def replicate(tree: PyTree) -> PyTree:
  """Copies a tree of arrays that every process holds to every device."""
  return _put(tree, lambda x: replicated())


def place(state: PyTree) -> PyTree:
  """Puts a training state that every process holds on the devices, split as its parameters are."""
  return _put(state, parameter_sharding)


def draw(build: Callable[..., PyTree], *args: PyTree) -> PyTree:
  """`build(*args)`, a training state, as one program; no device holds more than its part of it."""
  # Hundreds of small draws that run once: on CPU they take longer to optimize than to run.
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  return jax.jit(lambda *args: split_parameters(build(*args)), compiler_options=options)(*args)


def _put(tree: PyTree, sharding: Callable[[_Array], NamedSharding]) -> PyTree:
  def put(x: _Array) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding(x), lambda index: x[index])

  return jax.tree.map(put, tree)


def split(batch: PyTree) -> PyTree:
  """Splits a batch that every process holds, arrays of shape (B, ...), over the devices."""
  return _put(batch, lambda x: batch_sharding())


def global_batch(local: PyTree, axis: int = 0) -> PyTree:
  """Joins the parts of a batch that the processes hold, along `axis`, into global arrays."""
  sharding = batch_sharding(axis)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def to_host(x: _Global) -> _Host:
  """The whole of a global array as a NumPy array, in every process."""
  return np.asarray(_gather(x))


def _gather(x: jax.Array) -> jax.Array:
  if jax.process_count() == 1 or x.is_fully_replicated:
    return x
  return _replicator(replicated())(x)


@functools.cache
def _replicator(whole: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=whole)


def any_process(flag: bool) -> bool:
  """Whether `flag` holds in any process; all processes must call this."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def differing(facts: Mapping[str, Any]) -> dict[str, list[int]]:
  """The names of the facts that differ from those of the first process, and in which processes.

  Args:
    facts: what this process knows, by name. All processes must call this with the same names.
  """
  if jax.process_count() == 1:
    return {}
  checksums = [zlib.crc32(repr(fact).encode()) for fact in facts.values()]
  everywhere = multihost_utils.process_allgather(np.asarray(checksums, np.uint32))
  others = {
    name: np.flatnonzero(column != column[0]).tolist()
    for name, column in zip(facts, everywhere.T, strict=True)
  }
  return {name: processes for name, processes in others.items() if processes}


def gather(numbers: Sequence[float]) -> Shaped[np.ndarray, 'P n']:
  """The numbers of each process as float32, a row for each; all processes must call this."""
  everywhere = multihost_utils.process_allgather(np.asarray(numbers, np.float32))
  return everywhere.reshape(jax.process_count(), -1)


def from_first_process(value: int) -> int:
  """The value that the first process passes; all processes must call this."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))
