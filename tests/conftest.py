"""Fixtures shared by all tests."""

import gc
import os

import jaxtyping

from runtime import startup
from tests import typechecking

# Many tests compile the same small programs; those of the command line inherit both settings.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
startup.keep_compiled_programs()

# Every call of these modules is checked against its annotations, shapes of arrays with them.
TYPED = (
  'controllable_generation',
  'datasets',
  'evaluation',
  'formats',
  'likelihood',
  'losses',
  'metrics',
  'models',
  'modes',
  'report',
  'runtime',
  'samplers',
  'sampling',
  'sde_lib',
  'sources',
  'train_state',
)
jaxtyping.install_import_hook(TYPED, f'{typechecking.__name__}.check')

import jax  # noqa: E402
import pytest  # noqa: E402

import losses  # noqa: E402, F401  (the package under test must import before any option is set)

# Tracing a network makes millions of objects that stay: looking for garbage among them after every
# 700 new ones takes a tenth of the time.
gc.set_threshold(50_000)


def pytest_configure() -> None:
  """Gives each of several workers a processor of its own: small programs then do not wait on it."""
  worker = os.environ.get('PYTEST_XDIST_WORKER')
  if worker and hasattr(os, 'sched_setaffinity'):
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(worker.removeprefix('gw')) % len(processors)]})


@pytest.fixture(scope='session', autouse=True)
def _no_trace_in_the_cache_of_the_user(tmp_path_factory):
  """Prepared data of the tests go elsewhere; compiled programs stay where they are shared."""
  os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='module')
def quickly_compiled():
  """For modules whose programs take longer to optimize than to run, on this machine's CPU."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def strict_promotion():
  """For modules of exact numbers: shapes and types that do not match are errors, not broadcast."""
  with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
    yield


@pytest.fixture
def recorded_random_bits():
  """The random bits that the golden values were recorded with."""
  with jax.threefry_partitionable(False):
    yield
