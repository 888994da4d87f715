"""Completes and checks a configuration before anything expensive starts.

The functions that build from a configuration refuse what they cannot do, so most of the check is to
build what the mode will use, without computing anything.
"""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import controllable_generation
import datasets
import losses
import sampling
import sde_lib
import train_state
from models import utils as mutils
from models.classifier import CLASSIFIERS
from modes import divergence
from modes.evaluations import EVALUATIONS
from runtime import checkpoints, configuration, parallelism
from runtime.errors import UserError
from runtime.rng import check_seed

# Keys that only some data sets read; a configuration with another data set may keep them.
_DATA_KEYS = (
  'background',
  'builder',
  'category',
  'crop',
  'min_side',
  'num_classes',
  'resize',
  'test_fraction',
  'test_list',
  'tfrecords_path',
)

FREQUENCIES = ('log_freq', 'eval_freq', 'snapshot_freq', 'snapshot_freq_for_preemption')


def prepare(config: ConfigDict) -> ConfigDict:
  """The configuration with absent keys set to their defaults and everything checked.

  The devices are laid out as `config.parallel` says.

  Raises:
    UserError: for the first unknown key, wrong type or value that cannot work.
  """
  config = configuration.complete(config, _registered_keys(config))
  parallelism.lay_out(config.parallel.fsdp, config.parallel.spatial)
  _set_precision(config.model.matmul_precision)
  _check_values(config)
  return config


# Of float32 convolutions and matrix products on accelerators; 'default' is TF32 or bfloat16 there.
_PRECISIONS = ('default', 'tensorfloat32', 'bfloat16', 'float32')


def _set_precision(name: str) -> None:
  if name not in _PRECISIONS:
    raise UserError(
      f'Unknown model.matmul_precision {name!r}: choose one of {", ".join(_PRECISIONS)}.'
    )
  jax.config.update('jax_default_matmul_precision', None if name == 'default' else name)


def _registered_keys(config: ConfigDict) -> dict[str, dict[str, Any]]:
  """The keys that registered objects read, by section, each with an example of its value."""
  defaults = configuration.get_default_configs()

  def chosen(section: str, key: str) -> Any:
    return configuration.look_up(config, section, key, defaults[section][key])

  # A configuration may set keys of another network or SDE, as the shared recipes do.
  model = dict.fromkeys(mutils.MODELS.all_fields() | sde_lib.SDES.all_fields())
  model |= mutils.MODELS.fields(chosen('model', 'name'))
  model |= sde_lib.SDES.fields(chosen('training', 'sde'))
  data = dict.fromkeys([*_DATA_KEYS, *datasets.DATASETS.fields(chosen('data', 'dataset'))])
  classifier = dict.fromkeys(CLASSIFIERS.fields(chosen('classifier', 'name')))
  enabled = {f'enable_{name}': False for name in EVALUATIONS.names()}
  return {'model': model, 'data': data, 'classifier': classifier, 'eval': enabled}


def _check_values(config: ConfigDict) -> None:
  training, optim = config.training, config.optim
  check_seed(config.seed)
  for name in ('image_size', 'num_channels'):
    if config.data[name] < 1:
      raise UserError(f'data.{name}={config.data[name]} must be at least 1.')
  sde = sde_lib.get_sde(config)
  train_state.get_optimizer(config)
  with _building(f'The sampler sampling.method={config.sampling.method!r}'):
    sampling.check(config, sde)
  controllable_generation.check(config)
  datasets.check_batch_size(training.batch_size, 'training.batch_size')
  for name in ('n_iters', 'n_jitted_steps', 'grad_accum_steps', *FREQUENCIES):
    if training[name] < 1:
      raise UserError(f'training.{name}={training[name]} must be at least 1.')
  share = training.batch_size // parallelism.batch_parts()
  if share % training.grad_accum_steps:
    raise UserError(
      f'training.grad_accum_steps={training.grad_accum_steps} does not divide the {share} images '
      f'that each device has of a batch: choose a divisor of {share}, or another batch size.'
    )
  for name in FREQUENCIES:
    if training[name] % training.n_jitted_steps:
      raise UserError(
        f'training.n_jitted_steps={training.n_jitted_steps} does not divide '
        f'training.{name}={training[name]}: choose a multiple of it, or n_jitted_steps=1.'
      )
  divergence.check(training)
  checkpoints.Retention.parse(training.keep_checkpoints)
  if optim.lr <= 0 or optim.warmup < 0:
    raise UserError(
      f'optim.lr={optim.lr} must be positive and optim.warmup={optim.warmup} not negative.'
    )
  if not 0 <= config.model.ema_rate < 1:
    raise UserError(f'model.ema_rate={config.model.ema_rate} must be in [0, 1).')
  _check_classifier(config.classifier)
  # The abstract pass of the network refuses shapes that do not fit; the objective does the same.
  with _building(f'The network model.name={config.model.name!r}'):
    model, _, _ = mutils.abstract_model(config)
  losses.build_step_fn(config, sde, model, train=False)
  if not training.continuous:
    x, labels = jnp.zeros((1, 1)), jnp.zeros(1, int)
    sde.perturb_discrete(x, x, labels)


@contextlib.contextmanager
def _building(what: str) -> Iterator[None]:
  """Says in a sentence that something cannot be built, whatever a library says of its shapes."""
  try:
    yield
  except UserError:
    raise
  except (TypeError, ValueError, ZeroDivisionError, OverflowError, LookupError) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if 'site-packages' not in frame.filename][-1]
    raise UserError(
      f'{what} cannot be built as configured ({reason}; {ours.filename}, line {ours.lineno}): '
      f'correct its settings.'
    ) from error


def _check_classifier(classifier: ConfigDict) -> None:
  CLASSIFIERS.get(classifier.name)
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
