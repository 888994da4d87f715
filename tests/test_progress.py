"""What a training and other long tasks say while they run."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import losses
import sde_lib
import train_state
from modes.training_loop import StepLog
from runtime import progress
from runtime.reporting import MetricWriter
from tests import tiny_config

pytestmark = pytest.mark.usefixtures('quickly_compiled')


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_pace_leaves_interruptions_out_of_the_speed_but_not_out_of_the_time_left():
  clock = Clock()
  pace = progress.Pace(100, clock)
  assert pace.lap(10) == (None, None)
  pace.resume(10)
  assert pace.lap(10) == (None, None)
  clock.now = 5.0
  assert pace.lap(20) == (2.0, 40.0)
  clock.now = 15.0  # an evaluation of ten seconds
  pace.resume(20)
  clock.now = 20.0
  speed, left = pace.lap(30)
  assert speed == 2.0
  assert left == pytest.approx(20.0 / 20 * 70)


def test_without_a_terminal_progress_is_whole_lines_of_the_log(monkeypatch, caplog):
  monkeypatch.setattr(progress, '_SECONDS', 0)
  with caplog.at_level('INFO'):
    assert list(progress.bar(range(3), 'samples', unit='images', scale=64)) == [0, 1, 2]
  assert len(caplog.messages) >= 3
  assert all('\r' not in line and '\n' not in line for line in caplog.messages)
  assert caplog.messages[-1].startswith('samples: 192 of 192 images, ')
  assert caplog.messages[-1].endswith(' left')
  assert 'images/s' in caplog.messages[-1]


def test_a_short_task_without_a_terminal_says_nothing(caplog):
  with caplog.at_level('INFO'):
    list(progress.bar(range(3), 'samples', unit='images'))
  assert caplog.messages == []


def test_on_a_terminal_progress_is_a_bar(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
  list(progress.bar(range(3), 'samples', unit='images'))
  assert 'samples: 100%' in capsys.readouterr().err


def test_a_step_is_one_line_with_everything(tmp_path, caplog):
  with MetricWriter(tmp_path) as metrics, caplog.at_level('INFO'):
    log = StepLog(metrics, 100, 16, saved=0)
    log.pace._clock = Clock()
    log.start(10)
    log.pace._clock.now = 5.0
    log(20, {'gradient_norm': 0.5, 'learning_rate': 2e-4, 'training_loss': 1.25})
    log.saved = 20
    log(20, {'gradient_norm': 0.5, 'learning_rate': 2e-4, 'training_loss': 1.25})
  first, second = caplog.messages
  assert first == (
    'step 20 of 100: 2 steps/s, 32 images/s, loss 1.25, gradient norm 0.5, learning rate 0.0002, '
    '00:40 left, no checkpoint yet'
  )
  assert second.endswith('learning rate 0.0002, last checkpoint at step 20')  # no speed is known
  line = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
  memory = line.pop('memory')
  assert line == {
    'step': 20,
    'training_loss': 1.25,
    'gradient_norm': 0.5,
    'learning_rate': 2e-4,
    'images_per_second': 32.0,
  }
  assert memory > 1e8  # this process has loaded JAX


def test_observing_a_step_changes_no_bit_and_measures_the_unclipped_gradient():
  config = tiny_config.get_config()
  sde = sde_lib.get_sde(config)
  model, state = train_state.init_state(jax.random.PRNGKey(0), config)
  two = jnp.asarray(2, jnp.int32)
  state = state.replace(step=two, opt_state=optax.tree.set(state.opt_state, count=two))
  batch = {'image': np.random.RandomState(0).rand(4, 28, 28, 1).astype(np.float32)}
  rng = jax.random.PRNGKey(1)
  plain = losses.build_step_fn(config, sde, model, train=True)
  observe = train_state.observer(config)
  observed = losses.build_step_fn(config, sde, model, train=True, observe=observe)
  (_, expected), loss = jax.jit(plain)((rng, state), batch)
  (_, updated), numbers = jax.jit(observed)((rng, state), batch)
  for a, b in zip(jax.tree.leaves(updated), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)
  assert numbers['training_loss'] == loss
  np.testing.assert_allclose(numbers['learning_rate'], 2 / 4 * config.optim.lr, rtol=1e-6)

  objective = losses.get_sde_loss_fn(
    sde, model, True, config.training.reduce_mean, likelihood_weighting=False
  )
  step_rng = jax.random.split(rng)[1]
  _, grad = objective.value_and_grad(step_rng, state.params, state.model_state, batch)
  np.testing.assert_allclose(numbers['gradient_norm'], optax.tree.norm(grad), rtol=1e-4)
  assert numbers['gradient_norm'] > config.optim.grad_clip
