"""Fixtures shared by all tests."""

import os

import jax
import pytest

import losses  # noqa: F401  (the package under test must import before any option is set)


def pytest_configure() -> None:
  """Gives each of several workers a processor of its own: small programs then do not wait on it."""
  worker = os.environ.get('PYTEST_XDIST_WORKER')
  if worker and hasattr(os, 'sched_setaffinity'):
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(worker.removeprefix('gw')) % len(processors)]})


@pytest.fixture
def recorded_random_bits():
  """The random bits that the golden values were recorded with."""
  with jax.threefry_partitionable(False):
    yield
