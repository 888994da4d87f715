"""Checkpoints: round trips, damage, and what is never saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
import losses
from checkpoints import CheckpointDirectory, DamagedCheckpoint, NonFiniteState
from errors import UserError
from tests import tiny_config


@pytest.fixture(scope='module')
def state():
  return losses.init_state(jax.random.PRNGKey(0), tiny_config.get_config())[1]


def _at(state, step):
  return state.replace(
    step=jnp.asarray(step, jnp.int32), params=jax.tree.map(lambda x: x + step, state.params)
  )


def _assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def _array_files(directory):
  """The files that hold the arrays; the smallest arrays are in their index."""
  return [path for path in directory.glob('state/**/d/*') if path.is_file()]


def _flip_a_bit(directory):
  for file in _array_files(directory):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _truncate(directory):
  for file in _array_files(directory):
    file.write_bytes(file.read_bytes()[:-1])


def _lose_a_file(directory):
  for file in _array_files(directory):
    file.unlink()


def _lose_the_metadata(directory):
  (directory / 'metadata' / 'metadata').unlink()


def test_state_survives_a_round_trip_bit_for_bit(state, tmp_path):
  with CheckpointDirectory(tmp_path) as directory:
    directory.save(3, _at(state, 30))
    directory.wait()
    assert (directory.numbers(), directory.step(3)) == ([3], 30)
    _assert_same(directory.restore(3, jax.eval_shape(lambda: state)), _at(state, 30))


@pytest.mark.parametrize(
  'damage', [_flip_a_bit, _truncate, _lose_a_file, _lose_the_metadata], ids=lambda f: f.__name__
)
def test_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(damage, state, tmp_path):
  with (
    CheckpointDirectory(tmp_path / 'meta') as latest,
    CheckpointDirectory(tmp_path / 'all') as all_,
  ):
    latest.save(10, _at(state, 10))
    all_.save(1, _at(state, 20))
    latest.save(30, _at(state, 30))
    latest.wait()
    all_.wait()
    damage(latest.path(30))
    with pytest.raises(DamagedCheckpoint, match='checkpoint_30'):
      latest.restore(30, state)
    _assert_same(checkpoints.restore_newest([latest, all_], state), _at(state, 20))
    assert latest.numbers() == [10]
    assert (tmp_path / 'meta' / 'damaged-checkpoint_30').is_dir()
    latest.save(30, _at(state, 30))  # its place is free again
    latest.wait()
    _assert_same(checkpoints.restore_newest([latest, all_], state), _at(state, 30))


def test_nothing_is_restored_from_an_empty_directory_and_all_damaged_is_an_error(state, tmp_path):
  with CheckpointDirectory(tmp_path) as directory:
    assert checkpoints.restore_newest([directory], state) is None
    directory.save(1, state)
    directory.wait()
    _truncate(directory.path(1))
    with pytest.raises(UserError, match='All checkpoints are damaged'):
      checkpoints.restore_newest([directory], state)


def test_only_the_newest_are_kept_where_asked(state, tmp_path):
  with CheckpointDirectory(tmp_path, keep=2) as directory:
    for step in (5, 10, 15):
      directory.save(step, _at(state, step))
    directory.wait()
    assert directory.numbers() == [10, 15]


def test_same_number_at_a_later_step_replaces_the_checkpoint(state, tmp_path):
  with CheckpointDirectory(tmp_path) as directory:
    directory.save(2, _at(state, 15))
    directory.wait()
    directory.save(2, _at(state, 20))
    directory.wait()
    assert directory.step(2) == 20


def test_non_finite_state_is_never_saved(state, tmp_path):
  with CheckpointDirectory(tmp_path) as directory:
    bad = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    with pytest.raises(NonFiniteState, match="state\\['params/.*is not finite at step 0"):
      directory.save(1, bad)
    assert directory.numbers() == []


def test_another_network_does_not_fit_and_says_so(state, tmp_path):
  config = tiny_config.get_config()
  config.model.width = 16
  other = losses.init_state(jax.random.PRNGKey(0), config)[1]
  with CheckpointDirectory(tmp_path) as directory:
    directory.save(1, state)
    directory.wait()
    with pytest.raises(DamagedCheckpoint, match='checkpoint_1'):
      directory.restore(1, other)
