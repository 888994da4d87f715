"""Programs for accelerators that are not there: what they contain, and the bytes that they need."""

import collections
import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import hlo, topology
from runtime import parallelism

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'golden' / 'argument_bytes.json'
GROWTH = 1.05  # of bytes; a change that needs more shall record the new ones

# DDPM++ with two resolutions; its sampler without a corrector calls the network once in a step.
SMALL = topology.SMALL


@pytest.fixture(autouse=True)
def _own_layout():
  yield
  parallelism.lay_out()


def lowered_for(program, *platforms):
  """The text of a program, as `jax.export` lowers it for platforms that need not be there."""
  config = topology.configuration(SMALL)
  topology.lay_out(config, jax.devices()[:1])
  step, arguments, _ = topology.PROGRAMS[program](config)
  exported = jax.export.export(jax.jit(step), platforms=platforms)(*arguments)
  assert exported.platforms == platforms
  return exported.mlir_module()


def operations(text):
  return collections.Counter(re.findall(r'stablehlo\.(\w+)', text))


@pytest.fixture(scope='module')
def num_convolutions():
  """The number of convolutions of the network."""
  return operations(lowered_for('sampler', 'cpu'))['convolution']


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_accelerators_get_convolutions_where_a_cpu_gets_products_of_patches(
  platform, num_convolutions
):
  ours, cpu = (operations(lowered_for('train', name)) for name in (platform, 'cpu'))
  # Forward, gradient in the kernel, and in the input for all but the first.
  assert ours['convolution'] == 3 * num_convolutions - 1
  assert ours['while'] == 0
  assert cpu['convolution'] == 2 * num_convolutions - 1
  assert cpu['while'] >= num_convolutions  # over groups of images, see `models.convolution`
  assert cpu['dot_general'] == ours['dot_general'] + num_convolutions


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_sampler_and_likelihood_lower_to_one_and_two_passes(platform, num_convolutions):
  for program, passes in (('sampler', 1), ('likelihood', 2)):
    found = operations(lowered_for(program, platform))
    assert found['convolution'] == passes * num_convolutions
    assert found['while'] == 0


@pytest.mark.parametrize('program', list(topology.PROGRAMS))
def test_one_module_serves_both_kinds_of_accelerator(program, num_convolutions):
  found = operations(lowered_for(program, 'cuda', 'tpu'))
  assert found['convolution'] >= num_convolutions
  assert found['while'] == 0


def run(*arguments):
  command = [sys.executable, '-m', 'benchmarks.topology', *arguments]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


def test_states_and_batches_take_the_bytes_that_are_recorded():
  # To record: python -m benchmarks.topology --arguments > tests/golden/argument_bytes.json
  recorded, measured = (
    json.loads(GOLDEN.read_text())['rows'],
    json.loads(run('--arguments'))['rows'],
  )
  sizes = ('state_bytes', 'batch_bytes')
  layout = lambda row: {name: value for name, value in row.items() if name not in sizes}
  assert [layout(row) for row in measured] == [layout(row) for row in recorded]
  for ours, theirs in zip(measured, recorded, strict=True):
    for name in sizes:
      assert ours[name] <= GROWTH * theirs[name], (layout(ours), name)


@pytest.mark.slow
def test_a_small_step_for_four_chips_takes_the_bytes_that_are_recorded(tmp_path):
  pytest.importorskip('libtpu')
  recorded = topology.find(SMALL, topology.read(ROOT / 'benchmarks' / 'topology.jsonl'))
  run(*topology.arguments(SMALL), f'--out={tmp_path / "rows.jsonl"}')
  measured = topology.find(SMALL, topology.read(tmp_path / 'rows.jsonl'))
  for name in ('argument_bytes', 'output_bytes', 'temporary_bytes'):
    assert measured[name] <= GROWTH * recorded[name], name
  assert measured['collective_counts'] == {'all-reduce': 1}  # the gradient's, and no other


MODULE = """HloModule jit_step, is_scheduled=true

%fused (p: f32[2,8]) -> f32[2,8] {
  %p = f32[2,8]{1,0:T(8,128)} parameter(0)
  ROOT %copy.1 = f32[2,8]{0,1:T(8,128)} copy(%p)
}

%fused.conv (p0: bf16[4,4,4,8], p1: bf16[3,3,8,8]) -> bf16[4,4,4,8] {
  %p0 = bf16[4,4,4,8]{3,0,2,1:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[3,3,8,8]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[4,4,4,8]{3,0,2,1} convolution(%p0, %p1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}

ENTRY %main (a: f32[2,8], x: bf16[4,4,4,8], k: bf16[3,3,8,8]) -> (f32[2,8], bf16[4,4,4,8]) {
  %a = f32[2,8]{1,0:T(8,128)} parameter(0)
  %x = bf16[4,4,4,8]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %k = bf16[3,3,8,8]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %sum = f32[2,8]{1,0:T(8,128)} all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add
  %start = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%sum), replica_groups={{0,1},{2,3}}, dimensions={0}
  %done = f32[8,8]{1,0:T(8,128)} all-gather-done(%start), replica_groups={{0,1},{2,3}}
  %swap = f32[2,8]{0,1:T(8,128)} fusion(%sum), kind=kLoop, calls=%fused
  %xt = bf16[4,4,4,8]{3,0,2,1:T(8,128)(2,1)S(1)} copy(%x)
  %y = bf16[4,4,4,8]{3,0,2,1:T(8,128)(2,1)} fusion(%xt, %k), kind=kOutput, calls=%fused.conv, backend_config={"window_config":{"estimated_cycles":"120"}}
  ROOT %out = (f32[2,8]{0,1}, bf16[4,4,4,8]{3,0,2,1}) tuple(%swap, %y)
}
"""  # noqa: E501


def test_collectives_and_layout_changes_are_read_from_a_module():
  module = hlo.Module(MODULE)
  assert module.entry == 'main'
  reduce, gather = module.collectives(8)
  assert (reduce.kind, reduce.size, reduce.group, reduce.sent()) == ('all-reduce', 64, 4, 96)
  assert (gather.kind, gather.size, gather.group, gather.sent()) == ('all-gather', 256, 2, 128)
  assert module.layout_changes() == {'count': 2, 'bytes': 64 + 1024, 'at_convolutions': 1}
  assert module.estimated_cycles() == 120
  # all-reduce 2 x 64; gather start 64 + 320, done counted with it; swap 128; copy to fast memory
  # 1024; convolution from there: kernel 1152 and result 1024.
  assert module.main_memory_bytes() == 128 + 384 + 128 + 1024 + 1152 + 1024
