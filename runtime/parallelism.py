"""One program over all devices: a mesh with one axis, over which batches are split.

Arrays are global. Parameters are replicated, the leading axis of a batch is split over the mesh
axis `data`, and random numbers are drawn once for the global batch, so that results do not depend
on the number of devices or processes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from runtime.array_types import Array

PyTree = Any
_AnyBatch = Shaped[Array, 'B *dims']
_Global = Shaped[jax.Array, '*dims']
_Host = Shaped[np.ndarray, '*dims']


@functools.cache
def mesh() -> Mesh:
  """All devices of all processes along the axis `data`."""
  return Mesh(np.asarray(jax.devices()), ('data',))


def replicated() -> NamedSharding:
  """The sharding of an array of which every device holds a whole copy."""
  return NamedSharding(mesh(), PartitionSpec())


def batch_sharding(axis: int = 0) -> NamedSharding:
  """The sharding of an array whose axis number `axis` is split over the devices."""
  return NamedSharding(mesh(), PartitionSpec(*[None] * axis, 'data'))


def shard_batch(x: _AnyBatch) -> _AnyBatch:
  """Inside jit: splits the leading axis over the devices, or leaves a length they cannot share."""
  if x.shape[0] % jax.device_count():
    return x
  return jax.lax.with_sharding_constraint(x, batch_sharding())


def replicate(tree: PyTree) -> PyTree:
  """Copies a tree of arrays that every process holds to every device."""
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(np.shape(x), replicated(), lambda i: np.asarray(x)[i]),
    tree,
  )


def split(batch: PyTree) -> PyTree:
  """Splits a batch that every process holds, arrays of shape (B, ...), over the devices."""
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(np.shape(x), batch_sharding(), lambda i: x[i]), batch
  )


def global_batch(local: PyTree, axis: int = 0) -> PyTree:
  """Joins the parts of a batch that the processes hold, along `axis`, into global arrays."""
  sharding = batch_sharding(axis)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def to_host(x: _Global) -> _Host:
  """The whole of a global array as a NumPy array, in every process."""
  return np.asarray(_gather(x))


@functools.cache
def _replicator() -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=replicated())


def _gather(x: jax.Array) -> jax.Array:
  return x if x.is_fully_replicated or jax.process_count() == 1 else _replicator()(x)


def any_process(flag: bool) -> bool:
  """Whether `flag` holds in any process; all processes must call this."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def from_first_process(value: int) -> int:
  """The value that the first process passes; all processes must call this."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))
