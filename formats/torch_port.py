"""Checkpoints of the PyTorch port, and our names for its parameters.

The port has the same networks with the same weights, but names and stores them differently:

- It keeps the modules of a network in one list, `all_modules`, in the order in which its forward
  pass takes them, and names parameters by their place in it: `all_modules.3.Conv_0.weight`. Flax
  numbers the modules of each class apart: `ResnetBlockDDPMpp_0/Conv_0/kernel`. Neither name follows
  from the other, so the places of our modules are found by recording the order of their calls.
- Only NCSNv2 has named modules in both, whose correspondence `_ncsnv2_name` writes out.
- PyTorch's layers have channels before pixels and outputs before inputs, Flax's the reverse.
"""

import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from absl import logging
from jaxtyping import Shaped
from ml_collections import ConfigDict

from formats.base import (
  AdamMoments,
  Content,
  Contents,
  Format,
  ImportedCheckpoint,
  register_format,
)
from models import utils as mutils
from runtime import torch_file, weights
from runtime.weights import Arrays, enumerate_names

AnyArray = Shaped[np.ndarray, '...']


@register_format(name='a checkpoint of the PyTorch port')
class TorchCheckpoint(Format):
  """A .pth of the PyTorch port: model, EMA, Adam and step, or a state dict alone."""

  def recognises(self, head: bytes) -> bool:
    """Whether the file begins as `torch.save` lets it begin, in its new or its old format."""
    return head.startswith((torch_file.ZIP_MAGIC, torch_file.LEGACY_MAGIC))

  def read(self, path: pathlib.Path, config: ConfigDict) -> ImportedCheckpoint:
    """Reads a checkpoint. What it lacks beside the model is replaced, with a warning.

    Raises:
      UserError: if it has no model, or if its parts contradict each other.
    """
    content = torch_file.load(path)
    if isinstance(content, dict) and not _not_arrays(content):
      content = {'model': content}  # a state dict alone
    file = Contents(path, content, 'give a .pth as the PyTorch port saves it, or a state dict')
    model = _unwrapped(file)
    model.pop('sigmas', None)  # the noise levels, a buffer that the configuration determines

    # The moving averages and the optimizer have no names: they number the parameters in the order
    # of the model. The optimizer has all of them, but the averages only those that are trained,
    # which the Fourier frequencies, the only vectors named W, are not.
    frozen = {key: x for key, x in model.items() if key.endswith('.W') and x.ndim == 1}
    average = None
    if file.has('ema'):
      average = frozen | _average(file, [key for key in model if key not in frozen])
    else:
      logging.warning(
        f'{path} has no "ema" beside {enumerate_names(content)}: its parameters stand for their '
        f'moving average, and samples are those of the parameters themselves.'
      )
    count, mu, nu = _adam(file, model) if file.has('optimizer', 'state') else (0, {}, {})
    step = count
    if file.has('step'):
      step = file.count('step')
    else:
      source = 'the number of updates of its optimizer' if count else 'the start of training'
      logging.warning(f'{path} has no "step": it counts as of step {step}, {source}.')
    known = {
      'model.ema_rate': ('ema', 'decay'),
      'optim.beta1': ('optimizer', 'param_groups', 0, 'betas', 0),
      'optim.eps': ('optimizer', 'param_groups', 0, 'eps'),
    }
    if step > config.optim.warmup:  # until then the recorded rate is that of the warm-up
      known['optim.lr'] = ('optimizer', 'param_groups', 0, 'lr')

    names = _port_names(config, model)

    def ours(arrays: Arrays) -> dict[str, AnyArray]:
      # A name that our network does not have is kept, so that an error can name it.
      renamed = ((names.get(key, key), x) for key, x in arrays.items())
      return {name: _channels_last(name, x) for name, x in renamed}

    # The port's Adam has no state of parameters that never had a gradient; ours starts at zero.
    zeros = {key: np.zeros_like(x) for key, x in frozen.items()}
    return ImportedCheckpoint(
      step=step,
      params=ours(model),
      params_ema=average and ours(average),
      moments=AdamMoments(count, ours(zeros | mu), ours(zeros | nu)) if mu else None,
      settings={name: file.number(*keys) for name, keys in known.items() if file.has(*keys)},
    )


def _not_arrays(entries: Mapping[Any, Content]) -> set[Any]:
  """The keys of the entries that are not arrays."""
  return {key for key, x in entries.items() if not isinstance(x, np.ndarray)}


def _unwrapped(file: Contents) -> dict[str, AnyArray]:
  """The parameters of the model, under the names that they have without wrappers.

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
    file.refuse('has parameters in model whose names differ only by module. and _orig_mod.')
  return unwrapped


def _average(file: Contents, trained: list[str]) -> dict[str, AnyArray]:
  """The moving averages, by the name of the parameter."""
  shadow = file.at(list, 'ema', 'shadow_params')
  if len(shadow) != len(trained) or _not_arrays(dict(enumerate(shadow))):
    file.refuse(
      f'has {len(trained)} trained parameters in model, and the {len(shadow)} entries of '
      f'ema/shadow_params are not one tensor for each'
    )
  return dict(zip(trained, shadow, strict=True))


def _adam(file: Contents, model: Arrays) -> tuple[int, Arrays, Arrays]:
  """The number of Adam's updates, and its two moving averages, by the name of the parameter."""
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

  def averages(name: str) -> dict[str, AnyArray]:
    of = lambda number: file.at(np.ndarray, 'optimizer', 'state', number, name)
    return {key: of(number) for key, number in updated.items()}

  return counts.pop(), averages('exp_avg'), averages('exp_avg_sq')


def _channels_last(name: str, x: AnyArray) -> AnyArray:
  """Weights of convolutions (O, I, H, W) as (H, W, I, O), and of dense layers (O, I) as (I, O)."""
  # By our name: `weight` is that of our resampling convolutions, and has four axes too. Vectors are
  # biases and scales, and `W` of NIN is (I, O) in the port as well.
  if name.endswith(('/kernel', '/weight')) and x.ndim >= 2:
    return np.moveaxis(x, (1, 0), (-2, -1))
  return x


def _port_names(config: ConfigDict, keys: Iterable[str]) -> dict[str, str]:
  """Our path of each parameter, by its name in the PyTorch port."""
  _, _, params = mutils.abstract_model(config)
  paths = weights.flatten(params)
  if config.model.name.lower().startswith('ncsnv2'):
    return {_ncsnv2_name(path, paths): path for path in paths}
  # The place of a module in `all_modules` is its rank in the order of calls, but for gaps: modules
  # without weights, such as a resampling without convolution, may take a place too. The keys of the
  # file show which places have weights. If they are not as many as our modules with weights, the
  # file is of another network; then any numbers will do, since the names that do not fit are
  # reported anyway.
  order = _call_order(config)
  matches = (re.match(r'all_modules\.(\d{1,6})\.', key) for key in keys)
  found = sorted({int(match[1]) for match in matches if match})
  numbers = found if len(found) == len(order) else range(len(order))
  number = dict(zip(order, numbers, strict=True))
  names = {}
  for path in paths:
    # Inside a module the names are the same in both, but for two leaves: Flax calls the weight of
    # convolutions and dense layers 'kernel' and that of normalizations 'scale'.
    module, *inner, leaf = path.split('/')
    leaf = {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf)
    names['.'.join(['all_modules', str(number[module]), *inner, leaf])] = path
  return names


def _call_order(config: ConfigDict) -> list[str]:
  """Names of the network's submodules that have parameters, in the order of their calls."""
  called = {}  # for its keys, a set in the order of insertion

  def note(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    # Only direct children of the network are in the port's list; what they call inside is theirs.
    if context.method_name == '__call__' and len(context.module.path) == 1:
      called.setdefault(context.module.name)
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    _, _, params = mutils.abstract_model(config, anew=True)
  return [name for name in called if name in params]


def _ncsnv2_name(path: str, paths: Iterable[str]) -> str:
  """The port's name of a parameter of NCSNv2.

  The port names its modules after their roles; ours are numbered in the order of their calls.
  """
  stages = len({p.split('/')[0] for p in paths if p.startswith('RefineBlock_')})
  # The network of six stages is the one of five with a stage inserted behind the third, seen from
  # the input, and named 31. Refinements are numbered from the lowest resolution, so its refinement
  # comes before the third one.
  down = ['1', '2', '3', '31', '4', '5'] if stages == 6 else [str(i + 1) for i in range(stages)]
  up = ['1', '2', '31', '3', '4', '5'] if stages == 6 else down
  *modules, leaf = path.split('/')
  first, *inner = ((kind, int(i)) for kind, i in (module.rsplit('_', 1) for module in modules))
  leaf = {'kernel': 'weight'}.get(leaf, leaf)

  kind, i = first
  if kind == 'ResidualBlock':
    # Two blocks a stage. A block that pools has its second convolution and its shortcut inside
    # `ConvMeanPool`s, so its only plain convolution is the first.
    part, j = inner[0]
    names = {
      'InstanceNorm2dPlus': ['normalize1', 'normalize2'],
      'Conv': ['conv1', 'conv2', 'shortcut'],
      'ConvMeanPool': ['conv2.conv', 'shortcut.conv'],
    }
    return f'res{down[i // 2]}.{i % 2}.{names[part][j]}.{leaf}'
  if kind == 'RefineBlock':
    # An RCUBlock adapts each input, and one more comes last, at the output. The first refinement
    # has one input, the others two. An RCUBlock has two convolutions a unit.
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
