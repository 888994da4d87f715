"""Losses and gradients that are not finite, and losses that have left all bounds."""

import json
import logging
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run_lib
import sampling
import train_state
from models.utils import register_model
from modes import divergence
from modes.divergence import NonFiniteLoss
from modes.preparation import prepare
from runtime.errors import UserError
from runtime.workdir import load_state
from tests import tiny_config
from tests.processes import history

pytestmark = pytest.mark.usefixtures('quickly_compiled')


class Spoiler(nn.Module):
  """The logarithm of a negative number for late times, which some batches do not have."""

  @nn.compact
  def __call__(self, x, labels):
    return x + jnp.log(jnp.where(labels > 950, -1.0, 1.0))[:, None, None, None]


@register_model(name='brittle')
class Brittle(nn.Module):
  """A network that gives NaN at late times."""

  @nn.compact
  def __call__(self, x, labels, train=True):
    return nn.Conv(1, (1, 1))(Spoiler()(x, labels))


@register_model(name='overflowing')
class Overflowing(nn.Module):
  """A network in bfloat16 whose activations leave its range."""

  @nn.compact
  def __call__(self, x, labels, train=True):
    h = nn.Conv(1, (1, 1), dtype=jnp.bfloat16, name='inner')(x)
    return nn.Conv(1, (1, 1), name='outer')(jnp.exp(400 * h).astype(x.dtype))


def config_of(**training):
  config = tiny_config.get_config()
  config.model.name = 'brittle'
  config.optim.warmup = 30
  config.training.batch_size = 4
  config.training.n_iters = 20
  config.training.snapshot_sampling = False
  config.training.eval_freq = 100
  config.training.update(training)
  return config


def metrics(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def final_state(workdir):
  return load_state(workdir, train_state.abstract_state(prepare(config_of()))[1])


def leaves(state):
  return jax.tree.leaves((state.params, state.params_ema, state.opt_state))


def test_a_loss_that_is_not_finite_stops_the_training_by_default(tmp_path):
  with pytest.raises(NonFiniteLoss, match='training_loss is nan at step .*, which no'):
    run_lib.train(config_of(), tmp_path)


def test_skipped_steps_are_counted_and_leave_no_trace_in_the_state(tmp_path, caplog):
  skip = {'on_nonfinite': 'skip', 'max_skipped_steps': 5}
  run_lib.train(config_of(**skip), tmp_path / 'whole')
  skipped = [int(n) for n in re.findall(r'nan at step (\d+): the step is skipped', caplog.text)]
  assert 2 <= len(skipped) <= 10
  # A number that is not finite is no JSON, and is not written.
  written = metrics(tmp_path / 'whole')
  without_loss = [line['step'] for line in written if 'training_loss' not in line]
  assert without_loss == skipped
  assert written[-1]['skipped_steps'] == len(skipped)
  for line in written:
    updates = line['step'] - 1 - sum(step < line['step'] for step in skipped)
    assert line['learning_rate'] == pytest.approx(2e-4 * updates / 30)
  state = final_state(tmp_path / 'whole')
  assert int(state.step) == 20
  counts = [int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
  assert set(counts) == {20 - len(skipped)}
  assert all(np.isfinite(x).all() for x in leaves(state))
  # Resumed in the middle, the run skips the same steps.
  for n_iters in (10, 20):
    run_lib.train(config_of(**skip, n_iters=n_iters), tmp_path / 'parts')
  for a, b in zip(*map(leaves, (state, final_state(tmp_path / 'parts'))), strict=True):
    np.testing.assert_array_equal(a, b)
  assert history(tmp_path / 'parts') == history(tmp_path / 'whole')


def test_more_skipped_steps_in_a_row_than_allowed_stop_the_training():
  guard = divergence.Guard(skips=True, most=3)
  nan, one = np.nan, 1.0
  guard(4, {'training_loss': np.array([one, nan, nan, nan])})
  guard(8, {'training_loss': np.array([one, one, nan, nan])})
  assert guard.skipped == 5
  with pytest.raises(NonFiniteLoss, match='inf at step 10, after 3 skipped steps in a row'):
    guard(12, {'training_loss': np.array([nan, np.inf, one, one])})


def test_a_gradient_that_is_not_finite_counts_too():
  guard = divergence.Guard(skips=False, most=10)
  numbers = {'training_loss': np.ones(2), 'gradient_norm': np.array([1.0, np.inf])}
  with pytest.raises(NonFiniteLoss, match='gradient_norm is inf at step 8'):
    guard(8, numbers)


def test_a_loss_that_rises_tenfold_for_good_is_reported_once(caplog):
  guard = divergence.Guard(skips=False, most=0)
  rng = np.random.default_rng(0)
  noisy = lambda scale: {'training_loss': scale * rng.exponential(size=100)}
  with caplog.at_level(logging.WARNING):
    for step in range(100, 1001, 100):
      guard(step, noisy(1.0))
    assert not caplog.records
    guard(1100, noisy(5.0))
    assert not caplog.records
    guard(1200, noisy(100.0))
    guard(1300, noisy(100.0))
  (record,) = caplog.records
  assert 'The loss has risen at step 1200' in record.getMessage()


def test_the_operation_and_the_layer_that_are_to_blame_are_named(tmp_path):
  message = (
    r'training_loss is nan at step \d+. The first value that is not finite: '
    r'log gives nan in the layer Spoiler_0\.'
  )
  with pytest.raises(NonFiniteLoss, match=message):
    run_lib.train(config_of(debug_nans=True), tmp_path)


@pytest.mark.parametrize('policy', ['stop', 'skip', 'debug'])
def test_an_overflow_of_bfloat16_stops_the_training(policy, tmp_path):
  training = {'debug': {'debug_nans': True}, 'skip': {'on_nonfinite': 'skip'}}.get(policy, {})
  config = config_of(**training, max_skipped_steps=3)
  config.model.name = 'overflowing'
  message = {
    'stop': r'training_loss is (inf|nan) at step 1, which no checkpoint holds',
    'skip': r'training_loss is (inf|nan) at step 4, after 3 skipped steps in a row',
    'debug': r'training_loss is (inf|nan) at step 1. The first value .* exp gives inf',
  }[policy]
  with pytest.raises(NonFiniteLoss, match=message):
    run_lib.train(config, tmp_path)
  assert not list(tmp_path.glob('checkpoints*/checkpoint_*'))


def test_a_finite_run_is_the_same_with_either_policy(tmp_path):
  states = []
  for policy, debug in (('stop', False), ('skip', False), ('stop', True)):
    config = tiny_config.get_config()
    config.training.update(n_iters=5, on_nonfinite=policy, debug_nans=debug)
    config.training.snapshot_sampling = False
    workdir = tmp_path / f'{policy}{debug}'
    run_lib.train(config, workdir)
    states.append(load_state(workdir, train_state.abstract_state(prepare(config))[1]))
  for state in states[1:]:
    for a, b in zip(leaves(states[0]), leaves(state), strict=True):
      np.testing.assert_array_equal(a, b)


def test_samples_of_a_snapshot_that_are_not_finite_are_black(tmp_path, monkeypatch, caplog):
  samples = np.stack([np.full((28, 28, 1), x, np.float32) for x in (0.5, np.nan, np.inf, -np.inf)])
  monkeypatch.setattr(
    sampling, 'get_sampling_fn', lambda *_: lambda *_, **__: (jnp.asarray(samples), 1)
  )
  run_lib.train(config_of(n_iters=1, snapshot_sampling=True, on_nonfinite='skip'), tmp_path)
  with np.load(tmp_path / 'samples' / 'iter_1_host_0' / 'sample.npz') as file:
    written = file['samples']
  assert [np.unique(image).tolist() for image in written] == [[127], [0], [0], [0]]
  assert 'the samples are not finite: they are shown as black' in caplog.text


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    (
      {'on_nonfinite': 'ignore'},
      "Unknown training.on_nonfinite 'ignore': choose one of stop, skip",
    ),
    ({'max_skipped_steps': -1}, 'max_skipped_steps=-1 must not be negative'),
    ({'keep_checkpoints': 'last:0'}, "keep_checkpoints='last:0' must be 'all', or 'last:N'"),
    ({'keep_checkpoints': '5'}, "keep_checkpoints='5' must be 'all', or 'last:N'"),
  ],
)
def test_settings_that_cannot_work_are_refused(setting, message):
  with pytest.raises(UserError, match=message):
    prepare(config_of(**setting))
