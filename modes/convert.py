"""Published checkpoints in, weights out: `--mode=import` and `--mode=export`.

A file is recognised by its content. Everything is read, checked against the configured network and
turned into a training state before the working directory is touched.
"""

import abc
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from absl import logging
from ml_collections import ConfigDict

import train_state
from models import utils as mutils
from modes.loading import load_weights
from modes.training_loop import open_run
from runtime import checkpoints, configuration, parallelism, reporting, torch_file, weights
from runtime import workdir as workdirs
from runtime.errors import UserError
from runtime.registry import Registry
from runtime.weights import Arrays, enumerate_names
from runtime.workdir import at_work, check_run, log_start, record
from train_state import State

_HEAD = 64  # bytes by which a format is recognised

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
    params_ema: their moving average; without one the parameters stand for it.
    moments: of the optimizer; None if the file has none.
    model_state: other collections of the network.
    settings: configuration fields that the file knows; a contradiction is an error.
  """

  step: int
  params: Arrays
  params_ema: Arrays | None = None
  moments: Moments | None = None
  model_state: Arrays = dataclasses.field(default_factory=dict)
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Contents:
  """Dictionaries and lists in a file of another origin; what is not as it should be is a sentence.

  Attributes:
    path: of the file.
    value: what is in it.
    fix: what to do about a file that lacks something.
  """

  path: pathlib.Path
  value: Any
  fix: str

  def at(self, kind: type, *keys: str | int) -> Any:
    """The value under these keys, the outermost first.

    Raises:
      UserError: if one of them is missing, naming what is there instead; if the value is not of
        this kind.
    """
    value = self.value
    for depth, key in enumerate(keys):
      inner = _inner(value, key)
      if inner is None:
        where, what = _joined(keys[:depth]) or 'it', _described(value)
        self.refuse(f'has no {_joined(keys[: depth + 1])} ({where} is {what})')
      value = inner
    if not isinstance(value, kind):
      self.refuse(
        f'has {_described(value)} as {_joined(keys)}, where one of type {kind.__name__} must be'
      )
    return value

  def has(self, *keys: str | int) -> bool:
    """Whether something is under these keys, and neither None nor empty."""
    value = functools.reduce(_inner, keys, self.value)
    return value is not None and not (isinstance(value, Mapping | list) and not value)

  def number(self, *keys: str | int) -> float:
    """The number under these keys; an array of one element is one."""
    value = self.at(object, *keys)
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
      value = value.item()
    if not isinstance(value, int | float):
      self.refuse(f'has {_described(value)} as {_joined(keys)}, where a number must be')
    return value

  def count(self, *keys: str | int) -> int:
    """The number of steps or updates under these keys."""
    value = self.number(*keys)
    if not 0 <= value < 2**31 or value % 1:
      self.refuse(f'has {_joined(keys)}={value:.6g}, which must be a whole number in [0, 2^31)')
    return int(value)

  def tree(self, *keys: str | int) -> dict[str, np.ndarray]:
    """The arrays under these keys by path, without a level 'params' around all of them."""
    if self.at(dict, *keys).keys() == {'params'}:
      keys = (*keys, 'params')
    return weights.flatten(self.at(dict, *keys))

  def refuse(self, problem: str) -> NoReturn:
    raise UserError(f'{self.path} {problem}: {self.fix}.')


def _inner(value: Any, key: str | int) -> Any:
  try:
    return value[key]
  except (KeyError, IndexError, TypeError):
    return None


def _joined(keys: Iterable[str | int]) -> str:
  return '/'.join(map(str, keys))


def _described(value: Any) -> str:
  if isinstance(value, Mapping) and value:
    return f'a dictionary of {enumerate_names(value)}'
  size = f' of length {len(value)}' if isinstance(value, Mapping | list | tuple | str) else ''
  return f'a value of type {type(value).__name__}{size}'


class Format(abc.ABC):
  """A file format. Subclass and register; the name should read well after "as"."""

  @abc.abstractmethod
  def recognises(self, head: bytes) -> bool:
    """Whether a file that begins with `head` is of this format."""

  @abc.abstractmethod
  def read(self, path: pathlib.Path, config: ConfigDict) -> Foreign:
    """Reads a file. Whatever is raised is reported as a damaged file; a `UserError` as it is."""


@register_format(name='a Flax checkpoint of the 2021 code')
class FlaxCheckpoint(Format):
  """The MessagePack of the 2021 training state, with flax.optim's Adam."""

  def recognises(self, head: bytes) -> bool:
    # A map of a few entries, the name of the first one. (A length of safetensors has zeros there.)
    return (
      b'\x81' <= head[:1] <= b'\x8f' and b'\xa2' <= head[1:2] <= b'\xbf' and head[2:4].isalpha()
    )

  def read(self, path: pathlib.Path, config: ConfigDict) -> Foreign:
    del config
    content = weights.restore_flax(path.read_bytes())
    file = Contents(path, content, 'give a checkpoint_<number> of the 2021 code')
    averages = file.tree('optimizer', 'state', 'param_states')
    moments = Moments(
      count=file.count('optimizer', 'state', 'step'),
      mu=_with_last(averages, 'grad_ema'),
      nu=_with_last(averages, 'grad_sq_ema'),
    )
    return Foreign(
      step=file.count('step'),
      params=file.tree('optimizer', 'target'),
      params_ema=file.tree('params_ema'),
      moments=moments,
      model_state=file.tree('model_state'),
      settings={'optim.lr': file.number('lr'), 'model.ema_rate': file.number('ema_rate')},
    )


def _with_last(flat: Arrays, leaf: str) -> dict[str, np.ndarray]:
  suffix = f'/{leaf}'
  return {path.removesuffix(suffix): x for path, x in flat.items() if path.endswith(suffix)}


@register_format(name='a checkpoint of the PyTorch port')
class TorchCheckpoint(Format):
  """What the PyTorch port saves: model, EMA, Adam, step; see `torch_file`."""

  def recognises(self, head: bytes) -> bool:
    return head.startswith((torch_file.ZIP_MAGIC, torch_file.LEGACY_MAGIC))

  def read(self, path: pathlib.Path, config: ConfigDict) -> Foreign:
    content = torch_file.load(path)
    if isinstance(content, dict) and not _not_arrays(content):
      content = {'model': content}  # a state dict alone
    file = Contents(path, content, 'give a .pth as the PyTorch port saves it, or a state dict')
    model = _unwrapped(file)
    model.pop('sigmas', None)  # the noise levels, which the configuration gives

    # The moving averages and the optimizer know parameters by their number, in the order of the
    # model; the averages leave out the Fourier frequencies, which are not trained.
    frozen = {key: x for key, x in model.items() if key.endswith('.W') and x.ndim == 1}
    average = None
    if file.has('ema'):
      average = frozen | _average(file, [key for key in model if key not in frozen])
    else:
      logging.warning(
        f'{path} has no "ema" beside {enumerate_names(content)}: its parameters stand for their '
        f'average, and samples are those of the given weights.'
      )
    count, mu, nu = _adam(file, model) if file.has('optimizer', 'state') else (0, {}, {})
    step = count
    if file.has('step'):
      step = file.count('step')
    else:
      source = 'the number of updates of its optimizer' if count else 'as if training began'
      logging.warning(f'{path} has no "step": it counts as of step {step}, {source}.')
    known = {
      'model.ema_rate': ('ema', 'decay'),
      'optim.beta1': ('optimizer', 'param_groups', 0, 'betas', 0),
      'optim.eps': ('optimizer', 'param_groups', 0, 'eps'),
    }
    if step > config.optim.warmup:  # before, it is that of the warm-up
      known['optim.lr'] = ('optimizer', 'param_groups', 0, 'lr')

    names = _port_names(config, model)

    def ours(arrays: Arrays) -> dict[str, np.ndarray]:
      renamed = ((names.get(key, key), x) for key, x in arrays.items())
      return {name: _channels_last(name, x) for name, x in renamed}

    zeros = {key: np.zeros_like(x) for key, x in frozen.items()}
    return Foreign(
      step=step,
      params=ours(model),
      params_ema=average and ours(average),
      moments=Moments(count, ours(zeros | mu), ours(zeros | nu)) if mu else None,
      settings={name: file.number(*keys) for name, keys in known.items() if file.has(*keys)},
    )


def _not_arrays(entries: Mapping) -> set[Any]:
  return {key for key, x in entries.items() if not isinstance(x, np.ndarray)}


def _unwrapped(file: Contents) -> dict[str, np.ndarray]:
  """The parameters of the model, without the names of what it was wrapped in.

  `DataParallel` puts 'module.' before the names of its network and `torch.compile` '_orig_mod.'.
  """
  model = file.at(dict, 'model')
  if strange := _not_arrays(model):
    file.refuse(f'has entries in model that are not tensors, {enumerate_names(strange)}')
  unwrapped = {
    '.'.join(part for part in str(key).split('.') if part not in ('module', '_orig_mod')): x
    for key, x in model.items()
  }
  if len(unwrapped) < len(model):
    file.refuse('has parameters in model whose names differ in nothing but module. and _orig_mod.')
  return unwrapped


def _average(file: Contents, trained: list[str]) -> dict[str, np.ndarray]:
  """The moving averages by the name of the parameter."""
  shadow = file.at(list, 'ema', 'shadow_params')
  if len(shadow) != len(trained) or _not_arrays(dict(enumerate(shadow))):
    file.refuse(
      f'has {len(trained)} trained parameters in model, and the {len(shadow)} entries of '
      f'ema/shadow_params are not one tensor for each'
    )
  return dict(zip(trained, shadow, strict=True))


def _adam(file: Contents, model: Arrays) -> tuple[int, Arrays, Arrays]:
  """The number of Adam's updates, and its moving averages by the name of the parameter."""
  groups = range(len(file.at(list, 'optimizer', 'param_groups')))
  numbers = [
    number for i in groups for number in file.at(list, 'optimizer', 'param_groups', i, 'params')
  ]
  states = file.at(dict, 'optimizer', 'state')
  updated = {key: number for key, number in zip(model, numbers, strict=False) if number in states}
  if not len(set(numbers)) == len(numbers) == len(model) or not updated:
    file.refuse(
      f'has {len(model)} parameters in model, and {len(numbers)} in the param_groups of optimizer, '
      f'{len(updated)} of them with a state'
    )
  counts = {file.count('optimizer', 'state', number, 'step') for number in updated.values()}
  if len(counts) > 1:
    file.refuse(f'has parameters with different numbers of updates, {enumerate_names(counts)}')

  def averages(name: str) -> dict[str, np.ndarray]:
    of = lambda number: file.at(np.ndarray, 'optimizer', 'state', number, name)
    return {key: of(number) for key, number in updated.items()}

  return counts.pop(), averages('exp_avg'), averages('exp_avg_sq')


def _channels_last(name: str, x: np.ndarray) -> np.ndarray:
  """Weights of convolutions (O, I, H, W) to (H, W, I, O) and of dense layers (O, I) to (I, O)."""
  if name.endswith(('/kernel', '/weight')) and x.ndim >= 2:
    return np.moveaxis(x, (1, 0), (-2, -1))
  return x


def _port_names(config: ConfigDict, keys: Iterable[str]) -> dict[str, str]:
  """Our path of each parameter, by its name in the PyTorch port."""
  _, _, params = mutils.abstract_model(config)
  paths = weights.flatten(params)
  if config.model.name.lower().startswith('ncsnv2'):
    return {_ncsnv2_name(path, paths): path for path in paths}
  # The port keeps the modules in one list; those without weights may take a place in it.
  order = _call_order(config)
  matches = (re.match(r'all_modules\.(\d{1,6})\.', key) for key in keys)
  found = sorted({int(match[1]) for match in matches if match})
  numbers = found if len(found) == len(order) else range(len(order))
  number = dict(zip(order, numbers, strict=True))
  names = {}
  for path in paths:
    module, *inner, leaf = path.split('/')
    leaf = {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf)
    names['.'.join(['all_modules', str(number[module]), *inner, leaf])] = path
  return names


def _call_order(config: ConfigDict) -> list[str]:
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

  def read(self, path: pathlib.Path, config: ConfigDict) -> Foreign:
    prefix = 'params/'
    with safetensors.safe_open(path, framework='numpy') as opened:
      metadata, names = opened.metadata() or {}, opened.keys()
      step = metadata.get('step', '')
      ours = [name for name in names if name.startswith(prefix)]
      if not ours or not re.fullmatch('[0-9]{1,10}', step):
        raise UserError(
          f'{path} is not of --mode=export, whose tensors are named params/... and whose metadata '
          f'has the step: it has {len(names)} tensors ({enumerate_names(names)}) and the metadata '
          f'({enumerate_names(metadata)}); give a file of --mode=export.'
        )
      arrays = {name: opened.get_tensor(name) for name in names}
    params = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    model_state = {name: x for name, x in arrays.items() if not name.startswith(prefix)}
    recorded = Contents(path, _json(metadata.get('config', '{}')), 'give a file of --mode=export')
    known = configuration.flatten(config).keys()
    settings = {
      name: value
      for name, value in recorded.at(dict).items()
      if workdirs.of_model(name) and name in known
    }
    return Foreign(int(step), params, params, model_state=model_state, settings=settings)


def _json(text: str) -> Any:
  """What a text says in JSON; the text itself if that is nothing."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return text


def import_checkpoint(config: ConfigDict, workdir: pathlib.Path, checkpoint: str | None) -> State:
  """See `run_lib.import_checkpoint`; `config` is complete."""
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
  with at_work(workdir, '--workdir'), open_run(workdir) as run:
    record(config, workdir)
    log_start(config)
    run.snapshots.save(number, step, state)
    run.latest.save(step, step, state)
    logging.info('Imported %s, step %d, as %s.', checkpoint, step, run.snapshots.path(number))
  return state


def _has_checkpoints(workdir: pathlib.Path) -> bool:
  found = workdir.glob(f'checkpoints*/{checkpoints.PREFIX}_*')
  return any(path.name.rpartition('_')[2].isdigit() for path in found)  # not Orbax's unfinished


def read_state(config: ConfigDict, checkpoint: str | None) -> State:
  """The training state in a checkpoint file of any registered format.

  Raises:
    UserError: as for `import_checkpoint`.
  """
  if not checkpoint:
    raise UserError('--mode=import needs the file to import: give --checkpoint=FILE.')
  path = pathlib.Path(checkpoint).expanduser()
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


def _to_state(config: ConfigDict, path: pathlib.Path, foreign: Foreign) -> State:
  """The state that training and evaluation go on from."""
  configured = configuration.flatten(config)
  for name, value in foreign.settings.items():
    if not _same(configured[name], value):
      raise UserError(
        f'{path} was trained with {name}={_shown(value)}, and the configuration says '
        f'{_shown(configured[name])}: add --config.{name}={_shown(value)}.'
      )
  if not 0 <= foreign.step < 2**31:
    raise UserError(f'{path} has step={foreign.step}, which must be in [0, 2^31): it is damaged.')

  _, like = train_state.abstract_state(config)
  model = f'{path} does not fit model.name={config.model.name} as configured'

  def fit(what: str, arrays: Arrays, like: Any) -> Any:
    return _fit(f'{model}; its {what}: ', arrays, like)

  params = fit('parameters', foreign.params, like.params)
  params_ema = foreign.params if foreign.params_ema is None else foreign.params_ema
  step = jnp.asarray(foreign.step, jnp.int32)
  opt_state = train_state.get_optimizer(config).init(params)
  opt_state = _set(opt_state, 'ScaleByScheduleState', count=step)
  if foreign.moments:
    opt_state = _set(
      opt_state,
      'ScaleByAdamState',
      count=jnp.asarray(foreign.moments.count, jnp.int32),
      mu=fit('first moments', foreign.moments.mu, like.params),
      nu=fit('second moments', foreign.moments.nu, like.params),
    )
  else:
    logging.warning('%s has no state of an optimizer: Adam starts anew.', path)
  return State(
    step=step,
    params=params,
    params_ema=fit('averages', params_ema, like.params),
    opt_state=opt_state,
    model_state=fit('other collections', foreign.model_state, like.model_state),
    ema_rate=config.model.ema_rate,
  )


def _same(ours: Any, theirs: Any) -> bool:
  numbers = [isinstance(value, (int, float)) for value in (ours, theirs)]
  if all(numbers):
    return bool(np.isclose(ours, theirs, rtol=1e-6, atol=0))  # theirs may be in float32
  return ours == theirs


def _shown(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


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
  """The tree shaped as `like` with these arrays, or a sentence that begins with `where`."""
  try:
    return weights.fit(arrays, like)
  except weights.Misfit as error:
    raise UserError(
      f'{where}{error}. Give the configuration that the file was trained with.'
    ) from error


def export_checkpoint(
  config: ConfigDict,
  workdir: pathlib.Path,
  checkpoint: str | None = None,
  number: int | None = None,
) -> pathlib.Path:
  """See `run_lib.export_checkpoint`; `config` is complete."""
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
