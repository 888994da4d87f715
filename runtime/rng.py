"""The random streams of a run, and random keys of both kinds.

Each kind of random numbers has a stream of its own, a fold of the seed, and each draw from it is a
fold of the step, the round or the image. So a checkpoint needs no state of a random generator.

Keys are typed, `jax.random.key`, or raw, `jax.random.PRNGKey`. JAX's own functions take both and
draw the same numbers from them. Only the shape differs: a raw key is an array of 32-bit words.
"""

import jax
import jax.numpy as jnp
import numpy as np

from runtime.array_types import RandomKey
from runtime.errors import UserError

# The results of every run depend on these numbers: no number is ever changed or used again.
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


def stream(seed: int, name: str) -> RandomKey:
  """The root key of the stream `name`, one kind of random numbers of a run with this seed."""
  return jax.random.fold_in(jax.random.PRNGKey(seed), _STREAMS[name])


def check_seed(seed: int) -> int:
  """The seed as an integer.

  Raises:
    UserError: if it is none in [0, 2^32).
  """
  whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
  if not whole or not 0 <= seed < 2**32:
    raise UserError(f'seed={seed!r} must be a whole number in [0, 2^32).')
  return int(seed)


def key_shape(rng: object) -> tuple[int, ...]:
  """The shape of an array of random keys, typed or raw; () for a single key.

  Raises:
    UserError: if `rng` holds no random keys.
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
