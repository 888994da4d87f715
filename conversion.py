"""Published checkpoints in, weights out: `--mode=import` and `--mode=export`.

A file is recognised by its content. Everything is read, checked against the configured network and
turned into a training state before the working directory is touched.
"""

import abc
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import safetensors
import safetensors.numpy
from absl import logging

import checkpoints
import configuration
import losses
import parallelism
import reporting
import run_lib
import torch_file
from errors import UserError
from losses import State
from models import utils as mutils
from registry import Registry
from runtime.workdir import at_work, check_run, load_weights, log_start, record

# Arrays by the path of their parameter, as in 'ResnetBlockBigGANpp_0/Conv_0/kernel'.
Arrays = Mapping[str, np.ndarray]

_HEAD = 64  # bytes by which a format is recognised
_SHOWN = 8  # names in an error message

_FORMATS = Registry('checkpoint format')
register_format = _FORMATS.register


@dataclasses.dataclass(frozen=True)
class Moments:
  """Adam's moving averages of the gradient and of its square, after `count` updates."""

  count: int
  mu: Arrays
  nu: Arrays


@dataclasses.dataclass(frozen=True)
class Foreign:
  """What a file of another origin says, under our names and in our layouts.

  Attributes:
    step: training steps taken.
    params: parameters.
    params_ema: their moving average.
    moments: of the optimizer; None if the file has none.
    model_state: other collections of the network.
    settings: configuration fields that the file knows; a contradiction is an error.
  """

  step: int
  params: Arrays
  params_ema: Arrays
  moments: Moments | None = None
  model_state: Arrays = dataclasses.field(default_factory=dict)
  settings: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Format(abc.ABC):
  """A file format. Subclass and register; the name should read well after "as"."""

  @abc.abstractmethod
  def recognises(self, head: bytes) -> bool:
    """Whether a file that begins with `head` is of this format."""

  @abc.abstractmethod
  def read(self, path: pathlib.Path, config: ml_collections.ConfigDict) -> Foreign:
    """Reads a file. Whatever is raised is reported as a damaged file; a `UserError` as it is."""


@register_format(name='a Flax checkpoint of the 2021 code')
class FlaxCheckpoint(Format):
  """The MessagePack of the 2021 training state, with flax.optim's Adam."""

  def recognises(self, head: bytes) -> bool:
    # A map of a few entries, the name of the first one. (A length of safetensors has zeros there.)
    return (
      b'\x81' <= head[:1] <= b'\x8f' and b'\xa2' <= head[1:2] <= b'\xbf' and head[2:4].isalpha()
    )

  def read(self, path: pathlib.Path, config: ml_collections.ConfigDict) -> Foreign:
    del config
    state = flax.serialization.msgpack_restore(path.read_bytes())
    optimizer = state['optimizer']
    averages = _flatten(optimizer['state']['param_states'])
    moments = Moments(
      count=_integer(optimizer['state']['step']),
      mu=_with_last(averages, 'grad_ema'),
      nu=_with_last(averages, 'grad_sq_ema'),
    )
    return Foreign(
      step=_integer(state['step']),
      params=_flatten(optimizer['target']),
      params_ema=_flatten(state['params_ema']),
      moments=moments,
      model_state=_flatten(state['model_state']),
      settings={'optim.lr': float(state['lr']), 'model.ema_rate': float(state['ema_rate'])},
    )


def _flatten(tree: Mapping) -> dict[str, np.ndarray]:
  """Leaves by path, without a level 'params' around all of them."""
  if tree.keys() == {'params'}:
    tree = tree['params']
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _with_last(flat: Arrays, leaf: str) -> dict[str, np.ndarray]:
  suffix = f'/{leaf}'
  return {path.removesuffix(suffix): x for path, x in flat.items() if path.endswith(suffix)}


def _integer(x: Any) -> int:
  return int(np.asarray(x).item())


@register_format(name='a checkpoint of the PyTorch port')
class TorchCheckpoint(Format):
  """What the PyTorch port saves: model, EMA, Adam, step; see `torch_file`."""

  def recognises(self, head: bytes) -> bool:
    return head.startswith((torch_file.ZIP_MAGIC, torch_file.LEGACY_MAGIC))

  def read(self, path: pathlib.Path, config: ml_collections.ConfigDict) -> Foreign:
    content = torch_file.load(path)
    model = {key.removeprefix('module.'): x for key, x in content['model'].items()}
    model.pop('sigmas', None)  # the noise levels, which the configuration gives
    groups, states = content['optimizer']['param_groups'], content['optimizer']['state']

    # The moving averages and the optimizer know parameters by their number, in the order of the
    # model; the averages leave out the Fourier frequencies, which are not trained.
    frozen = {key for key, x in model.items() if key.endswith('.W') and x.ndim == 1}
    trained = [key for key in model if key not in frozen]
    ema = dict(zip(trained, content['ema']['shadow_params'], strict=True))
    numbers = [number for group in groups for number in group['params']]
    adam = {
      key: states[number] for key, number in zip(model, numbers, strict=True) if number in states
    }
    zeros = {key: np.zeros_like(model[key]) for key in frozen}
    counts = {_integer(state['step']) for state in adam.values()}
    if len(counts) > 1:
      raise ValueError(f'parameters with different numbers of updates {counts}')

    names = _port_names(config, model)

    def ours(arrays: Arrays) -> dict[str, np.ndarray]:
      renamed = ((names.get(key, key), x) for key, x in arrays.items())
      return {name: _channels_last(name, x) for name, x in renamed}

    moments = None
    if adam:
      moments = Moments(
        count=counts.pop(),
        mu=ours(zeros | {key: state['exp_avg'] for key, state in adam.items()}),
        nu=ours(zeros | {key: state['exp_avg_sq'] for key, state in adam.items()}),
      )
    step = _integer(content['step'])
    settings = {
      'model.ema_rate': content['ema']['decay'],
      'optim.beta1': groups[0]['betas'][0],
      'optim.eps': groups[0]['eps'],
    }
    if step > config.optim.warmup:  # before, it is that of the warm-up
      settings['optim.lr'] = groups[0]['lr']
    return Foreign(
      step=step,
      params=ours(model),
      params_ema=ours({key: model[key] for key in frozen} | ema),
      moments=moments,
      settings=settings,
    )


def _channels_last(name: str, x: np.ndarray) -> np.ndarray:
  """Weights of convolutions (O, I, H, W) to (H, W, I, O) and of dense layers (O, I) to (I, O)."""
  if name.endswith(('/kernel', '/weight')) and x.ndim >= 2:
    return np.moveaxis(x, (1, 0), (-2, -1))
  return x


def _port_names(config: ml_collections.ConfigDict, keys: Iterable[str]) -> dict[str, str]:
  """Our path of each parameter, by its name in the PyTorch port."""
  _, _, params = mutils.abstract_model(config)
  paths = _flatten(params)
  if config.model.name.startswith('ncsnv2'):
    return {_ncsnv2_name(path, paths): path for path in paths}
  # The port keeps the modules in one list; those without weights may take a place in it.
  order = _call_order(config)
  found = sorted({int(key.split('.')[1]) for key in keys if key.startswith('all_modules.')})
  numbers = found if len(found) == len(order) else range(len(order))
  number = dict(zip(order, numbers, strict=True))
  names = {}
  for path in paths:
    module, *inner, leaf = path.split('/')
    leaf = {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf)
    names['.'.join(['all_modules', str(number[module]), *inner, leaf])] = path
  return names


def _call_order(config: ml_collections.ConfigDict) -> list[str]:
  """Names of the network's submodules that have parameters, in the order of their calls."""
  called = {}

  def note(call, args, kwargs, context):
    if context.method_name == '__call__' and len(context.module.path) == 1:
      called.setdefault(context.module.name)
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    _, _, params = mutils.abstract_model(config)
  return [name for name in called if name in params]


def _ncsnv2_name(path: str, paths: Iterable[str]) -> str:
  """The port's name of a parameter of NCSNv2, whose modules have names in both."""
  stages = len({p.split('/')[0] for p in paths if p.startswith('RefineBlock_')})
  # With six stages, the one that came last was put behind the third, seen from the input.
  down = ['1', '2', '3', '31', '4', '5'] if stages == 6 else [str(i + 1) for i in range(stages)]
  up = ['1', '2', '31', '3', '4', '5'] if stages == 6 else down
  *modules, leaf = path.split('/')
  first, *inner = ((kind, int(i)) for kind, i in (module.rsplit('_', 1) for module in modules))
  leaf = {'kernel': 'weight'}.get(leaf, leaf)

  kind, i = first
  if kind == 'ResidualBlock':
    part, j = inner[0]
    names = {
      'InstanceNorm2dPlus': ['normalize1', 'normalize2'],
      'Conv': ['conv1', 'conv2', 'shortcut'],
      'ConvMeanPool': ['conv2.conv', 'shortcut.conv'],
    }
    return f'res{down[i // 2]}.{i % 2}.{names[part][j]}.{leaf}'
  if kind == 'RefineBlock':
    (part, j), (_, k) = inner
    in_block = f'{k // 2 + 1}_{k % 2 + 1}_conv'
    inputs = 1 if i == 0 else 2
    names = {
      'RCUBlock': f'adapt_convs.{j}.{in_block}' if j < inputs else f'output_convs.{in_block}',
      'MSFBlock': f'msf.convs.{k}',
      'CRPBlock': f'crp.convs.{k}',
    }
    return f'refine{up[i]}.{names[part]}.{leaf}'
  names = {'InstanceNorm2dPlus': ['normalizer'], 'Conv': ['begin_conv', 'end_conv']}
  return f'{names[kind][i]}.{leaf}'


@register_format(name='an export in safetensors')
class Safetensors(Format):
  """What `export_checkpoint` writes: the EMA weights only."""

  def recognises(self, head: bytes) -> bool:
    # The length of the JSON header, at most 100 MB, and the header.
    return head[4:9] == b'\0\0\0\0{'

  def read(self, path: pathlib.Path, config: ml_collections.ConfigDict) -> Foreign:
    del config
    with safetensors.safe_open(path, framework='numpy') as file:
      step = int(file.metadata()['step'])
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prefix = 'params/'
    params = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    model_state = {name: x for name, x in arrays.items() if not name.startswith(prefix)}
    return Foreign(step=step, params=params, params_ema=params, model_state=model_state)


def import_checkpoint(
  config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None
) -> State:
  """Makes the checkpoint file of another origin the state of a new run in `workdir`.

  The run can then be evaluated or continued. The checkpoint gets the number that a run of ours
  would have given it: step / `training.snapshot_freq`, rounded up.

  Args:
    config: of the network and training that the file is from.
    workdir: of the run; must hold no checkpoints.
    checkpoint: the file.

  Raises:
    UserError: a file that is damaged, of no known format, or does not fit the configuration; a
      working directory with checkpoints. The directory is then as it was.
  """
  reporting.log_to_console()
  config = configuration.prepare(config)
  workdir = pathlib.Path(workdir).expanduser()
  if _has_checkpoints(workdir):
    raise UserError(f'--workdir={workdir} already has checkpoints: import into a new one.')
  check_run(config, workdir)
  state = parallelism.replicate(read_state(config, checkpoint))
  step, n_jitted_steps = int(state.step), config.training.n_jitted_steps
  if step % n_jitted_steps:
    raise UserError(
      f'{checkpoint} is of step {step}, no multiple of training.n_jitted_steps={n_jitted_steps}: '
      f'add --config.training.n_jitted_steps=1.'
    )

  number = -(-step // config.training.snapshot_freq)
  with at_work(workdir, '--workdir'), run_lib.open_run(workdir) as run:
    record(config, workdir)
    log_start(config)
    run.snapshots.save(number, state)
    run.latest.save(step, state)
    logging.info('Imported %s, step %d, as %s.', checkpoint, step, run.snapshots.path(number))
  return state


def _has_checkpoints(workdir: pathlib.Path) -> bool:
  found = workdir.glob(f'checkpoints*/{checkpoints.PREFIX}_*')
  return any(path.name.rpartition('_')[2].isdigit() for path in found)  # not Orbax's unfinished


def read_state(config: ml_collections.ConfigDict, checkpoint: str | None) -> State:
  """The training state in a checkpoint file of any registered format.

  Raises:
    UserError: as for `import_checkpoint`.
  """
  if not checkpoint:
    raise UserError('--mode=import needs the file to import: give --checkpoint=FILE.')
  path = pathlib.Path(checkpoint)
  try:
    with path.open('rb') as file:
      head = file.read(_HEAD)
  except OSError as error:
    raise UserError(
      f'--checkpoint={path} cannot be read ({error.strerror}): give the file to import.'
    ) from error
  formats = {name: _FORMATS.get(name)() for name in _FORMATS.names()}
  known = [name for name, form in formats.items() if form.recognises(head)]
  if not known:
    raise UserError(f'--checkpoint={path} is of no known format: give {", or ".join(formats)}.')
  try:
    foreign = formats[known[0]].read(path, config)
    return _to_state(config, path, foreign)
  except UserError:
    raise
  except Exception as error:  # a hostile file can make a parser raise anything
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise UserError(
      f'--checkpoint={path} cannot be read as {known[0]} ({reason}): it is damaged or something '
      f'else; get it again.'
    ) from error


def _to_state(config: ml_collections.ConfigDict, path: pathlib.Path, foreign: Foreign) -> State:
  """The state that training and evaluation go on from."""
  for name, value in foreign.settings.items():
    section, key = name.split('.')
    if not np.isclose(config[section][key], value, rtol=1e-6, atol=0):  # it may be in float32
      raise UserError(
        f'{path} was trained with {name}={value:g}, and the configuration says '
        f'{config[section][key]:g}: add --config.{name}={value:g}.'
      )
  if not 0 <= foreign.step < 2**31:
    raise UserError(f'{path} has step={foreign.step}, which must be in [0, 2^31): it is damaged.')

  _, like = losses.abstract_state(config)
  model = f'{path} does not fit model.name={config.model.name} as configured'

  def fit(what: str, arrays: Arrays, like: Any) -> Any:
    return _fit(f'{model}; its {what}: ', arrays, like)

  params = fit('parameters', foreign.params, like.params)
  step = jnp.asarray(foreign.step, jnp.int32)
  opt_state = losses.get_optimizer(config).init(params)
  opt_state = _set(opt_state, 'ScaleByScheduleState', count=step)
  if foreign.moments:
    opt_state = _set(
      opt_state,
      'ScaleByAdamState',
      count=jnp.asarray(foreign.moments.count, jnp.int32),
      mu=fit('first moments', foreign.moments.mu, like.params),
      nu=fit('second moments', foreign.moments.nu, like.params),
    )
  return State(
    step=step,
    params=params,
    params_ema=fit('averages', foreign.params_ema, like.params),
    opt_state=opt_state,
    model_state=fit('other collections', foreign.model_state, like.model_state),
    ema_rate=config.model.ema_rate,
  )


def _set(opt_state: Any, kind: str, **fields: Any) -> Any:
  """`opt_state` with fields of the states of one kind replaced."""
  of_kind = lambda path, _: getattr(path[-1], 'tuple_name', None) == kind
  try:
    return optax.tree_utils.tree_set(opt_state, of_kind, **fields)
  except KeyError as error:
    raise UserError(
      'The file has the state of Adam, which the configured optimizer cannot take: set '
      '--config.optim.optimizer=Adam.'
    ) from error


def _fit(where: str, arrays: Arrays, like: Any) -> Any:
  """The tree shaped as `like` with these arrays; leading axes of length one may come and go."""
  expected = flax.traverse_util.flatten_dict(like, sep='/')
  shape = {name: np.shape(x) for name, x in arrays.items()}
  common = expected.keys() & arrays.keys()
  problems = {
    'missing': expected.keys() - common,
    'unexpected': arrays.keys() - common,
    'of another shape': {
      f'{name} {shape[name]} instead of {expected[name].shape}'
      for name in common
      if _without_leading_ones(shape[name]) != _without_leading_ones(expected[name].shape)
    },
    'not finite': {name for name in common if not np.isfinite(arrays[name]).all()},
  }
  found = [f'{kind}: {_enumerate(names)}' for kind, names in problems.items() if names]
  if found:
    raise UserError(
      f'{where}{"; ".join(found)}. Give the configuration that the file was trained with.'
    )
  fitted = {
    name: np.asarray(arrays[name], leaf.dtype).reshape(leaf.shape)
    for name, leaf in expected.items()
  }
  return flax.traverse_util.unflatten_dict(fitted, sep='/')


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
  return next((shape[i:] for i, n in enumerate(shape) if n != 1), ())


def _enumerate(names: Iterable[str]) -> str:
  names = sorted(names)
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return ', '.join(names[:_SHOWN]) + more


def export_checkpoint(
  config: ml_collections.ConfigDict,
  workdir: str,
  checkpoint: str | None = None,
  number: int | None = None,
) -> pathlib.Path:
  """Writes the EMA weights of a run as safetensors, with step and configuration as metadata.

  Tensors are named as in the variables of the Flax module: 'params/Conv_0/kernel'.

  Args:
    config: of the run.
    workdir: of the run.
    checkpoint: the file to write; by default `export_<step>.safetensors` in `workdir`.
    number: of the checkpoint; by default the newest state there is.

  Returns:
    The file.

  Raises:
    UserError: no such checkpoint, a configuration of another run, a file that exists.
  """
  reporting.log_to_console()
  config = configuration.prepare(config)
  workdir = pathlib.Path(workdir).expanduser()
  _, state = load_weights(config, workdir, number)

  step = int(state.step)
  path = pathlib.Path(checkpoint or workdir / f'export_{step}.safetensors').expanduser()
  if path.exists():
    raise UserError(f'--checkpoint={path} exists: choose another name for the export.')
  variables = {'params': state.params_ema, **state.model_state}
  arrays = {
    name: np.ascontiguousarray(x)
    for name, x in flax.traverse_util.flatten_dict(variables, sep='/').items()
  }
  metadata = {'step': str(step), 'config': json.dumps(configuration.flatten(config))}
  if jax.process_index() == 0:
    reporting.write_atomic(path, safetensors.numpy.save(arrays, metadata))
  logging.info('Exported step %d to %s.', step, path)
  return path
