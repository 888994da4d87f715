"""The reference's 39 configurations, value by value, and every difference with its reason."""

import importlib
import json
import math

import pytest

import sde_lib
from models import utils
from modes.preparation import prepare
from runtime import configuration
from runtime.errors import UserError
from tests.golden_values import GOLDEN, configure

RECORDED = json.loads((GOLDEN / 'configs.json').read_text())
ABSENT = None  # no value of the reference is null

_256 = {
  've/bedroom_ncsnpp_continuous',
  've/celebahq_256_ncsnpp_continuous',
  've/church_ncsnpp_continuous',
  've/ffhq_256_ncsnpp_continuous',
  've/ncsnv2/bedroom',
  'vp/ddpm/bedroom',
  'vp/ddpm/celebahq',
  'vp/ddpm/church',
}
_1024 = {'ve/celebahq_ncsnpp_continuous', 've/ffhq_ncsnpp_continuous'}
_DEEP = {name for name in RECORDED if '_deep_' in name}
_ALL = set(RECORDED)


def _having(key):
  return {name for name in RECORDED if key in RECORDED[name]}


UNREAD = 'neither the network nor the SDE of these has the field'
_DDPM = {name for name in RECORDED if 'ddpm' in name.replace('ddpmpp', '')}
_NCSN = {name for name in RECORDED if '/ncsn' in name and '/ncsnpp' not in name}

# (key, reference, ours, configurations, reason). A value of ... stands for any.
DIFFERENCES = [
  # Values that cannot be what was meant.
  ('eval.batch_size', 1024, 8, _1024, 'no device holds 1,024 images of 1024px'),
  ('eval.begin_ckpt', 50, 1, _256, 'n_iters / snapshot_freq is 48: there is no checkpoint 50'),
  ('eval.end_ckpt', 96, 48, _256 | _1024, 'n_iters / snapshot_freq is 48'),
  ('eval.end_ckpt', 26, 19, _DEEP, 'n_iters / snapshot_freq is 19'),
  (
    'training.continuous',
    True,
    False,
    {'ve/ncsnv2/bedroom'},
    'true only because its key was misspelt: NCSNv2 is trained on discrete noise levels',
  ),
  ('training.continuouse', False, ABSENT, {'ve/ncsnv2/bedroom'}, 'that misspelt key'),
  # Keys that no code of the reference reads, or that have a single value.
  ('model.attention_type', 'ddpm', ABSENT, _having('model.attention_type'), 'read by nothing'),
  ('model.conv_size', 3, ABSENT, _having('model.conv_size'), 'read by nothing'),
  ('model.interpolation', 'bilinear', ABSENT, _having('model.interpolation'), 'the only one'),
  ('model.sigma_begin', 90, ABSENT, {'ve/celeba_ncsnpp'}, 'an old name of sigma_max, also 90'),
  ('optim.amsgrad', False, ABSENT, _having('optim.amsgrad'), 'read by nothing'),
  ('training.loss', 'vesde', ABSENT, {'ve/ncsn/celeba'}, 'an old name of training.sde'),
  ('model.embedding_type', 'fourier', 'positional', _DDPM | _NCSN, UNREAD),
  ('model.normalization', 'GroupNorm', ABSENT, _DDPM, UNREAD),
  # Keys that ours adds.
  ('training.sde', ABSENT, 'vesde', {'ve/ncsn/celeba'}, 'the reference reads it and has none'),
  ('training.n_jitted_steps', ABSENT, 5, _1024, 'the reference reads it and has none'),
  ('eval.enable_loss', ABSENT, True, _1024, 'the reference reads it and has none'),
  ('eval.enable_bpd', ABSENT, False, _1024, 'the reference reads it and has none'),
  ('eval.enable_sampling', ABSENT, False, _1024, 'the reference reads it and has none'),
  ('eval.bpd_dataset', ABSENT, 'test', _1024, 'the reference reads it and has none'),
  ('model.beta_min', ABSENT, 0.1, _1024, 'of the VP SDEs, which these do not use'),
  ('model.beta_max', ABSENT, 20.0, _1024, 'of the VP SDEs, which these do not use'),
  (
    'model.num_classes',
    ABSENT,
    ...,
    _NCSN,
    'noise levels that NCSN is conditioned on, which the reference forgets',
  ),
  (
    'model.fourier_scale',
    ABSENT,
    16.0,
    {'ve/celeba_ncsnpp', 've/cifar10_ncsnpp', 'vp/cifar10_ncsnpp'},
    'of the Fourier embedding, which these do not use',
  ),
  *[
    (key, ABSENT, ..., _ALL, 'a setting of what is new here')
    for key in (
      'training.debug_nans',
      'training.grad_accum_steps',
      'training.keep_checkpoints',
      'training.max_skipped_steps',
      'training.on_nonfinite',
      'model.matmul_precision',
      *(f'model.{key}' for key in ('dtype', 'remat', 'remat_policy')),
      'parallel.fsdp',
      'parallel.spatial',
      *(f'data.{key}' for key in ('path', 'cache_dir', 'num_workers', 'on_device', 'max_bad')),
      *(f'eval.{key}' for key in ('bpd_repeats', 'extractor', 'inception_path', 'wait_seconds')),
      *(f'eval.{key}' for key in ('stats_path', 'stats_split', 'stats_features')),
      'eval.sigma_max_images',
      *(f'sampling.{key}' for key in ('n_steps', 'time_grid', 'rho', 'eta', 'churn')),
      *(f'sampling.{key}' for key in ('ode_solver', 'rtol', 'atol', 'per_image_seeds')),
      *(f'sampling.{key}' for key in ('task', 'mask', 'superres_factor', 'label')),
      *(f'sampling.{key}' for key in ('guidance_scale', 'num_samples', 'batch_size')),
      'sampling.trajectory_every',
    )
  ],
]
# Whole sections that the reference keeps in constants of its code.
NEW_SECTIONS = ('likelihood.', 'classifier.')


def ours(name):
  config = importlib.import_module('configs.' + name.replace('/', '.')).get_config()
  return configuration.flatten(config)


def has_field(name, key):
  """Whether the network or the SDE of the configuration has the field."""
  config = ours(name)
  fields = utils.MODELS.fields(config['model.name']) | sde_lib.SDES.fields(config['training.sde'])
  return key.removeprefix('model.') in fields


def explained(name, key, theirs, mine):
  same = lambda listed, value: listed is ... or listed == value
  if any(
    key == listed and name in names and same(reference, theirs) and same(here, mine)
    for listed, reference, here, names, _ in DIFFERENCES
  ):
    return True
  return theirs is ABSENT and key.startswith(NEW_SECTIONS)


def same_value(theirs, mine):
  if isinstance(theirs, (int, float)) and isinstance(mine, (int, float)):
    return math.isclose(theirs, mine) and isinstance(theirs, bool) == isinstance(mine, bool)
  return theirs == mine


@pytest.mark.parametrize('name', RECORDED)
def test_configuration_has_the_reference_values_but_for_the_listed_differences(name):
  theirs, mine = RECORDED[name], ours(name)
  unexplained = {
    key: (theirs.get(key), mine.get(key))
    for key in theirs.keys() | mine.keys()
    if not same_value(theirs.get(key), mine.get(key))
    and not explained(name, key, theirs.get(key), mine.get(key))
  }
  assert not unexplained


@pytest.mark.parametrize(('key', 'reference', 'here', 'names', 'reason'), DIFFERENCES)
def test_every_listed_difference_is_there(key, reference, here, names, reason):
  for name in names:
    theirs, mine = RECORDED[name].get(key), ours(name).get(key)
    assert theirs == reference, name
    assert here is ... or mine == here, name
    assert theirs != mine, name
    assert reason != UNREAD or not has_field(name, key), name


def with_key(name, key, value):
  config = configure(name, {})
  with config.unlocked():
    section, _, field = key.rpartition('.')
    (config[section] if section else config)[field] = value
  return config


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('data.tfrecords_path', '/data/ffhq-r10.tfrecords'),
    ('model.attention_type', 'ddpm'),
    ('model.conv_size', 3),
    ('model.interpolation', 'bilinear'),
    ('model.sigma_begin', 50),
    ('optim.amsgrad', False),
    ('training.loss', 'vpsde'),
    ('device', object()),  # a torch.device in the PyTorch port
  ],
)
def test_keys_of_the_reference_that_nothing_reads_are_accepted(key, value):
  config = prepare(with_key('vp/cifar10_ddpmpp_continuous', key, value))
  plain = prepare(configure('vp/cifar10_ddpmpp_continuous', {}))
  kept = configuration.flatten(config)
  kept.pop('data.tfrecords_path', None)  # read by the data sets of the tools that made the files
  assert kept == configuration.flatten(plain)


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('model.interpolation', 'nearest', "model.interpolation='nearest' .* 'bilinear'"),
    ('model.conv_size', 5, 'model.conv_size=5 .* 3'),
    ('model.attention_type', 'linear', "model.attention_type='linear' .* 'ddpm'"),
    ('model.sigma_begin', 90, 'model.sigma_begin=90 .* 50'),
    ('optim.amsgrad', True, 'optim.amsgrad=True .* False'),
    ('training.loss', 'vesde', "training.loss='vesde' .* 'vpsde'"),
    ('training.continuouse', False, "key 'continuouse'.*Did you mean continuous"),
  ],
)
def test_keys_of_the_reference_with_a_value_that_would_be_ignored_are_refused(key, value, message):
  with pytest.raises(UserError, match=message):
    prepare(with_key('vp/cifar10_ddpmpp_continuous', key, value))
