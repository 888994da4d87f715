"""The short form of the soak: `python -m faults.kills` has more kills, and all tasks."""

import json
import random
import subprocess

import pytest

from faults import kills


@pytest.mark.slow
def test_killed_at_random_moments_the_program_leaves_the_same_bits_and_no_other_files():
  result = kills.soak(4, ['train', 'sample'], seed=0)
  assert not result.problems, result.problems
  events = [entry['event'] for entry in result.log]
  assert len(events) - events.count('completed') >= 4
  assert '| all | ' in kills.table(result.log)


def test_a_difference_of_one_bit_a_lost_file_and_an_orphan_are_found(tmp_path):
  checkpoint = tmp_path / 'checkpoints' / 'checkpoint_1'
  (checkpoint / 'metadata').mkdir(parents=True)
  (checkpoint / 'metadata' / 'metadata').write_text('{"crc32": {"a": 1}}')
  line = {'step': 1, 'training_loss': 0.5}
  log = tmp_path / 'metrics.jsonl'
  log.write_text(json.dumps(line | {'memory': 1}))
  before = kills.digest(tmp_path)
  assert before.keys() == {'checkpoints/checkpoint_1', 'metrics.jsonl'}

  (tmp_path / 'stdout.txt').write_text('different in every run')
  log.write_text(json.dumps(line | {'memory': 2}))
  assert kills.digest(tmp_path) == before

  log.write_text(json.dumps(line | {'training_loss': 0.5000001}))
  (checkpoint / 'metadata' / 'metadata').write_text('{"crc32": {"a": 2}}')
  (tmp_path / 'checkpoints' / 'checkpoint_2.orbax-checkpoint-tmp').mkdir()
  orphan = tmp_path / 'checkpoints' / 'checkpoint_2.orbax-checkpoint-tmp' / 'data'
  orphan.touch()
  after = kills.digest(tmp_path)
  assert kills.differences(before | {'report.json': ''}, after) == [
    'checkpoints/checkpoint_1 is changed',
    'checkpoints/checkpoint_2.orbax-checkpoint-tmp/data is new',
    'metrics.jsonl is changed',
    'report.json is lost',
  ]


@pytest.mark.parametrize('seconds', [1000.0, 0.2], ids=['slow', 'fast'])
def test_kills_come_and_end_though_the_undisturbed_run_had_another_pace(seconds, tmp_path):
  class Slept(kills.Soak):
    def _start(self, name, folder):
      return subprocess.Popen(
        ['sleep', '0.4'], stdout=subprocess.PIPE, text=True, start_new_session=True
      )

    def undisturbed(self, name):
      (tmp_path / 'undisturbed').mkdir()
      self._seconds[name] = seconds
      return tmp_path / 'undisturbed'

    def _copy(self, name, folder):
      folder.mkdir()

  soak = Slept(tmp_path, random.Random(0))
  soak.kill('train', 3)
  assert not soak.problems
  assert 3 <= sum(entry['event'] != 'completed' for entry in soak.log) < 100
