"""Checkpoints of the PyTorch port, and our names for its parameters."""

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from formats.base import AdamMoments, Contents, Format, ImportedCheckpoint, register_format
from models import utils as mutils
from runtime import torch_file, weights
from runtime.weights import Arrays, enumerate_names


@register_format(name='a checkpoint of the PyTorch port')
class TorchCheckpoint(Format):
  """What the PyTorch port saves: model, EMA, Adam, step; see `torch_file`."""

  def recognises(self, head: bytes) -> bool:
    return head.startswith((torch_file.ZIP_MAGIC, torch_file.LEGACY_MAGIC))

  def read(self, path: pathlib.Path, config: ConfigDict) -> ImportedCheckpoint:
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
    return ImportedCheckpoint(
      step=step,
      params=ours(model),
      params_ema=average and ours(average),
      moments=AdamMoments(count, ours(zeros | mu), ours(zeros | nu)) if mu else None,
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
