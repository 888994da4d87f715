"""`--dry_run`: what a mode would do, and with what, without writing or compiling anything."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import losses
import sde_lib
import train_state
from models import utils as mutils
from modes import convert, evaluate, sample, stats, train, train_classifier
from runtime import configuration, flops, parallelism
from train_state import State

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Request:
  """What the command line asks for.

  Attributes:
    mode: the name of the mode.
    workdir: the directory of the run.
    written: the configuration as its file has it, without the changes on the command line.
    eval_folder: see `run_lib.evaluate`.
    checkpoint: see `run_lib.import_checkpoint` and `run_lib.export_checkpoint`.
    number: the number of the checkpoint that a mode uses.
  """

  mode: str
  workdir: pathlib.Path
  written: ConfigDict
  eval_folder: str = 'eval'
  checkpoint: str | None = None
  number: int | None = None


# What refuses a configuration in each mode; the others refuse no more than `preparation.prepare`.
_CHECKS: dict[str, Callable[[ConfigDict, Request], Any]] = {
  'train': lambda config, asked: train.check(config, asked.workdir),
  'sample': lambda config, asked: sample.check(config, asked.workdir, asked.number),
  'eval': lambda config, asked: evaluate.check(config, asked.workdir, asked.eval_folder),
  'stats': lambda config, asked: stats.check(config),
  'train_classifier': lambda config, asked: train_classifier.check(config, asked.workdir),
  'import': lambda config, asked: convert.check_import(config, asked.workdir, asked.checkpoint),
  'export': lambda config, asked: convert.check_export(
    config, asked.workdir, asked.checkpoint, asked.number
  ),
}


def describe(config: ConfigDict, request: Request, given: ConfigDict) -> str:
  """The text of `--dry_run`.

  Args:
    config: the complete configuration, from `preparation.prepare`.
    request: what the command line asks for.
    given: the configuration with the changes on the command line, but before it was completed.

  Raises:
    UserError: as the mode itself, but for what it finds in the data.
  """
  _CHECKS.get(request.mode, lambda config, asked: None)(config, request)
  parts = [_configuration(config), _changes(request.written, given), _devices()]
  if request.mode == 'train_classifier':
    parts.append(_classifier(config))
  elif request.mode in ('train', 'sample', 'eval', 'import', 'export'):
    parts.append(_network(config, trains=request.mode == 'train'))
  ending = f'--mode={request.mode} would start. Nothing was written, and no data set was read.'
  return '\n'.join(line for part in parts for line in part) + f'\n{ending}'


def _configuration(config: ConfigDict) -> Iterator[str]:
  yield 'configuration:'
  for name, value in sorted(configuration.flatten(config).items()):
    yield f'  {name} = {value!r}'


def _changes(written: ConfigDict, given: ConfigDict) -> Iterator[str]:
  """The values that the command line has changed."""
  old, new = configuration.flatten(written), configuration.flatten(given)
  changed = [name for name in sorted(new) if new[name] != old.get(name)]
  yield 'changed on the command line:' if changed else 'changed on the command line: nothing'
  for name in changed:
    yield f'  {name} = {new[name]!r} (file: {old.get(name)!r})'


def _devices() -> Iterator[str]:
  mesh = ', '.join(f'{axis} {size}' for axis, size in parallelism.mesh().shape.items())
  kind = jax.devices()[0].device_kind
  yield (
    f'devices: {jax.device_count()} x {kind} in {jax.process_count()} processes, laid out as {mesh}'
  )


def _network(config: ConfigDict, *, trains: bool) -> Iterator[str]:
  sde, size = sde_lib.get_sde(config), config.data.image_size
  model, state = train_state.abstract_state(config)
  images = lambda count: jax.ShapeDtypeStruct((count, size, size, config.data.num_channels), float)

  def forward(params: PyTree, x: jax.Array) -> jax.Array:
    continuous = config.training.continuous
    score_fn = mutils.get_score_fn(sde, model, params, state.model_state, False, continuous)
    return score_fn(x, jnp.ones(1))

  yield from _counts(config.model.name, state, flops.of(forward, state.params, images(1)))
  if trains:
    step = losses.build_step_fn(config, sde, model, train=True)
    batch = {'image': images(config.training.batch_size)}
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    yield _of_step(flops.of(step, (key, state), batch), config.training.batch_size)
  yield from _memory(state if trains else train_state.weights_only(state))


def _classifier(config: ConfigDict) -> Iterator[str]:
  state = train_classifier.check(config, pathlib.Path())
  module, step = train_classifier.functions(config)
  data, count = config.data, config.classifier.batch_size
  shape = (data.image_size, data.image_size, data.num_channels)

  def forward(params: PyTree, x: jax.Array) -> jax.Array:
    return module.apply({'params': params}, x, jnp.ones(1), train=False)

  image = jax.ShapeDtypeStruct((1, *shape), float)
  yield from _counts(config.classifier.name, state, flops.of(forward, state.params, image))
  batch = {
    'image': jax.ShapeDtypeStruct((count, *shape), jnp.uint8),
    'label': jax.ShapeDtypeStruct((count,), jnp.int32),
  }
  yield _of_step(flops.of(step, state, batch, None), count)
  yield from _memory(state)


def _counts(name: str, state: State, operations: int) -> Iterator[str]:
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  yield f'network: {name}, {parameters:,} parameters'
  yield f'forward pass of one image: {_operations(operations)}'


def _of_step(operations: int, batch_size: int) -> str:
  return f'training step of {batch_size} images: {_operations(operations)}'


def _operations(count: int) -> str:
  return f'{count / 1e9:,.4g} GFLOP (convolutions and matrix products)'


def _memory(state: State) -> Iterator[str]:
  """The bytes of the state on each device."""
  parts = {
    'parameters': state.params,
    'moving average': state.params_ema,
    'optimizer': state.opt_state,
    'other': state.model_state,
  }
  sizes = {name: sum(map(_bytes, jax.tree.leaves(tree))) for name, tree in parts.items()}
  listed = ', '.join(f'{name} {size / 1e6:.4g}' for name, size in sizes.items() if size)
  yield (
    f'memory of each device: {sum(sizes.values()) / 1e6:,.4g} MB ({listed}); activations and '
    f'compiled programs are not counted'
  )


def _bytes(x: jax.ShapeDtypeStruct) -> int:
  return math.prod(parallelism.parameter_sharding(x).shard_shape(x.shape)) * x.dtype.itemsize
