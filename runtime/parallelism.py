"""One program over all devices: a one-axis mesh over which batches are split.

Arrays are global. Parameters are replicated, the leading axis of a batch is split over `data`, and
random numbers are drawn once for the global batch, so that results do not depend on the number of
devices or processes.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any


@functools.cache
def mesh() -> Mesh:
  """All devices of all processes along the axis `data`."""
  return Mesh(np.asarray(jax.devices()), ('data',))


def replicated() -> NamedSharding:
  return NamedSharding(mesh(), PartitionSpec())


def batch_sharding(axis: int = 0) -> NamedSharding:
  """Splits the axis numbered `axis` over the devices."""
  return NamedSharding(mesh(), PartitionSpec(*[None] * axis, 'data'))


def shard_batch(x: jax.Array) -> jax.Array:
  """Inside jit: asks that the leading axis be split; a size that does not divide stays whole."""
  if x.shape[0] % jax.device_count():
    return x
  return jax.lax.with_sharding_constraint(x, batch_sharding())


def replicate(tree: PyTree) -> PyTree:
  """Puts a tree that every process holds on every device."""
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(np.shape(x), replicated(), lambda i: np.asarray(x)[i]),
    tree,
  )


def split(batch: PyTree) -> PyTree:
  """Puts a batch that every process holds on the devices, each with its rows."""
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(np.shape(x), batch_sharding(), lambda i: x[i]), batch
  )


def global_batch(local: PyTree, axis: int = 0) -> PyTree:
  """Joins each process's part of a batch, split along `axis`, into global arrays."""
  sharding = batch_sharding(axis)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def to_host(x: jax.Array) -> np.ndarray:
  """A global array as NumPy, in every process."""
  return np.asarray(_gather(x))


@functools.cache
def _replicator():
  return jax.jit(lambda x: x, out_shardings=replicated())


def _gather(x: jax.Array) -> jax.Array:
  return x if x.is_fully_replicated or jax.process_count() == 1 else _replicator()(x)


def any_process(flag: bool) -> bool:
  """Whether `flag` holds in any process; all of them must ask."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def from_first_process(value: int) -> int:
  """The value that the first process has; all of them must ask."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))
