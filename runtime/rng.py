"""The random streams of a run, and random keys of both kinds.

Every kind of random numbers has a stream of its own, a fold of the seed, and every draw from it is
a fold of the step, the round or the image. So nothing about them has to be saved.

Keys are typed, `jax.random.key`, or raw, `jax.random.PRNGKey`. JAX's own functions take both and
draw the same numbers from them. What differs is the shape: a raw key is an array of 32-bit words.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime.errors import UserError

# What a number stands for is in the results of every run: numbers are never given twice.
_STREAMS = {
  'init': 0,
  'train': 1,
  'eval': 2,
  'sample': 3,
  'sample_mode': 4,
  'bpd': 5,
  'classifier_init': 16,
  'classifier_train': 17,
  'classifier_eval': 18,
  'classifier_test': 19,
}


def stream(seed: int, name: str) -> jax.Array:
  """The root key of one kind of random numbers."""
  return jax.random.fold_in(jax.random.PRNGKey(seed), _STREAMS[name])


def key_shape(rng: Any) -> tuple[int, ...]:
  """The shape of an array of keys of either kind; () for a single one.

  Raises:
    UserError: if these are not keys.
  """
  if not hasattr(rng, 'dtype'):
    raise UserError(f'rng={rng!r} is not a random key: pass jax.random.key(seed).')
  if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    return rng.shape
  words = jax.random.key_data(jax.random.key(0)).shape
  if rng.dtype != np.uint32 or rng.shape[-1:] != words:
    raise UserError(
      f'rng is an array of {rng.dtype} of shape {rng.shape}, not a random key: '
      f'pass jax.random.key(seed).'
    )
  return rng.shape[:-1]
