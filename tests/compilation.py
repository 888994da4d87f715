"""How programs of tests are compiled, beside the fixture `quickly_compiled`."""

import contextlib

import jax


@contextlib.contextmanager
def optimized():
  """Decorates a test whose programs run longer than it takes to optimize them.

  For modules that use `quickly_compiled`, all other tests of which profit from it.
  """
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', False)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', before)
