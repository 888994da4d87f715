"""Fixtures shared by all tests."""

import jax
import pytest

import losses  # noqa: F401  (the package under test must import before any option is set)


@pytest.fixture
def recorded_random_bits():
  """The random bits that the golden values were recorded with."""
  with jax.threefry_partitionable(False):
    yield
