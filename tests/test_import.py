"""Checkpoints of other origin: what comes out is what was put in, or a sentence."""

import contextlib
import json
import lzma
import os
import pathlib
import pickle
import random
import subprocess
import zipfile

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import formats
import losses
import run_lib
import train_state
from configs.ve import mnist_ncsnpp_continuous
from configs.ve.ncsnv2 import cifar10 as cifar10_ncsnv2
from configs.vp.ddpm import cifar10 as cifar10_ddpm
from formats import torch_port
from models import utils as mutils
from modes import convert as conversion
from modes.preparation import prepare
from runtime import torch_file
from runtime.checkpoints import CheckpointDirectory
from runtime.errors import UserError
from tests import golden_values as golden
from tests import tiny_config
from tests.processes import ROOT, command
from tests.torch_files import tensor_program, write_pth, write_zip

STEP = 10002
REAL = ['port_checkpoint', 'port_checkpoint_legacy']


def ncsnpp_config(image_size=28):
  """The network of `golden/make_port_checkpoint.py`."""
  config = mnist_ncsnpp_continuous.get_config()
  config.data.image_size = image_size
  config.model.update(
    nf=4, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(image_size // 2,), ema_rate=0.999
  )
  config.model.fir = False
  config.model.progressive_input = 'none'
  config.optim.lr = 2e-4
  config.optim.warmup = 5000
  config.training.n_jitted_steps = 1
  return prepare(config)


def ddpm_config():
  config = cifar10_ddpm.get_config()
  config.data.image_size = 8
  config.model.update(nf=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
  return prepare(config)


def known_state(config):
  """A state whose every leaf is another function of its path."""
  like = train_state.abstract_state(config)[1]

  def filled(prefix):
    flat = {f'{prefix}{path}': leaf for path, leaf in golden.flatten(like.params).items()}
    tree = golden.filled_like(flax.traverse_util.unflatten_dict(flat, sep='/'))
    return tree if not prefix else tree[prefix.removesuffix('/')]

  params = filled('')
  opt_state = optax.tree_utils.tree_set(
    losses.get_optimizer(config).init(params),
    count=jnp.asarray(STEP, jnp.int32),
    mu=filled('mu/'),
    nu=jax.tree.map(jnp.square, filled('nu/')),
  )
  return losses.State(
    step=jnp.asarray(STEP, jnp.int32),
    params=params,
    params_ema=filled('ema/'),
    opt_state=opt_state,
    model_state={},
    ema_rate=config.model.ema_rate,
  )


def adam_of(state):
  return {
    name: optax.tree_utils.tree_get(
      state.opt_state, name, filtering=lambda path, _: path[-1].tuple_name == 'ScaleByAdamState'
    )
    for name in ('count', 'mu', 'nu')
  }


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_array_equal(a, b)


# Writers of the foreign formats.


def flax_content(state, config, leaf=lambda path, x: x):
  """The training state of the 2021 code; `leaf` gives what stands for a parameter's array."""
  adam = adam_of(state)

  def tree(params):
    flat = golden.flatten(params)
    flat = {path: leaf(path, np.asarray(x)) for path, x in flat.items()}
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  averages = jax.tree.map(
    lambda m, v: {'grad_ema': m, 'grad_sq_ema': v}, tree(adam['mu']), tree(adam['nu'])
  )
  return {
    'step': np.asarray(state.step),
    'optimizer': {
      'target': tree(state.params),
      'state': {'step': np.asarray(adam['count']), 'param_states': averages},
    },
    'lr': np.float32(config.optim.lr),
    'model_state': {},
    'ema_rate': np.float32(config.model.ema_rate),
    'params_ema': tree(state.params_ema),
    'rng': np.zeros(2, np.uint32),
  }


def write_flax(path, content):
  path.write_bytes(flax.serialization.msgpack_serialize(content))
  return str(path)


def listed(state, order):
  """Names in the port of a network that keeps its modules in a list, by path."""
  names = {
    path: f'all_modules.{number}.' + path.partition('/')[2].replace('/', '.')
    for number, module in enumerate(order)
    for path in golden.flatten(state.params)
    if path.startswith(f'{module}/')
  }
  return {
    path: name.replace('.kernel', '.weight').replace('.scale', '.weight')
    for path, name in names.items()
  }


def port_content(state, config, names):
  """What the port would save, its parameters named by path and in that order."""
  adam = adam_of(state)
  flats = [golden.flatten(t) for t in (state.params, state.params_ema, adam['mu'], adam['nu'])]

  def torch_layout(path, x):
    x = np.asarray(x)
    if path.endswith('/kernel'):
      x = x.T if x.ndim == 2 else x.transpose(3, 2, 0, 1)
    return x.reshape(-1) if x.shape[:3] == (1, 1, 1) else x

  assert len(names) == len(flats[0])
  model, ema, mu, nu = ([torch_layout(path, flat[path]) for path in names] for flat in flats)
  names = [f'module.{name}' for name in names.values()]
  group = {
    'lr': config.optim.lr,
    'betas': (0.9, 0.999),
    'eps': 1e-8,
    'params': list(range(len(names))),
  }
  states = {
    i: {'step': STEP, 'exp_avg': m, 'exp_avg_sq': v}
    for i, (m, v) in enumerate(zip(mu, nu, strict=True))
  }
  return {
    'optimizer': {'state': states, 'param_groups': [group]},
    'model': {'module.sigmas': np.ones(5, np.float32)} | dict(zip(names, model, strict=True)),
    'ema': {'decay': config.model.ema_rate, 'num_updates': STEP, 'shadow_params': ema},
    'step': STEP,
  }


def real_pth(name, tmp_path):
  """A file of torch.save, by PyTorch itself."""
  path = tmp_path / f'{name}.pth'
  path.write_bytes(lzma.decompress((golden.GOLDEN / f'{name}.pth.xz').read_bytes()))
  return str(path)


@pytest.fixture
def flax_file(tmp_path):
  config = tiny_config.get_config()
  return write_flax(tmp_path / 'checkpoint_24', flax_content(known_state(config), config))


# Round trips.


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('four_axes', [False, True])
def test_flax_checkpoint_of_2021_becomes_the_same_state(wrapped, four_axes, tmp_path):
  """Its normalization had leaves of shape (1, 1, 1, C) for a while."""
  config = ncsnpp_config()
  state = known_state(config)
  norm = lambda path: 'GroupNorm' in path and four_axes
  content = flax_content(state, config, lambda path, x: x[None, None, None] if norm(path) else x)
  if wrapped:
    content['optimizer']['target'] = {'params': content['optimizer']['target']}
    content['params_ema'] = {'params': content['params_ema']}
  read = conversion.read_state(config, write_flax(tmp_path / 'checkpoint', content))
  assert_same(read, state)


def test_next_step_after_a_flax_checkpoint_is_that_of_adam(tmp_path):
  config = tiny_config.get_config()
  config.optim.warmup = 20000  # so that it matters
  state = known_state(config)
  read = conversion.read_state(config, write_flax(tmp_path / 'c', flax_content(state, config)))
  grad = jax.tree.map(lambda w: 1e-3 * jnp.cos(7 * w), state.params)
  stepped = losses.optimization_manager(config)(read, grad)

  lr, t = config.optim.lr * STEP / 20000, STEP + 1
  adam = adam_of(state)

  def update(w, m, v, g):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    return w - lr * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + config.optim.eps)

  expected = jax.tree.map(update, state.params, adam['mu'], adam['nu'], grad)
  for a, b in zip(*map(jax.tree.leaves, (stepped.params, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_real_file_of_pytorch_gives_its_outputs_and_its_next_step(tmp_path):
  """Recorded from PyTorch by golden/make_port_checkpoint.py."""
  recorded = golden.load('port_checkpoint')
  config = ncsnpp_config(image_size=8)
  state, older = (conversion.read_state(config, real_pth(name, tmp_path)) for name in REAL)
  assert_same(older, state)
  assert (int(state.step), int(adam_of(state)['count'])) == (STEP, 2)
  model = mutils.create_model(config)
  output = jax.jit(
    lambda p: model.apply({'params': p}, recorded['x'], recorded['labels'], train=False),
    compiler_options={'xla_backend_optimization_level': 0},  # compiling takes longest
  )
  golden.assert_close(output(state.params), recorded['y'], 1e-5)
  golden.assert_close(output(state.params_ema), recorded['y_ema'], 1e-5)

  grad = jax.tree.map(lambda w: jnp.cos(7 * w), state.params)
  grad['GaussianFourierProjection_0'] = {'W': jnp.zeros(4)}
  stepped = jax.jit(losses.optimization_manager(config))(state, grad)
  golden.assert_close(output(stepped.params), recorded['y_next'], 1e-5)
  assert np.abs(recorded['y_next'] - recorded['y']).max() > 1e-3  # the step can be seen


DDPM_ORDER = [
  *('Dense_0', 'Dense_1', 'Conv_0', 'ResnetBlockDDPM_0', 'Downsample_0', 'ResnetBlockDDPM_1'),
  *('AttnBlock_0', 'ResnetBlockDDPM_2', 'AttnBlock_1', 'ResnetBlockDDPM_3', 'ResnetBlockDDPM_4'),
  *('ResnetBlockDDPM_5', 'AttnBlock_2', 'Upsample_0', 'ResnetBlockDDPM_6', 'ResnetBlockDDPM_7'),
  *('GroupNorm_0', 'Conv_1'),
]


@pytest.mark.slow
def test_ddpm_of_the_port_becomes_the_same_state(tmp_path):
  config = ddpm_config()
  state = known_state(config)
  content = port_content(state, config, listed(state, DDPM_ORDER))
  assert_same(conversion.read_state(config, write_pth(tmp_path / 'c.pth', content)), state)


def ncsnv2_names(stages, refines):
  """Names in the port: two residual blocks a stage, one refining block for each."""
  norm = ['alpha', 'gamma', 'beta']
  conv = ['weight', 'bias']
  names = {f'{m}.{x}' for m in ('begin_conv', 'end_conv') for x in conv}
  names |= {f'normalizer.{x}' for x in norm}
  for stage, shortcuts in stages.items():
    for i in range(2):
      names |= {f'res{stage}.{i}.normalize{j}.{x}' for j in (1, 2) for x in norm}
      pool = '.conv' if shortcuts[i] == 'pool' else ''
      convs = ['conv1', f'conv2{pool}', *([f'shortcut{pool}'] if shortcuts[i] else [])]
      names |= {f'res{stage}.{i}.{c}.{x}' for c in convs for x in conv}
  for number, refine in enumerate(refines):
    prefix = f'refine{refine}'
    inputs = 1 if number == 0 else 2
    blocks = 3 if number == len(refines) - 1 else 1
    for j in (1, 2):
      names |= {
        f'{prefix}.adapt_convs.{i}.{k}_{j}_conv.weight' for i in range(inputs) for k in (1, 2)
      }
      names |= {f'{prefix}.output_convs.{k + 1}_{j}_conv.weight' for k in range(blocks)}
      names.add(f'{prefix}.crp.convs.{j - 1}.weight')
      if number:
        names |= {f'{prefix}.msf.convs.{j - 1}.{x}' for x in conv}
  return names


@pytest.mark.parametrize(
  ('network', 'stages', 'refines'),
  [
    (
      've_ncsnv2',
      {'1': (None, None), '2': ('pool', None), '3': ('conv', None), '4': ('conv', None)},
      ['1', '2', '3', '4'],
    ),
    (
      've_ncsnv2_256',
      {'1': (None, None), **dict.fromkeys(('2', '3', '31'), ('pool', None))}
      | dict.fromkeys(('4', '5'), ('conv', None)),
      ['1', '2', '31', '3', '4', '5'],
    ),
  ],
)
def test_parameters_of_ncsnv2_get_their_names_in_the_port(network, stages, refines):
  paths = golden.load(f'net_{network}')['param_names'].tolist()
  names = {torch_port._ncsnv2_name(path, paths) for path in paths}
  assert names == ncsnv2_names(stages, refines)
  assert len(names) == len(paths)


@pytest.mark.parametrize(
  'network',
  ['ncsnv2_64', *(pytest.param(f'ncsnv2_{n}', marks=pytest.mark.slow) for n in (128, 256))],
)
def test_ncsnv2_of_the_port_becomes_the_same_state(network, tmp_path):
  config = cifar10_ncsnv2.get_config()
  config.data.image_size = 8
  config.model.update(name=network, nf=4)
  config = prepare(config)
  state = known_state(config)
  paths = list(golden.flatten(state.params))
  names = {path: torch_port._ncsnv2_name(path, paths) for path in paths}
  content = port_content(state, config, names)
  assert_same(conversion.read_state(config, write_pth(tmp_path / 'c.pth', content)), state)


@pytest.mark.slow
def test_gaps_in_the_module_list_and_no_moments_are_understood(tmp_path):
  """Modules without weights take a place; before the first step Adam has no state."""
  config = ddpm_config()
  config.model.resamp_with_conv = False
  state = known_state(config)
  order = [m for m in DDPM_ORDER if 'sample' not in m]
  content = port_content(state, config, listed(state, order))
  expected = conversion.read_state(config, write_pth(tmp_path / 'a.pth', content))
  order = [m if 'sample' not in m else 'none' for m in DDPM_ORDER]
  gaps = port_content(state, config, listed(state, order))
  gaps['optimizer']['state'] = {}
  read = conversion.read_state(config, write_pth(tmp_path / 'b.pth', gaps))
  assert_same(read.params, expected.params)
  assert int(adam_of(read)['count']) == 0
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(adam_of(read)['mu']))


def test_import_evaluates_export_and_import_again(flax_file, tmp_path):
  config = tiny_config.get_config()
  state = known_state(config)
  run_lib.import_checkpoint(config, str(tmp_path / 'a'), flax_file)
  like = train_state.abstract_state(config)[1]
  with CheckpointDirectory(tmp_path / 'a' / 'checkpoints') as snapshots:
    assert snapshots.numbers() == [1001]  # step 10002 of one every 10 steps, rounded up
    assert_same(snapshots.restore(1001, like), state)
  assert json.loads((tmp_path / 'a' / 'config.json').read_text())['model']['name'] == 'tiny'

  path = run_lib.export_checkpoint(config, str(tmp_path / 'a'))
  assert path.name == f'export_{STEP}.safetensors'
  arrays = safetensors.numpy.load_file(path)
  np.testing.assert_array_equal(
    arrays['params/Conv_0/kernel'], state.params_ema['Conv_0']['kernel']
  )
  again = run_lib.import_checkpoint(config, str(tmp_path / 'b'), str(path))
  assert_same(again.params, state.params_ema)
  assert_same(again.params_ema, state.params_ema)
  assert (int(again.step), int(adam_of(again)['count'])) == (STEP, 0)

  # What has been done is not done again, nor refused: the command may have been killed at its end.
  times = {file: file.stat().st_mtime_ns for file in (tmp_path / 'a').rglob('checkpoint*/**/*')}
  before = path.read_bytes()
  assert run_lib.export_checkpoint(config, str(tmp_path / 'a')) == path
  path.rename(tmp_path / 'moved')
  assert run_lib.export_checkpoint(config, str(tmp_path / 'a')) == path
  assert path.read_bytes() == before
  run_lib.import_checkpoint(config, str(tmp_path / 'a'), flax_file)
  assert times == {file: file.stat().st_mtime_ns for file in times}
  with pytest.raises(UserError, match='already has checkpoints'):
    run_lib.import_checkpoint(config, str(tmp_path / 'a'), str(path))
  path.write_text('another file')
  with pytest.raises(UserError, match='exists'):
    run_lib.export_checkpoint(config, str(tmp_path / 'a'))
  with pytest.raises(UserError, match='checkpoint_number=3 is not in .* it has .1001'):
    run_lib.export_checkpoint(config, str(tmp_path / 'a'), number=3)
  with pytest.raises(UserError, match='holds no checkpoint'):
    run_lib.export_checkpoint(config, str(tmp_path / 'nothing'))
  config.model.width = 16
  with pytest.raises(UserError, match='another configuration'):
    run_lib.export_checkpoint(config, str(tmp_path / 'a'), checkpoint=str(tmp_path / 'x'))


def test_an_export_in_half_precision_rounds_weights_once(flax_file, tmp_path):
  config = tiny_config.get_config()
  run_lib.import_checkpoint(config, str(tmp_path / 'a'), flax_file)
  paths = [
    run_lib.export_checkpoint(
      config, str(tmp_path / 'a'), checkpoint=str(tmp_path / dtype), dtype=dtype
    )
    for dtype in ('float32', 'float16')
  ]
  whole, half = (safetensors.numpy.load_file(path) for path in paths)
  read = golden.flatten(conversion.read_state(prepare(config), str(paths[1])).params)
  for name, x in whole.items():
    assert half[name].dtype == np.float16
    again = read[name.removeprefix('params/')]
    assert again.dtype == np.float32
    # Half a unit in the last place of eleven bits; below 2^-14, of subnormal numbers.
    np.testing.assert_allclose(again, x, rtol=2**-11, atol=2**-25)
  assert any((half[name] != x).any() for name, x in whole.items())


def test_what_half_precision_would_spoil_is_kept_or_refused(tmp_path, monkeypatch):
  config = tiny_config.get_config()
  state = train_state.init_state(jax.random.key(0), prepare(config))[1]
  exported = lambda weight, path, **options: run_lib.export_checkpoint(
    with_weight(weight), str(tmp_path), checkpoint=str(tmp_path / path), **options
  )

  def with_weight(weight):
    changed = state.replace(params_ema={'Fourier_0': {'W': jnp.asarray(weight)}})
    monkeypatch.setattr(conversion, 'check_weights', lambda *_: None)
    monkeypatch.setattr(conversion, 'load_weights', lambda *_: (None, changed))
    return config

  frequencies = np.float32([16.03, 1e6])
  path = exported(frequencies, 'a', dtype='float16')
  np.testing.assert_array_equal(
    safetensors.numpy.load_file(path)['params/Fourier_0/W'], frequencies
  )
  with pytest.raises(UserError, match=r'Fourier_0/W has a weight of 7e\+04, .* --dtype=float32'):
    exported(np.float32([[1, -7e4]]), 'b', dtype='float16')
  with pytest.raises(UserError, match='Unknown --dtype=int8: choose float32 or float16'):
    exported(frequencies, 'c', dtype='int8')
  assert not (tmp_path / 'b').exists()


@pytest.mark.slow
def test_training_goes_on_from_an_imported_checkpoint(flax_file, tmp_path):
  config = tiny_config.get_config()
  run_lib.import_checkpoint(config, str(tmp_path / 'run'), flax_file)
  config.training.n_iters = STEP + 3
  config.training.snapshot_sampling = False
  run_lib.train(config, str(tmp_path / 'run'))
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  steps = [json.loads(line)['step'] for line in lines if 'training_loss' in line]
  assert steps == [STEP + 1, STEP + 2, STEP + 3]


def test_leading_axes_of_length_one_come_and_go_and_no_others():
  fit = lambda given, wanted: conversion._fit('', {'a': np.zeros(given)}, {'a': np.zeros(wanted)})
  assert fit((3,), (1, 1, 1, 3))['a'].shape == (1, 1, 1, 3)
  assert fit((1, 1, 1, 3), (3,))['a'].shape == (3,)
  assert fit((1, 1, 1, 1), (1,))['a'].shape == (1,)
  for given, wanted in [((3, 1), (3,)), ((1, 3), (3, 1)), ((2, 3), (6,)), ((), (2,))]:
    with pytest.raises(UserError, match='of another shape'):
      fit(given, wanted)


# Files of the port that say less, or name things otherwise.


@pytest.fixture(scope='module')
def port():
  """A configuration, a state and what the port would save of it."""
  config = tiny_config.get_config()
  state = known_state(config)
  names = listed(state, ['Dense_0', 'Conv_0', 'GroupNorm_0', 'Conv_1'])
  return config, state, port_content(state, config, names)


def renamed(model, rename):
  return {rename(name.removeprefix('module.')): x for name, x in model.items()}


@pytest.mark.parametrize('prefix', ['', '_orig_mod.module.', 'module._orig_mod.module.module.'])
def test_wrappers_leave_no_trace_in_the_names(prefix, port, tmp_path):
  config, state, content = port
  model = renamed(content['model'], lambda name: prefix + name.replace('.0.', '.0._orig_mod.'))
  file = write_pth(tmp_path / 'c.pth', content | {'model': model})
  assert_same(conversion.read_state(config, file), state)


@pytest.mark.parametrize('optimizer', [None, {}, {'state': {}, 'param_groups': []}, 'absent'])
def test_without_an_optimizer_adam_starts_anew_and_says_so(optimizer, port, tmp_path, caplog):
  config, state, content = port
  content = content | {'optimizer': optimizer}
  if optimizer == 'absent':
    del content['optimizer']
  read = conversion.read_state(config, write_pth(tmp_path / 'c.pth', content))
  fresh = train_state.first_state(config, {}, state.params)
  assert_same(adam_of(read), adam_of(fresh))
  assert_same((read.params, read.params_ema), (state.params, state.params_ema))
  assert int(read.step) == STEP
  assert 'c.pth has no state of an optimizer: Adam starts anew' in caplog.text


def test_without_a_step_it_is_that_of_the_optimizer_or_zero(port, tmp_path, caplog):
  config, state, content = port
  content = {name: x for name, x in content.items() if name != 'step'}
  read = conversion.read_state(config, write_pth(tmp_path / 'a.pth', content))
  assert_same(read, state)
  assert f'a.pth has no "step": it counts as of step {STEP}, the number of updates' in caplog.text
  del content['optimizer']
  read = conversion.read_state(config, write_pth(tmp_path / 'b.pth', content))
  assert int(read.step) == 0
  assert 'b.pth has no "step": it counts as of step 0' in caplog.text


@pytest.mark.parametrize('alone', [True, False])
def test_without_an_average_the_parameters_stand_for_it_with_a_warning(
  alone, port, tmp_path, caplog
):
  config, state, content = port
  other = {'ema_model': content['ema'], 'ema': None}  # no name of an average is guessed
  content = content['model'] if alone else content | other
  read = conversion.read_state(config, write_pth(tmp_path / 'c.pth', content))
  assert_same(read.params, state.params)
  assert_same(read.params_ema, state.params)
  assert int(read.step) == (0 if alone else STEP)
  beside = 'model' if alone else 'ema, ema_model, model, optimizer, step'
  assert f'c.pth has no "ema" beside {beside}: its parameters stand for their' in caplog.text


def changed(content, value, *keys):
  """A copy of dictionaries and lists with one value replaced, or left out if it is `...`."""
  if not keys:
    return value
  key, *inner = keys
  copy = content.copy()
  copy[key] = changed(copy.get(key) if isinstance(copy, dict) else copy[key], value, *inner)
  if copy[key] is ...:
    del copy[key]
  return copy


ADAM = ('optimizer', 'state', 2)


@pytest.mark.parametrize(
  ('keys', 'value', 'found'),
  [
    (['model'], ..., 'has no model (it is a dictionary of ema, optimizer, step): give a .pth as'),
    (
      ['model'],
      [1, 2],
      'has a value of type list of length 2 as model, where one of type dict must',
    ),
    (['model', 'epoch'], 7, 'has entries in model that are not tensors, epoch'),
    (['model', 'all_modules.0.bias'], np.zeros(8, np.float32), 'differ only by module.'),
    (['ema', 'shadow_params', 1], ..., 'has 8 trained parameters in model, and the 7 entries of'),
    (['ema', 'shadow_params', 1], {}, 'the 8 entries of ema/shadow_params are not one tensor'),
    (['ema', 'shadow_params'], ..., 'has no ema/shadow_params (ema is a dictionary of decay, num_'),
    (
      ['ema', 'decay'],
      [[]],
      'has a value of type list of length 1 as ema/decay, where a number must be',
    ),
    (['step'], 'many', 'has a value of type str of length 4 as step, where a number must be'),
    (['step'], 2.5, 'has step=2.5, which must be a whole number'),
    (['step'], -1, 'has step=-1, which must be a whole number'),
    (['step'], 2**80, 'has step=1.20893e+24, which must be a whole number'),
    ([*ADAM, 'step'], 3, 'has parameters with different numbers of updates, 10002, 3'),
    (
      [*ADAM, 'exp_avg'],
      ...,
      'has no optimizer/state/2/exp_avg (optimizer/state/2 is a dictionary',
    ),
    (['optimizer', 'state'], {'0': {}}, 'of optimizer, 0 of them with a state'),
    (
      ['optimizer', 'param_groups', 0, 'params', 3],
      ...,
      'has 8 parameters in model, and 7 in the param_groups of optimizer, 7 of them with a state',
    ),
    (['optimizer', 'param_groups'], ..., 'has no optimizer/param_groups (optimizer is a diction'),
  ],
)
def test_a_file_of_the_port_with_gaps_is_refused_with_what_it_has(
  keys, value, found, port, tmp_path
):
  config, _, content = port
  file = write_pth(tmp_path / 'c.pth', changed(content, value, *keys))
  with pytest.raises(UserError) as error:
    conversion.read_state(config, file)
  message = str(error.value)
  assert message.startswith(f'{file} ')
  assert found in message
  assert message.endswith(': give a .pth as the PyTorch port saves it, or a state dict.')
  assert 'Error' not in message


def test_files_of_other_programs_are_refused_with_what_they_have(tmp_path):
  config = tiny_config.get_config()
  array = np.zeros((2, 2), np.float32)
  content = {'step': 3, 'params': {'Dense_0': {'kernel': array}}, 'opt_state': {}}
  message = refused(config, write_flax(tmp_path / 'flax', content), tmp_path)
  assert 'has no optimizer (it is a dictionary of opt_state, params, step): give a' in message

  tensors = {f'down_blocks.{i}.weight': array for i in range(10)}
  for metadata in (None, {'format': 'pt'}):
    safetensors.numpy.save_file(tensors, tmp_path / 's', metadata)
    message = refused(config, str(tmp_path / 's'), tmp_path)
    assert '10 tensors (down_blocks.0.weight, ' in message
    assert 'down_blocks.7.weight and 2 more)' in message
    assert f'metadata ({"format" if metadata else "none"})' in message
  for step in ('-1', '1.5', '9' * 5000):
    safetensors.numpy.save_file({'params/x': array}, tmp_path / 's', {'step': step})
    assert 'is not of --mode=export' in refused(config, str(tmp_path / 's'), tmp_path)


# What does not fit.


def refused(config, file, tmp_path):
  """The sentence that an import ends with; it leaves nothing."""
  workdir = tmp_path / 'untouched' / 'run'
  with pytest.raises(UserError) as error:
    run_lib.import_checkpoint(config, str(workdir), file)
  assert not workdir.parent.exists()
  return str(error.value)


def test_names_that_do_not_fit_are_reported(tmp_path):
  config = tiny_config.get_config()
  content = flax_content(known_state(config), config)
  target = content['optimizer']['target']
  target['Extra_0'] = target.pop('Conv_1')
  target['Conv_0']['bias'] = np.zeros(5, np.float32)
  message = refused(config, write_flax(tmp_path / 'c', content), tmp_path)
  assert 'missing: Conv_1/bias, Conv_1/kernel; unexpected: Extra_0/bias, Extra_0/kernel' in message
  assert 'of another shape: Conv_0/bias (5,) instead of (8,)' in message

  content = flax_content(known_state(config), config)
  del content['optimizer']['state']['param_states']['Dense_0']
  message = refused(config, write_flax(tmp_path / 'c', content), tmp_path)
  assert 'its first moments: missing: Dense_0/bias, Dense_0/kernel' in message

  content = flax_content(known_state(config), config, lambda path, x: x * np.nan)
  message = refused(config, write_flax(tmp_path / 'c', content), tmp_path)
  assert 'not finite: Conv_0/bias' in message


@pytest.mark.slow
def test_names_of_the_port_that_do_not_fit_are_reported(tmp_path):
  config = ddpm_config()
  state = known_state(config)
  content = port_content(state, config, listed(state, DDPM_ORDER))
  wrong = ddpm_config()
  wrong.model.ch_mult = (1, 2, 2)
  message = refused(wrong, write_pth(tmp_path / 'c.pth', content), tmp_path)
  assert 'missing: ' in message
  assert ' more; ' in message  # a long list is cut

  del content['model']['module.all_modules.0.weight']
  del content['ema']['shadow_params'][1]
  content['optimizer']['param_groups'][0]['params'].pop(1)
  message = refused(config, write_pth(tmp_path / 'c.pth', content), tmp_path)
  assert message.endswith(
    'its parameters: missing: Dense_0/kernel. Give the configuration that the file was trained '
    'with.'
  )


def test_settings_that_contradict_the_file_are_refused(flax_file, tmp_path):
  config = tiny_config.get_config()
  config.optim.lr = 1e-5
  message = refused(config, flax_file, tmp_path)
  assert (
    'optim.lr=0.0002, and the configuration says 1e-05: add --config.optim.lr=0.0002' in message
  )
  config = tiny_config.get_config()
  for name in ('n_jitted_steps', 'log_freq', 'eval_freq', 'snapshot_freq'):
    config.training[name] = 5
  message = refused(config, flax_file, tmp_path)
  assert 'step 10002, no multiple of training.n_jitted_steps=5' in message


# Damage and malice.


@pytest.mark.parametrize(
  'kind', ['flax', *(pytest.param(kind, marks=pytest.mark.slow) for kind in REAL), 'safetensors']
)
def test_truncated_and_corrupted_files_are_refused_and_leave_nothing(kind, flax_file, tmp_path):
  config, path = tiny_config.get_config(), flax_file
  if kind in REAL:
    config = ncsnpp_config()
    data = pathlib.Path(real_pth(kind, tmp_path)).read_bytes()
  elif kind == 'safetensors':
    arrays = {
      f'params/{name}': np.asarray(x)
      for name, x in golden.flatten(known_state(config).params).items()
    }
    data = safetensors.numpy.save(arrays, {'step': '3'})
  else:
    data = pathlib.Path(flax_file).read_bytes()
  path = tmp_path / 'bad'
  rng = random.Random(0)
  for length in [0, 1, 9, 100, len(data) // 2, len(data) - 1]:
    path.write_bytes(data[:length])
    assert '--checkpoint=' in refused(config, str(path), tmp_path)
  for _ in range(10 if kind in REAL else 40):
    bad = bytearray(data)
    for _ in range(rng.choice([1, 8])):
      # The beginning and the end hold the structure.
      where = rng.choice([rng.randrange(len(bad)), rng.randrange(300), -rng.randrange(1, 300)])
      bad[where] ^= 1 << rng.randrange(8)
    path.write_bytes(bad)
    with contextlib.suppress(UserError):  # no format but ZIP notices a wrong bit in a weight
      conversion.read_state(config, str(path))


def test_absent_unnamed_and_unknown_files_are_refused(tmp_path):
  config = tiny_config.get_config()
  assert 'needs the file' in refused(config, None, tmp_path)
  assert 'No such file' in refused(config, str(tmp_path / 'absent'), tmp_path)
  assert 'Is a directory' in refused(config, str(tmp_path), tmp_path)
  (tmp_path / 'text').write_text('hello')
  assert 'is of no known format' in refused(config, str(tmp_path / 'text'), tmp_path)


def test_a_file_is_recognised_as_one_format_only(flax_file):
  """The length that safetensors begins with can be any byte of MessagePack."""
  known = [formats.FlaxCheckpoint(), formats.TorchCheckpoint(), formats.Safetensors()]
  array = {'params/x': np.zeros(1, np.float32)}
  heads = [safetensors.numpy.save(array, {'step': '0' * n})[:64] for n in range(0, 70000, 8)]
  assert {head[0] for head in heads} >= set(range(0x80, 0xE0, 8))
  for head in heads:
    assert [f.recognises(head) for f in known] == [False, False, True]
  head = pathlib.Path(flax_file).read_bytes()[:64]
  assert [f.recognises(head) for f in known] == [True, False, False]
  assert [f.recognises(torch_file.LEGACY_MAGIC) for f in known] == [False, True, False]


class Runs:
  """An object whose pickle calls a function."""

  def __init__(self, function, *arguments):
    self.reduced = (function, arguments)

  def __reduce__(self):
    return self.reduced


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
  ('function', 'name'),
  [(os.system, 'posix.system'), (eval, '__builtin__.eval'), (os.remove, 'posix.remove')],
)
def test_pickle_that_would_run_something_is_refused_and_not_run(function, name, legacy, tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('here')
  argument = {
    os.system: f'rm {victim}',
    os.remove: str(victim),
    eval: f'__import__("os").remove({str(victim)!r})',
  }[function]
  program = pickle.dumps({'model': Runs(function, argument)}, protocol=2)
  file = tmp_path / 'evil.pth'
  if legacy:
    file.write_bytes(torch_file.LEGACY_MAGIC + program)
  else:
    write_zip(file, program, {})
  message = refused(ncsnpp_config(), str(file), tmp_path)
  assert f'names the Python object {name}, which' in message
  assert victim.exists()


def test_tensors_are_views_with_offset_and_strides(tmp_path):
  values = np.arange(6, dtype=np.float32)
  path = tmp_path / 'view.pth'
  write_zip(path, tensor_program(1, (2, 2), (1, 2)), {'0': values})
  np.testing.assert_array_equal(torch_file.load(path), [[1, 3], [2, 4]])


@pytest.mark.parametrize(
  ('offset', 'size', 'stride', 'count'),
  [
    (0, (7,), (1,), 6),
    (3, (2, 2), (2, 1), 6),
    (-1, (2,), (1,), 6),
    (0, (2,), (-1,), 6),
    (0, (-2,), (1,), 6),
    (0, (2, 2), (1,), 6),
    (0, (2**31 - 1,), (2**31 - 1,), 6),
    (0, (7,), (1,), 7),
    (0, (7,), (1,), 2**31 - 1),
  ],
)
def test_tensors_beyond_their_storage_are_refused(offset, size, stride, count, tmp_path):
  path = tmp_path / 'beyond.pth'
  program = tensor_program(offset, size, stride, count)
  write_zip(path, program, {'0': np.arange(6, dtype=np.float32)})
  with pytest.raises((ValueError, TypeError)):
    torch_file.load(path)
  path.write_bytes(b''.join([torch_file.LEGACY_MAGIC, *[b'\x80\x02}.'] * 2, program]))
  with pytest.raises((ValueError, TypeError, EOFError)):
    torch_file.load(path)


def test_pickle_that_asks_for_much_memory_is_refused(tmp_path):
  path = write_zip(tmp_path / 'huge.pth', b'\x80\x02}r\xff\xff\xff\x7f.', {})
  assert torch_file.load(pathlib.Path(path)) == {}  # a place in memory is only a name for it
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('archive/data.pkl', b'\x80\x02' + b'}0' * 100000 + b'}.')
  assert 'larger than the file allows' in refused(ncsnpp_config(), path, tmp_path)


@pytest.mark.slow
def test_command_line_imports_and_refuses_in_a_sentence(flax_file, tmp_path):
  def run(mode, *flags):
    return subprocess.run(
      command(tmp_path / 'run', *flags, mode=mode), cwd=ROOT, capture_output=True, text=True
    )

  bad = tmp_path / 'bad.pth'
  write_zip(bad, pickle.dumps(Runs(os.system, 'true'), protocol=2), {})
  result = run('import', f'--checkpoint={bad}')
  assert result.returncode == 1
  assert 'posix.system' in result.stderr
  assert 'Traceback' not in result.stderr
  assert not (tmp_path / 'run').exists()
  result = run('import', f'--checkpoint={flax_file}')
  assert result.returncode == 0, result.stderr
  result = run('export', f'--checkpoint={tmp_path / "ours.safetensors"}')
  assert result.returncode == 0, result.stderr
  assert (tmp_path / 'ours.safetensors').stat().st_size > 1000


def test_an_export_is_refused_under_another_sde_than_its_own(flax_file, tmp_path):
  config = tiny_config.get_config()
  run_lib.import_checkpoint(config, str(tmp_path / 'a'), flax_file)
  path = run_lib.export_checkpoint(config, str(tmp_path / 'a'))
  for name, value, message in (
    ('beta_max', 10.0, 'trained with model.beta_max=20, and the configuration says 10'),
    ('num_scales', 30, 'trained with model.num_scales=5, .* add --config.model.num_scales=5'),
  ):
    other = tiny_config.get_config()
    other.model[name] = value
    with pytest.raises(UserError, match=message):
      conversion.read_state(prepare(other), str(path))
