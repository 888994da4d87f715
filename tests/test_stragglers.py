"""One process of several that all others wait for is named, once, and no other is."""

import jax
import numpy as np
import pytest

from runtime import parallelism, stragglers


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def compared(monkeypatch, caplog):
  """Lets three processes take part, with a comparison every six seconds; returns the warnings."""

  def compare(*, waits, speeds, count):
    def gather(numbers):
      if len(numbers) == 1:
        return np.array(speeds)[:, None]
      elapsed = numbers[1]
      assert numbers[0] == pytest.approx(waits[0] * elapsed)
      return np.array([[wait * elapsed, elapsed] for wait in waits])

    clock = Clock()
    monkeypatch.setattr(jax, 'process_count', lambda: 3)
    monkeypatch.setattr(parallelism, 'gather', gather)
    first = stragglers.Stragglers(clock, speed=lambda: speeds[0])
    for _ in range(count):
      with first.waiting():
        clock.now += 6 * waits[0]
      clock.now += 6 * (1 - waits[0])
      first.compare()
    return [record.getMessage() for record in caplog.records]

  return compare


EQUAL = [10.0, 11.0, 9.0]
NO_WAITS = [0.0, 0.0, 0.0]


def test_equal_processes_are_not_reported(compared):
  assert not compared(waits=[0.3, 0.3, 0.3], speeds=EQUAL, count=50)


def test_the_process_that_waits_for_its_data_is_named_once(compared):
  (message,) = compared(waits=[0.6, 0.01, 0.03], speeds=EQUAL, count=20)
  assert message.startswith('Process 0 waits for its data 60 % of the time, the others 2 %, ')


def test_the_process_that_computes_slowly_is_named_within_a_minute(compared):
  assert not compared(waits=NO_WAITS, speeds=[10.0, 4.0, 10.0], count=7)  # 42 s
  (message,) = compared(waits=NO_WAITS, speeds=[10.0, 4.0, 10.0], count=9)
  assert message.startswith('Process 1 computes 2.5 times as slowly as the others, ')


def test_a_slow_moment_is_not_reported(monkeypatch, caplog):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  watch = stragglers.Stragglers()
  for _ in range(5):
    for second in (4.0, 4.0, 4.0, 10.0):
      watch._compare_speeds(np.array([10.0, second]))
  assert not caplog.records


def test_the_speed_is_that_of_the_devices_of_this_process():
  assert stragglers.computing_speed() > 0
