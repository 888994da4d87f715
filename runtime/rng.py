"""Random keys of both kinds: typed ones, `jax.random.key`, and raw ones, `jax.random.PRNGKey`.

JAX's own functions take both and draw the same numbers from them. What differs is the shape: a raw
key is an array of 32-bit words.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime.errors import UserError


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
