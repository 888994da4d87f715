"""Checkpoints: round trips, damage, and what is never saved."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_state
from runtime import checkpoints
from runtime.checkpoints import (
  CheckpointDirectory,
  CheckpointReader,
  DamagedCheckpoint,
  MisfitCheckpoint,
  NonFiniteState,
  Retention,
)
from runtime.errors import UserError
from tests import tiny_config


@pytest.fixture(scope='module')
def state():
  return train_state.init_state(jax.random.PRNGKey(0), tiny_config.get_config())[1]


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


def _snapshot(directory):
  return {path: path.stat().st_mtime_ns for path in sorted(directory.rglob('*'))}


def test_state_survives_a_round_trip_bit_for_bit(state, tmp_path):
  with CheckpointDirectory(tmp_path) as directory:
    directory.save(3, 30, _at(state, 30))
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
    latest.save(10, 10, _at(state, 10))
    all_.save(1, 20, _at(state, 20))
    latest.save(30, 30, _at(state, 30))
    latest.wait()
    all_.wait()
    damage(latest.path(30))
    with pytest.raises(DamagedCheckpoint, match='checkpoint_30'):
      latest.restore(30, state)
    before = _snapshot(tmp_path)
    _assert_same(checkpoints.restore_newest([latest, all_], state), _at(state, 20))
    assert _snapshot(tmp_path) == before  # reading never writes
    _assert_same(checkpoints.resume([latest, all_], state), _at(state, 20))
    assert latest.numbers() == [10]
    assert (tmp_path / 'meta' / 'damaged-checkpoint_30').is_dir()
    latest.save(30, 30, _at(state, 30))  # its place is free again
    latest.wait()
    _assert_same(checkpoints.restore_newest([latest, all_], state), _at(state, 30))


def test_nothing_is_restored_from_an_empty_directory_and_all_damaged_is_an_error(state, tmp_path):
  with CheckpointDirectory(tmp_path) as directory:
    assert checkpoints.restore_newest([directory], state) is None
    directory.save(1, 0, state)
    directory.wait()
    _truncate(directory.path(1))
    with pytest.raises(UserError, match='All checkpoints are damaged'):
      checkpoints.restore_newest([directory], state)


@pytest.mark.parametrize(
  ('kept', 'numbers'),
  [('all', [1, 2, 3, 4, 5, 6, 7]), ('last:2', [6, 7]), ('every:3', [3, 6, 7])],
)
def test_checkpoints_are_kept_as_asked_also_after_a_restart(kept, numbers, state, tmp_path):
  for steps in (range(1, 5), range(5, 8)):
    with CheckpointDirectory(tmp_path, Retention.parse(kept)) as directory:
      for step in steps:
        directory.save(step, step, _at(state, step))
      directory.wait()
  assert directory.numbers() == numbers
  for number in numbers:
    _assert_same(directory.restore(number, state), _at(state, number))


def test_an_old_checkpoint_is_whole_until_it_is_out_of_the_way(state, tmp_path):
  """A process that is killed while it deletes one leaves none that looks damaged."""
  with CheckpointDirectory(tmp_path, Retention(last=1)) as directory:
    for step in (5, 10):
      directory.save(step, step, _at(state, step))
    directory.wait()
    assert directory.numbers() == [10]
    moved = CheckpointReader(tmp_path / '.removed')
    _assert_same(moved.restore(5, state), _at(state, 5))
    directory.save(15, 15, _at(state, 15))
    directory.wait()
    assert moved.numbers() == [10]
  assert sorted(path.name for path in tmp_path.iterdir()) == ['checkpoint_15']
  shutil.copytree(tmp_path / 'checkpoint_15', tmp_path / '.removed' / 'checkpoint_10')
  checkpoints.remove_unfinished(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['checkpoint_15']


def test_same_number_at_a_later_step_replaces_the_checkpoint(state, tmp_path):
  with CheckpointDirectory(tmp_path) as directory:
    directory.save(2, 15, _at(state, 15))
    directory.wait()
    directory.save(2, 20, _at(state, 20))
    directory.wait()
    assert directory.step(2) == 20


def test_non_finite_state_is_never_saved(state, tmp_path):
  with CheckpointDirectory(tmp_path) as directory:
    bad = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    with pytest.raises(NonFiniteState, match="state\\['params/.*is not finite at step 0"):
      directory.save(1, 0, bad)
    assert directory.numbers() == []


@pytest.fixture
def saved(state, tmp_path):
  with CheckpointDirectory(tmp_path) as directory:
    directory.save(1, 10, _at(state, 10))
    directory.save(2, 20, _at(state, 20))
  return CheckpointReader(tmp_path)


def test_another_network_is_a_misfit_with_its_shapes_and_nothing_is_set_aside(saved):
  config = tiny_config.get_config()
  config.model.width = 16
  _, other = train_state.abstract_state(config)
  before = _snapshot(saved.directory)
  for restore in (checkpoints.restore_newest, checkpoints.resume):
    with CheckpointDirectory(saved.directory) as run, pytest.raises(MisfitCheckpoint) as raised:
      restore([run], other)
    message = str(raised.value)
    assert 'params/Conv_0/bias is float32[8] instead of float32[16]' in message
    assert 'config.json' in message
    assert 'damaged' not in message
  assert _snapshot(saved.directory) == before


def test_another_optimizer_or_other_layers_are_a_misfit_with_the_names(saved, state):
  fewer = state.replace(params={'Conv_0': state.params['Conv_0'], 'New_0': jnp.zeros(3)})
  with pytest.raises(MisfitCheckpoint, match='missing: params/New_0.*not of this network: params'):
    saved.restore(1, fewer)


def test_state_in_double_precision_is_a_misfit_that_names_the_switch(saved, state):
  with jax.enable_x64(True):
    double = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, 'float64'), state)
    with pytest.raises(MisfitCheckpoint, match=r'float32\[.*float64\[.*JAX_ENABLE_X64 as it was'):
      checkpoints.restore_newest([saved], double)


def test_weights_alone_are_restored_without_reading_the_optimizer(saved, state):
  for file in _array_files(saved.path(2)):
    assert file.exists()
  like = train_state.weights_only(jax.eval_shape(lambda: state))
  weights = checkpoints.restore_newest([saved], like)
  assert weights.params is None
  assert weights.opt_state is None
  assert int(weights.step) == 20
  _assert_same(weights.params_ema, state.params_ema)


def test_a_checkpoint_that_a_training_deletes_meanwhile_is_passed_over(saved, state, monkeypatch):
  read = CheckpointReader._read

  def deleted_while_read(self, number, wanted):
    if number == 2:
      shutil.rmtree(self.path(2))
    return read(self, number, wanted)

  monkeypatch.setattr(CheckpointReader, '_read', deleted_while_read)
  assert int(checkpoints.restore_newest([saved], state).step) == 10


def test_unfinished_saves_are_no_checkpoints_and_can_be_removed(saved, tmp_path):
  (tmp_path / 'checkpoint_3.orbax-checkpoint-tmp').mkdir()
  (tmp_path / 'checkpoint_3.orbax-checkpoint-tmp' / 'half').write_text('x')
  assert saved.numbers() == [1, 2]
  checkpoints.remove_unfinished(tmp_path)
  assert saved.numbers() == [1, 2]
  assert not list(tmp_path.glob('*tmp*'))
