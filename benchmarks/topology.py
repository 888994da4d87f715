"""What the compiler makes of a step on many accelerators, without having any of them.

  python -m benchmarks.topology --config=configs/ve/cifar10_ncsnpp_continuous.py --topology=v5e:2x4
  python -m benchmarks.topology --table     # the rows of docs/scaling.md that are not there yet

Each compilation appends one JSON line to `--out`: bytes on each device, floating point operations,
collectives, changes of layout, and a roofline. Nothing runs: a program is lowered from shapes and
compiled for the devices that the topology names, such as v4:2x2x1 or v6e:2x4. It needs libtpu
(`pip install -U "jax[tpu]"`), a CPU, and minutes or hours. A row that `--out` already has is
skipped, so the same command resumes a run that was stopped.

The programs are one step of `--mode=train`, one step of the configured sampler, and one evaluation
of the drift with its divergence, of which a likelihood takes some hundreds.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from ml_collections import ConfigDict

import datasets
import likelihood
import losses
import sampling
import sde_lib
import train_state
from benchmarks import hlo, table
from models import utils as mutils
from modes import train as train_mode
from modes.preparation import prepare
from runtime import parallelism
from runtime.rng import stream

PyTree = Any
Program = tuple[Callable[..., PyTree], tuple[PyTree, ...], tuple[int, ...]]

_CONFIG = flags.DEFINE_string('config', None, 'Configuration file.')
_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x4', 'Name of the topology.')
_PROGRAM = flags.DEFINE_enum('program', 'train', ('train', 'sampler', 'likelihood'), 'What to do.')
_BATCH = flags.DEFINE_integer('batch', 0, 'Global batch size; 0 for training.batch_size.')
_SET = flags.DEFINE_multi_string('set', [], 'A field of the configuration, model.dtype=bfloat16.')
_EFFORT = flags.DEFINE_enum('effort', 'O2', ('O0', 'O1', 'O2', 'O3'), 'Level of optimization.')
_OUT = flags.DEFINE_string('out', 'benchmarks/topology.jsonl', 'File of JSON lines to append to.')
_TEXT = flags.DEFINE_string('text', '', 'A file for the text of the compiled program.')
_TABLE = flags.DEFINE_boolean('table', False, 'Compile the rows of the table that --out lacks.')
_ARGUMENTS = flags.DEFINE_boolean('arguments', False, 'Print the bytes of states and batches only.')

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Chip:
  """What its maker publishes about a chip.

  Attributes:
    flops: operations per second of matrix products and convolutions by `model.dtype`. float32 has
      its factors rounded, by JAX's default: to bfloat16 on a TPU, to TF32 on an H100.
    memory: bytes of its main memory.
    memory_bandwidth: bytes per second from and to the main memory.
    ring_bandwidth: bytes per second that it sends as a part of a ring.
    clock: cycles per second, from `flops` and the matrix units; None where these do not tell, or
      where the compiler estimates no cycles.
  """

  flops: dict[str, float]
  memory: float
  memory_bandwidth: float
  ring_bandwidth: float
  clock: float | None = None


def _tpu(flops: float, *rest: float | None) -> Chip:
  return Chip({'float32': flops, 'bfloat16': flops}, *rest)


# TPU: https://cloud.google.com/tpu/docs/v4, /v5e and /v6e, read in the versions of 2025 and 2026.
# The ring: the all-reduce bandwidth of a pod over its chips (1.1 PB/s of 4096, 51.2 TB/s of 256,
# 102.4 TB/s of 256) and over the axes of the torus (3, 2, 2), since a ring uses one of them.
# The clock: `flops` over 2 * 128^2 for each matrix unit, eight in a v4 and four in a v5e.
# H100: NVIDIA's data sheet of the SXM module, without sparsity; the ring is half of the 900 GB/s of
# NVLink, which count both directions, inside a host of eight.
CHIPS = {
  'v4': _tpu(275e12, 32 * 2**30, 1200e9, 1.1e15 / 4096 / 3, 275e12 / (8 * 2 * 128**2)),
  'v5e': _tpu(197e12, 16e9, 819e9, 51.2e12 / 256 / 2, 197e12 / (4 * 2 * 128**2)),
  'v6e': _tpu(918e12, 32e9, 1638e9, 102.4e12 / 256 / 2),
  'h100': Chip({'float32': 494.5e12, 'bfloat16': 989e12}, 80e9, 3.35e12, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One compilation.

  Attributes:
    config: the configuration without `configs/` and `.py`, such as 've/cifar10_ncsnpp_continuous'.
    topology: the name of the devices, such as 'v5e:2x4'.
    program: 'train', 'sampler' or 'likelihood'.
    batch: the size of the global batch.
    settings: fields of the configuration by name.
    effort: how much the compiler optimizes, 'O0' to 'O3'; 'O2' is its default.
  """

  config: str
  topology: str
  program: str = 'train'
  batch: int = 128
  settings: tuple[tuple[str, Any], ...] = ()
  effort: str = 'O2'

  def fields(self) -> dict[str, Any]:
    """The fields as they stand in a line of results."""
    return {**dataclasses.asdict(self), 'settings': dict(self.settings)}


def configuration(case: Case) -> ConfigDict:
  """The complete configuration of a case."""
  config = table.load(case.config)
  config.training.batch_size = jax.device_count()  # what fits the devices of this machine
  config = prepare(config)
  with config.unlocked():
    for name, value in case.settings:
      section, field = name.split('.')
      config[section][field] = value
    config.training.batch_size = case.batch
  return config


def lay_out(config: ConfigDict, devices: Sequence[jax.Device]) -> None:
  """Lays the devices out for all that is lowered later, as `config.parallel` says."""
  parallelism.lay_out(config.parallel.fsdp, config.parallel.spatial, devices)
  datasets.check_batch_size(config.training.batch_size, 'training.batch_size')


def _placed(state: PyTree) -> PyTree:
  """Shapes of a state on the devices, split as `parallelism.place` does it."""
  place = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=parallelism.parameter_sharding(x)
  )
  return jax.tree.map(place, state)


def _images(config: ConfigDict, dtype: str) -> jax.ShapeDtypeStruct:
  data = config.data
  shape = (config.training.batch_size, data.image_size, data.image_size, data.num_channels)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=parallelism.batch_sharding())


def train_program(config: ConfigDict) -> Program:
  """One step of `modes.train.compile_train_step`: `(state, grey levels) -> (state, loss)`."""
  model, state = train_state.abstract_state(config)
  step_fn = losses.build_step_fn(config, sde_lib.get_sde(config), model, train=True)
  preprocess = datasets.get_preprocess_fn(config, config.data.uniform_dequantization)
  one_step = train_mode.train_step_of(step_fn, preprocess, stream(config.seed, 'train'))

  def step(state: PyTree, images: jax.Array) -> PyTree:
    state, loss = one_step(state, {'image': images}, None)
    return parallelism.split_parameters(state), loss

  return step, (_placed(state), _images(config, 'uint8')), (0,)


def _network(config: ConfigDict) -> tuple[Any, PyTree]:
  """The network, and the shapes of its EMA parameters and other collections."""
  model, state = train_state.abstract_state(config)
  return model, _placed((state.params_ema, state.model_state))


def sampler_program(config: ConfigDict) -> Program:
  """One step of the configured sampler: `(network, number, carry) -> carry`."""
  sde = sde_lib.get_sde(config)
  model, network = _network(config)
  sampler = sampling.get_sampler(config, sde)

  def score_fn_of(network: PyTree) -> sde_lib.ScoreFn:
    return mutils.get_score_fn(sde, model, *network, False, config.training.continuous)

  def start(network: PyTree, rng: jax.Array) -> PyTree:
    shape = _images(config, 'float32').shape
    return sampler.init(score_fn_of(network), sampling.Condition(), rng, shape, None)

  def step(network: PyTree, i: jax.Array, carry: PyTree) -> PyTree:
    return sampler.step(score_fn_of(network), sampling.Condition(), i, carry)

  place = lambda x: jax.ShapeDtypeStruct(
    x.shape,
    x.dtype,
    sharding=parallelism.batch_sharding() if x.ndim == 4 else parallelism.replicated(),
  )
  carry = jax.tree.map(place, jax.eval_shape(start, network, jax.random.PRNGKey(0)))
  i = jax.ShapeDtypeStruct((), 'int32', sharding=parallelism.replicated())
  return step, (network, i, carry), ()


def likelihood_program(config: ConfigDict) -> Program:
  """One evaluation of the flow and its divergence: `(network, x, t, probe) -> (drift, div)`."""
  sde = sde_lib.get_sde(config)
  model, network = _network(config)

  def evaluate(network: PyTree, x: jax.Array, t: jax.Array, probe: jax.Array) -> PyTree:
    x, probe = parallelism.shard_batch(x), parallelism.shard_batch(probe)
    score_fn = mutils.get_score_fn(sde, model, *network, False, config.training.continuous)
    divergence = likelihood.hutchinson_divergence(probe[None])
    drift = likelihood.Likelihood(sde).augmented_drift(score_fn, divergence)
    return drift(t, (x, jnp.zeros(x.shape[0])))

  image = _images(config, 'float32')
  time = jax.ShapeDtypeStruct((), 'float32', sharding=parallelism.replicated())
  return evaluate, (network, image, time, image), ()


PROGRAMS: dict[str, Callable[[ConfigDict], Program]] = {
  'train': train_program,
  'sampler': sampler_program,
  'likelihood': likelihood_program,
}


def argument_bytes(arguments: PyTree) -> int:
  """The bytes that arguments of these shapes and shardings take on each device, without padding."""
  size = lambda x: x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
  return sum(size(x) for x in jax.tree.leaves(arguments))


def layouts() -> list[dict[str, Any]]:
  """The bytes of training state and batch on each device, for the layouts of `LAYOUTS`.

  Nothing is compiled, and the devices are made up, see `main`.
  """
  rows = []
  for name, chosen in LAYOUTS.items():
    config = configuration(Case(name, '', batch=jax.device_count()))
    _, state = train_state.abstract_state(config)
    for batch, chips, fsdp, spatial in chosen:
      config.training.batch_size = batch
      config.parallel.update(fsdp=fsdp, spatial=spatial)
      lay_out(config, jax.devices()[:chips])
      row = {'config': name, 'chips': chips, 'fsdp': fsdp, 'spatial': spatial, 'batch': batch}
      row['state_bytes'] = argument_bytes(_placed(state))
      row['batch_bytes'] = argument_bytes(_images(config, 'uint8'))
      rows.append(row)
  return rows


def forward_passes(config: ConfigDict, program: str) -> int:
  """How many forward passes a program costs: a gradient counts as two, a derivative as one."""
  passes = {'train': 3, 'likelihood': 2}
  return passes.get(program) or sampling.get_sampler(config, sde_lib.get_sde(config)).nfe_per_step


def devices_of(topology: str) -> Sequence[jax.Device]:
  """The devices of a topology, which compile and do not run: 'v5e:2x4', or 'h100:8' on one host."""
  kind, _, shape = topology.partition(':')
  if kind != 'h100':
    return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  return topologies.get_topology_desc(
    platform='cuda',
    topology_name=kind,
    target_config=(ROOT / 'benchmarks' / 'h100.txtpb').read_text(),
    topology=f'1x1x{shape}',  # partitions x hosts x devices
  ).devices


# Without a GPU the fastest algorithm of a product or convolution cannot be found by trying them.
_CUDA_OPTIONS = {'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False}


def measure(case: Case, text_to: pathlib.Path | None = None) -> dict[str, Any]:
  """Compiles a case; returns a line of results.

  Bytes and operations are those of one device in one call.

  Args:
    case: what to compile.
    text_to: a file for the text of the compiled program; None writes none.
  """
  config = configuration(case)
  parallelism.lay_out(devices=jax.devices()[:1])
  _, flop_per_image = table.count(config)
  analytic = flop_per_image * config.training.batch_size
  analytic *= forward_passes(config, case.program)
  lay_out(config, devices_of(case.topology))
  step, inputs, donated = PROGRAMS[case.program](config)
  mesh = parallelism.mesh()
  row = {
    **case.fields(),
    'batch': config.training.batch_size,
    'chips': mesh.size,
    'fsdp': config.parallel.fsdp,
    'spatial': config.parallel.spatial,
    'dtype': config.model.get('dtype', 'float32'),
    'versions': versions(),
    'argument_bytes_expected': argument_bytes(inputs),
    'analytic_flops': analytic / mesh.size,
  }
  started = time.perf_counter()
  lowered = jax.jit(step, donate_argnums=donated).lower(*inputs)
  row['lower_seconds'] = round(time.perf_counter() - started, 1)
  started, used = time.perf_counter(), time.process_time()
  try:
    options = _CUDA_OPTIONS if case.topology.startswith('h100') else None
    compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    row['error'] = ' '.join(str(error).split())[:300]
  row['compile_seconds'] = round(time.perf_counter() - started, 1)
  row['compile_cpu_seconds'] = round(time.process_time() - used, 1)
  if 'error' in row:
    return row
  text = compiled.as_text()
  if text_to:
    text_to.write_text(text)
  row |= describe(compiled, text, mesh.size)
  row['roofline'] = roofline(row, CHIPS[case.topology.split(':')[0]])
  return row


def versions() -> dict[str, str]:
  """The versions of the packages that the result depends on."""
  found = {}
  for name in ('jax', 'jaxlib', 'libtpu', 'jax-cuda12-pjrt', 'flax'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def describe(compiled: jax.stages.Compiled, text: str, num_devices: int) -> dict[str, Any]:
  """What a compiled program needs, of memory, operations and communication."""
  memory, module = compiled.memory_analysis(), hlo.Module(text)
  collectives = module.collectives(num_devices)
  by_kind = lambda what: {
    kind: what([c for c in collectives if c.kind == kind])
    for kind in sorted({c.kind for c in collectives})
  }
  costs = compiled.cost_analysis() or {}  # the CUDA compiler counts none without a GPU
  return {
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'aliased_bytes': memory.alias_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'code_bytes': memory.generated_code_size_in_bytes,
    'flops': costs.get('flops'),
    'bytes_accessed': costs.get('bytes accessed'),
    'main_memory_bytes': module.main_memory_bytes(),
    'collective_counts': by_kind(len),
    'collective_bytes': by_kind(lambda chosen: sum(c.size for c in chosen)),
    'sent_bytes': round(sum(c.sent() for c in collectives)),
    'layout_changes': module.layout_changes(),
    'loops': module.count('while'),
    'estimated_cycles': module.estimated_cycles(),
  }


def roofline(row: dict[str, Any], chip: Chip) -> dict[str, float | None]:
  """Milliseconds of a step by each of the limits of a chip, and by the compiler's own estimate."""
  cycles = row['estimated_cycles']
  times = {
    'compute_ms': 1e3 * row['analytic_flops'] / chip.flops[row['dtype']],
    'memory_ms': 1e3 * row['main_memory_bytes'] / chip.memory_bandwidth,
    'links_ms': 1e3 * row['sent_bytes'] / chip.ring_bandwidth,
  }
  times['step_ms'] = max(times.values())
  times['compiler_ms'] = 1e3 * cycles / chip.clock if chip.clock and cycles else None
  return {name: None if ms is None else round(ms, 3) for name, ms in times.items()}


_CIFAR10, _FFHQ_256 = 've/cifar10_ncsnpp_continuous', 've/ffhq_256_ncsnpp_continuous'
_FFHQ = 've/ffhq_ncsnpp_continuous'
_BFLOAT16 = ('model.dtype', 'bfloat16')

# Compiles in a minute, for the tests.
SMALL = Case(
  'vp/mnist_ddpmpp_continuous',
  'v5e:2x2',
  batch=32,
  settings=(('model.nf', 8), ('model.num_res_blocks', 1), ('model.ch_mult', (1, 2))),
  effort='O0',
)


def _v5e(config: str, batch: int, *settings: tuple[str, Any], **changes: Any) -> Case:
  return Case(
    config, **{'topology': 'v5e:2x4', 'effort': 'O0'} | changes, batch=batch, settings=settings
  )


# The rows of docs/scaling.md, the most important first. The lowest level of optimization compiles
# in a minute or two what the default takes more than ten for.
CASES = (
  SMALL,
  dataclasses.replace(SMALL, effort='O2'),
  _v5e(_CIFAR10, 128),
  _v5e(_CIFAR10, 1024, topology='v5e:8x8'),
  _v5e(_CIFAR10, 128, _BFLOAT16),
  _v5e(_CIFAR10, 128, topology='h100:8', effort='O2'),
  _v5e(_CIFAR10, 128, program='sampler'),
  _v5e(_CIFAR10, 128, program='likelihood'),
  _v5e(_CIFAR10, 128, ('model.dropout', 0.0)),
  _v5e(_FFHQ_256, 64),
  _v5e(_CIFAR10, 128, topology='v5e:1x1'),
  _v5e(_CIFAR10, 128, ('parallel.fsdp', 8)),
  _v5e(_FFHQ_256, 64, _BFLOAT16),
  _v5e(_CIFAR10, 4096, topology='v5e:16x16'),
  _v5e(_FFHQ, 16, ('parallel.spatial', 4), topology='v5e:8x8'),
  _v5e(_CIFAR10, 128, program='sampler', effort='O2'),
  _v5e(_CIFAR10, 128, topology='v6e:2x4'),
  _v5e(_CIFAR10, 128, effort='O2'),
  _v5e(_FFHQ_256, 64, _BFLOAT16, topology='v5e:8x8'),
)

# (batch, chips, fsdp, spatial) whose bytes are recorded in tests/golden/argument_bytes.json.
LAYOUTS = {
  _CIFAR10: [
    *((128, 8, fsdp, 1) for fsdp in (1, 2, 8)),
    *((1024, 64, fsdp, 1) for fsdp in (1, 8, 64)),
    (4096, 256, 1, 1),
  ],
  _FFHQ_256: [
    *((64, 8, fsdp, 1) for fsdp in (1, 8)),
    *((64, 64, fsdp, 1) for fsdp in (1, 8, 64)),
    (64, 256, 1, 4),
  ],
  _FFHQ: [*((8, 8, fsdp, 1) for fsdp in (1, 8)), *((8, 64, fsdp, 8) for fsdp in (1, 8))],
}


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The results in a file; none if there is no file."""
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(case: Case, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
  """The result of a case; None if there is none."""
  wanted = json.loads(json.dumps(case.fields()))
  same = lambda row: all(row[name] == value for name, value in wanted.items())
  return next((row for row in rows if same(row)), None)


def arguments(case: Case) -> list[str]:
  """The arguments of the command that compiles a case."""
  return [
    f'--config=configs/{case.config}.py',
    f'--topology={case.topology}',
    f'--program={case.program}',
    f'--batch={case.batch}',
    f'--effort={case.effort}',
    *(f'--set={name}={json.dumps(value)}' for name, value in case.settings),
  ]


def _parse(setting: str) -> tuple[str, Any]:
  name, _, value = setting.partition('=')
  try:
    return name, json.loads(value.lower() if value in ('True', 'False') else value)
  except json.JSONDecodeError:
    return name, value


def _start_jax(num_devices: int = 1) -> None:
  """Uses the CPU of this machine, which libtpu must take for the host of a TPU."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', num_devices)
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # compilations share no device


def main(argv: list[str]) -> None:
  """Compiles one case, or those of the table, one after the other."""
  del argv
  if _ARGUMENTS.value:
    _start_jax(max(chips for chosen in LAYOUTS.values() for _, chips, *_ in chosen))
    print(
      json.dumps(
        {'command': 'python -m benchmarks.topology --arguments', 'rows': layouts()}, indent=1
      )
    )
    return
  out = pathlib.Path(_OUT.value)
  if _TABLE.value:
    for case in CASES:
      if not find(case, read(out)):  # a process for each, which returns its memory
        command = [sys.executable, '-m', 'benchmarks.topology', *arguments(case), f'--out={out}']
        subprocess.run(command, cwd=ROOT, check=False)
    return
  _start_jax()
  name = _CONFIG.value.removeprefix('configs/').removesuffix('.py')
  settings = tuple(_parse(setting) for setting in _SET.value)
  batch = _BATCH.value or table.load(name).training.batch_size
  case = Case(name, _TOPOLOGY.value, _PROGRAM.value, batch, settings, _EFFORT.value)
  if find(case, read(out)):
    print(f'{out} has this row.')
    return
  jax.config.update('jax_optimization_level', case.effort)
  row = measure(case, pathlib.Path(_TEXT.value) if _TEXT.value else None)
  print(json.dumps(row))
  with open(out, 'a') as file:
    file.write(json.dumps(row) + '\n')


if __name__ == '__main__':
  app.run(main)
