"""What a configuration may hold: checked before anything expensive starts."""

import difflib
import json
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

import controllable_generation
import datasets
import losses
import sampling
import sde_lib
from configs.default_cifar10_configs import get_default_configs
from models import utils as mutils
from runtime.errors import UserError

# Keys of the reference's configurations that nothing reads, and the one value that they may have:
# any other would be ignored without a word.
LEGACY: dict[str, Callable[[Any], Any]] = {
  'model.attention_type': lambda config: 'ddpm',
  'model.conv_size': lambda config: 3,
  'model.interpolation': lambda config: 'bilinear',
  'model.sigma_begin': lambda config: config.model.sigma_max,
  'optim.amsgrad': lambda config: False,
  'training.loss': lambda config: config.training.sde,
}

# Keys that only some data sets read; a configuration may keep them beside another data set.
_DATA_KEYS = ('tfrecords_path', 'category')

# Streams of random numbers, each a fold of the seed; new ones come last.
STREAMS = ('init', 'train', 'eval', 'sample', 'sample_mode', 'bpd')

FREQUENCIES = ('log_freq', 'eval_freq', 'snapshot_freq', 'snapshot_freq_for_preemption')


def prepare(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The complete configuration: absent keys of the common sections filled in, everything checked.

  Raises:
    UserError: one sentence on the first thing that is wrong.
  """
  complete = get_default_configs()
  with complete.unlocked():
    for section, values in _without_legacy(config).items():
      if section not in complete:
        raise UserError(_unknown('section', section, complete.keys()))
      if isinstance(values, ml_collections.ConfigDict) != isinstance(
        complete[section], ml_collections.ConfigDict
      ):
        raise UserError(f'config.{section}={values!r} is not what belongs there.')
      if not isinstance(values, ml_collections.ConfigDict):
        _check_type(section, values, complete[section])
        complete[section] = values
        continue
      known = _known_fields(section, config, complete)
      for key, value in values.items():
        if key not in known:
          raise UserError(_unknown(f'config.{section} key', key, known))
        if known[key] is not None:
          _check_type(f'{section}.{key}', value, known[key])
        complete[section][key] = value
  _check_values(complete)
  return complete


def _without_legacy(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The configuration without the keys of the reference that nothing reads.

  Raises:
    UserError: if one has a value that would be ignored.
  """
  config = config.copy_and_resolve_references()
  config.unlock()
  if 'device' in config:  # JAX uses all devices that there are
    del config['device']
  for name, meant in LEGACY.items():
    section, key = name.split('.')
    if key not in config.get(section, {}):
      continue
    value = config[section][key]
    del config[section][key]
    if value != meant(config):
      raise UserError(
        f'config.{name}={value!r} is read by nothing, so it must be {meant(config)!r}, which is '
        f'what happens: remove it or set it to that.'
      )
  return config


def _known_fields(section: str, config: Any, defaults: Any) -> dict[str, Any]:
  """Keys that a section may have, with an example of each value (None: any)."""
  known = dict(defaults[section])
  if section == 'model':
    # A configuration may set what another network or SDE reads, as the shared recipes do.
    known = dict.fromkeys(mutils.all_model_fields() | sde_lib.all_sde_fields()) | known
    known |= mutils.model_fields(config.model.get('name', defaults.model.name))
    known |= sde_lib.sde_fields(config.training.get('sde', defaults.training.sde))
  if section == 'classifier':
    name = config.classifier.get('name', defaults.classifier.name)
    known = dict.fromkeys(mutils.classifier_fields(name)) | known
  if section == 'data':
    known |= dict.fromkeys(_DATA_KEYS)
    known |= dict.fromkeys(datasets.extra_keys(config.data.get('dataset', defaults.data.dataset)))
  return known


def _unknown(what: str, name: str, known: Any) -> str:
  close = difflib.get_close_matches(name, known, n=1)
  hint = f' Did you mean {close[0]}?' if close else ''
  return f'Unknown {what} {name!r}: choose one of {", ".join(sorted(known))}.{hint}'


def _check_type(name: str, value: Any, example: Any) -> None:
  allowed = type(example)
  if allowed is float:
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
  elif allowed in (tuple, list):
    right = isinstance(value, (tuple, list))
  else:
    right = isinstance(value, allowed) and isinstance(value, bool) == (allowed is bool)
  if not right:
    raise UserError(
      f'config.{name}={value!r} is of type {type(value).__name__}; it must be of type '
      f'{allowed.__name__}, such as {example!r}.'
    )


def _check_values(config: ml_collections.ConfigDict) -> None:
  training, optim = config.training, config.optim
  sde = sde_lib.get_sde(config)
  losses.get_optimizer(config)
  sampling.check(config, sde)
  controllable_generation.check(config)
  datasets.check_batch_size(training.batch_size, 'training.batch_size')
  for name in ('n_iters', 'n_jitted_steps', *FREQUENCIES):
    if training[name] < 1:
      raise UserError(f'training.{name}={training[name]} must be at least 1.')
  for name in FREQUENCIES:
    if training[name] % training.n_jitted_steps:
      raise UserError(
        f'training.n_jitted_steps={training.n_jitted_steps} does not divide '
        f'training.{name}={training[name]}: choose a multiple of it, or n_jitted_steps=1.'
      )
  if optim.lr <= 0 or optim.warmup < 0:
    raise UserError(
      f'optim.lr={optim.lr} must be positive and optim.warmup={optim.warmup} not negative.'
    )
  if not 0 <= config.model.ema_rate < 1:
    raise UserError(f'model.ema_rate={config.model.ema_rate} must be in [0, 1).')
  _check_classifier(config.classifier)
  # The network refuses shapes that do not fit in an abstract pass, the objective what it cannot do.
  model, _, _ = mutils.abstract_model(config)
  losses.build_step_fn(config, sde, model, train=False)
  if not training.continuous:
    sde.perturb_discrete(*jax.numpy.zeros((3, 1)).astype(int))


def _check_classifier(classifier: Any) -> None:
  mutils.get_classifier(classifier.name)
  counts = ('num_classes', 'blocks_per_group', 'channel_multiplier', 'embedding_size')
  for name in (*counts, 'batch_size', 'n_iters'):
    if classifier[name] < 1:
      raise UserError(f'classifier.{name}={classifier[name]} must be at least 1.')
  if classifier.lr <= 0 or classifier.warmup < 0 or classifier.weight_decay < 0:
    raise UserError(
      f'classifier.lr={classifier.lr} must be positive, classifier.warmup={classifier.warmup} and '
      f'classifier.weight_decay={classifier.weight_decay} not negative.'
    )
  if not 0 <= classifier.ema_rate < 1:
    raise UserError(f'classifier.ema_rate={classifier.ema_rate} must be in [0, 1).')
  if not 0 < classifier.sigma_min < classifier.sigma_max:
    raise UserError(
      f'classifier.sigma_min={classifier.sigma_min} must be positive and less than '
      f'classifier.sigma_max={classifier.sigma_max}.'
    )


def stream(config: Any, name: str) -> jax.Array:
  """The root key of one kind of random numbers."""
  return jax.random.fold_in(jax.random.PRNGKey(config.seed), STREAMS.index(name))


def flatten(config: Any) -> dict[str, Any]:
  """Leaves by dotted name, as JSON stores them."""
  flat = {}
  for key, value in json.loads(json.dumps(plain(config))).items():
    if isinstance(value, dict):
      flat |= {f'{key}.{name}': leaf for name, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def plain(config: Any) -> dict[str, Any]:
  """A configuration, or what has been read from `config.json`, as nested dictionaries."""
  return config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
