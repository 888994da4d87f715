"""A run that an earlier version of this project made is resumed, sampled and evaluated."""

import json
import pathlib
import zipfile

import numpy as np
import pytest

import run_lib
from configs.vp.mnist_ddpmpp_continuous import get_config

HERE = pathlib.Path(__file__).parent / 'old_run'
EXPECTED = json.loads((HERE / 'expected.json').read_text(encoding='utf-8'))


@pytest.fixture
def workdir(tmp_path):
  with zipfile.ZipFile(HERE / 'run.zip') as archive:
    archive.extractall(tmp_path)
  return tmp_path


@pytest.fixture
def config():
  """The flags that the run was made with."""
  config = get_config()
  config.model.update({'nf': 8, 'ch_mult': (1,), 'attn_resolutions': (), 'num_res_blocks': 1})
  config.model.num_scales = 10
  config.training.update({'batch_size': 8, 'n_iters': 10, 'snapshot_freq': 10, 'n_jitted_steps': 1})
  config.training.update({'log_freq': 1, 'eval_freq': 10, 'snapshot_freq_for_preemption': 10})
  config.training.snapshot_sampling = False
  config.optim.warmup = 5
  config.sampling.update({'batch_size': 4, 'num_samples': 4})
  config.eval.update({'begin_ckpt': 1, 'end_ckpt': 1, 'batch_size': 250, 'num_samples': 8})
  config.likelihood.update({'rtol': 0.1, 'atol': 0.1, 'eps': 0.3})
  return config


def test_resumed_training_has_the_losses_of_the_earlier_version(config, workdir):
  config.training.n_iters = 15
  run_lib.train(config, workdir)
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines())
  losses = {line['step']: line['training_loss'] for line in lines if 'training_loss' in line}
  assert list(losses) == list(range(1, 16))
  after = [losses[step] for step in range(11, 16)]
  # Another processor rounds differently; on the one that it was made on, the bits are the same.
  np.testing.assert_allclose(after, EXPECTED['losses'], rtol=1e-4)


def test_sampling_adds_the_images_that_the_earlier_version_would_have_added(config, workdir):
  directory = workdir / 'samples' / 'unconditional_pc_step_10_seed_42'
  before = (directory / 'samples_0.npz').read_bytes()
  config.sampling.num_samples = 8
  run_lib.sample(config, workdir)
  assert (directory / 'samples_0.npz').read_bytes() == before
  with np.load(directory / 'samples_1.npz') as file:
    sums = file['samples'].astype(int).sum(axis=(1, 2, 3))
  np.testing.assert_allclose(sums, EXPECTED['samples_1'], rtol=1e-3)


def test_evaluation_keeps_finished_rounds_and_redoes_the_others_to_the_same_numbers(
  config, workdir
):
  config.eval.update({'enable_loss': True, 'enable_bpd': True, 'enable_sampling': True})
  config.eval.stats_path = str(workdir / 'stats.npz')
  report = workdir / 'eval' / 'report.json'
  before = json.loads(report.read_text(encoding='utf-8'))['1']
  kept = workdir / 'eval' / 'test_ckpt_1_bpd_1.npz'
  content = kept.read_bytes()
  for name in ('ckpt_1_loss.npz', 'report_1.npz', 'report.json', 'ckpt_1_host_0/samples_0.npz'):
    (workdir / 'eval' / name).unlink()
  run_lib.evaluate(config, workdir)
  after = json.loads(report.read_text(encoding='utf-8'))['1']
  assert kept.read_bytes() == content
  numbers = ('loss', 'bpd_test', 'fid_mnist5k_8', 'inception_score_mnist5k_8')
  assert [after[name] for name in numbers] == pytest.approx(
    [before[name] for name in numbers], rel=1e-3
  )
