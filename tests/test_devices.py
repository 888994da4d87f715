"""One run gives the same numbers on any number and layout of devices and processes."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.processes import (
  ROOT,
  environment,
  finish,
  history,
  run,
  samples,
  start,
  start_together,
  wait_for,
)

# Wide enough for its kernels to be split, see `parallelism.parameter_sharding`.
WIDE = ('--config.model.width=512', '--config.training.n_iters=20')


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('one_device')
  run(workdir, *WIDE)
  return workdir


def assert_same(workdir, reference):
  """Losses to 1e-5 at every step, and samples to a grey level."""
  ours, theirs = history(workdir), history(reference)
  assert ours.keys() == theirs.keys()
  assert {step for step, name in ours if name == 'training_loss'} == set(range(1, 21))
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
  images, expected = samples(workdir), samples(reference)
  assert images.keys() == expected.keys() == {'iter_10_host_0', 'iter_20_host_0'}
  for name in images:
    assert np.abs(images[name].astype(int) - expected[name]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ('devices', 'fsdp', 'spatial'),
  [(2, 1, 1), (4, 1, 1), (8, 1, 1), (8, 8, 1), (8, 4, 1), (8, 2, 4)],
)
def test_devices_and_their_layout_change_no_number(one_device, tmp_path, devices, fsdp, spatial):
  layout = (f'--config.parallel.fsdp={fsdp}', f'--config.parallel.spatial={spatial}')
  run(tmp_path, *WIDE, *layout, devices=devices)
  assert_same(tmp_path, one_device)


@pytest.mark.slow
@pytest.mark.parametrize('layout', [(), ('--config.parallel.fsdp=8',)], ids=['whole', 'fsdp'])
def test_two_processes_of_four_devices_change_no_number(one_device, tmp_path, layout):
  group = start_together(tmp_path, *WIDE, *layout, devices=4)
  try:
    for process in group:
      finish(process)
  finally:
    for process in group:
      process.kill()
  assert_same(tmp_path, one_device)


@pytest.mark.slow
def test_a_run_moves_from_one_mesh_to_another(one_device, tmp_path):
  fsdp = ('--config.parallel.fsdp=4',)
  for steps, devices, layout in ((5, 1, ()), (10, 8, ()), (15, 8, fsdp), (20, 1, ())):
    run(tmp_path, *WIDE, f'--config.training.n_iters={steps}', *layout, devices=devices)
  ours, theirs = history(tmp_path), history(one_device)
  np.testing.assert_allclose([ours[key] for key in theirs], list(theirs.values()), rtol=1e-5)


MEMORY = """
import jax
import numpy as np
import losses, sde_lib, train_state
from configs.vp import mnist_ddpmpp_continuous
from modes.preparation import prepare
from runtime import parallelism

def bytes_of(fsdp):
  config = mnist_ddpmpp_continuous.get_config()
  config.model.nf, config.model.num_res_blocks = 64, 1
  config.training.batch_size = config.sampling.batch_size = 8
  config.parallel.fsdp = fsdp
  config = prepare(config)
  model, state = train_state.abstract_state(config)
  place = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=parallelism.parameter_sharding(x)
  )
  state = jax.tree.map(place, state)
  step_fn = losses.build_step_fn(config, sde_lib.get_sde(config), model, train=True)

  def step(state, image):
    (_, state), loss = step_fn((jax.random.PRNGKey(0), state), {'image': image})
    return parallelism.split_parameters(state), loss

  image = jax.ShapeDtypeStruct((8, 28, 28, 1), 'float32', sharding=parallelism.batch_sharding())
  compiled = jax.jit(step, donate_argnums=0).lower(state, image).compile()
  text = compiled.as_text()
  memory = compiled.memory_analysis()
  return memory.argument_size_in_bytes, memory.temp_size_in_bytes, text.count(' all-gather(')

(whole, whole_temp, no_gathers), (split, split_temp, gathers) = bytes_of(1), bytes_of(8)
print(whole, split, whole_temp, split_temp, no_gathers, gathers)
assert split < 0.14 * whole, 'state per device'
assert no_gathers == 0 and gathers > 20
"""


@pytest.mark.slow
def test_fsdp_leaves_an_eighth_of_the_state_on_each_of_eight_devices():
  command = [sys.executable, '-c', MEMORY]
  result = subprocess.run(command, cwd=ROOT, env=environment(8), capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr


def test_an_impossible_layout_is_refused_in_a_sentence(tmp_path):
  command = [
    sys.executable,
    'main.py',
    '--mode=train',
    '--config=tests/tiny_config.py',
    f'--workdir={tmp_path}',
    '--config.parallel.fsdp=3',
  ]
  result = subprocess.run(command, cwd=ROOT, env=environment(4), capture_output=True, text=True)
  assert result.returncode == 1
  assert (
    result.stderr.splitlines()[-1]
    == 'UserError: parallel.fsdp=3 and parallel.spatial=1 need a multiple of 3 devices, but there '
    'are 4: choose numbers whose product divides that.'
  )
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
def test_a_killed_process_ends_the_other_with_a_sentence_and_both_resume(
  one_device, tmp_path, lost
):
  group = start_together(tmp_path, *WIDE, devices=2)
  try:
    log = tmp_path / 'metrics.jsonl'
    wait_for(lambda: log.exists() and '"step": 8' in log.read_text(), group[0])
    group[lost].kill()
    output, _ = group[1 - lost].communicate(timeout=60)
  finally:
    for process in group:
      process.kill()
  assert group[1 - lost].returncode == 75
  assert output.splitlines()[-1].startswith(f'LostProcess: process {lost} of this run is gone, so ')
  assert 'Traceback' not in output
  for process in start_together(tmp_path, *WIDE, devices=2):
    assert 'Resuming from' in finish(process)
  assert_same(tmp_path, one_device)


@pytest.mark.slow
def test_an_error_of_all_processes_is_reported_by_each(tmp_path):
  for process in start_together(tmp_path, '--config.optim.lr=-1', devices=2):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith('UserError: optim.lr=-1.0 must be positive')


@pytest.mark.slow
def test_processes_find_each_other_under_slurm(tmp_path, monkeypatch):
  job = {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
  for name, value in (job | {'SLURM_STEP_NUM_TASKS': '2', 'SLURM_LOCALID': '0'}).items():
    monkeypatch.setenv(name, value)
  group = []
  for index in range(2):
    monkeypatch.setenv('SLURM_PROCID', str(index))
    group.append(start(tmp_path, '--config.training.n_iters=5', '--coordinator=auto'))
  for process in group:
    output = finish(process)
    assert '2 x cpu in 2 processes' in output
    assert 'is a run of its own' not in output


@pytest.mark.slow
def test_separate_runs_of_a_launcher_are_told_so(tmp_path, monkeypatch):
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
  output = run(tmp_path, '--config.training.n_iters=5')
  assert 'SLURM_STEP_NUM_TASKS=2, but --coordinator is not set: each process is a run' in output
