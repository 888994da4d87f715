"""`--mode=train_classifier`: trains the noise-conditional classifier of `models.classifier`.

It minimizes the cross entropy of p(y | image + sigma z) at random noise levels sigma, uniform in
the logarithm between `classifier.sigma_min` and `classifier.sigma_max`, in units of images in
[0, 1].
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

import datasets
import train_state
from models.classifier import CLASSIFIERS, create_classifier, write_classifier_file
from modes.training_loop import compile_steps, open_run, restore_or_init, train_loop
from runtime import parallelism, progress, reporting
from runtime.array_types import Count, Labels, RandomKey, Scalar
from runtime.errors import UserError
from runtime.rng import stream
from runtime.workdir import FREE, at_work, check_run, log_start, record
from sde_lib import batch_mul
from train_state import State

PyTree = Any
Numbers = dict[str, Scalar]
LossFn = Callable[[PyTree, RandomKey, PyTree], tuple[Scalar, Scalar]]

FILE = 'classifier.safetensors'
# Test accuracy is reported at those of these noise levels that are within the trained range.
TEST_SIGMAS = (0.0, 0.1, 0.3, 1.0, 3.0)

# Fields that may change when the training of a classifier resumes.
_FREE = (
  *(name for name in FREE if name != 'classifier.'),
  'training.sde',
  'training.continuous',
  'training.likelihood_weighting',
  'training.reduce_mean',
  'classifier.n_iters',
  'classifier.checkpoint',
)


@runtime_checkable
class Network(Protocol):
  """A classifier, of which only `apply` is used: a Flax module."""

  def apply(self, variables: PyTree, *args: Any, **kwargs: Any) -> jax.Array:
    """Logits (B, num_classes) of images (B, H, W, C) with noise levels (B,)."""


def check(config: ConfigDict, workdir: pathlib.Path) -> State:
  """Refuses what the training would refuse, but reads no data; returns the shapes of its state."""
  config = _own_config(config)
  check_run(_recorded(config), workdir, _guarded)
  return jax.eval_shape(functools.partial(_init_state, config))  # refuses shapes that do not fit


def _guarded(name: str) -> bool:
  return not name.startswith(_FREE)


def functions(
  config: ConfigDict,
) -> tuple[Network, Callable[[State, PyTree, PyTree], tuple[State, Numbers]]]:
  """The classifier, and the function of one training step, for counting what they compute."""
  config = _own_config(config)
  preprocess = datasets.get_preprocess_fn(config, config.data.uniform_dequantization)
  return _network(config), _train_step(config, _network(config), preprocess)


def _network(config: ConfigDict) -> Network:
  return CLASSIFIERS.build(config.classifier.name, config.classifier)


def train_classifier(config: ConfigDict, workdir: pathlib.Path) -> None:
  """See `run_lib.train_classifier`; `config` comes from `preparation.prepare`."""
  like = check(config, workdir)
  config = _own_config(config)
  fresh_state = functools.partial(_init_state, config)
  keep = config.training.keep_checkpoints
  train_ds, eval_ds, _ = datasets.get_dataset(config, config.data.uniform_dequantization)
  _check_labels(train_ds.batch(0)['label'], config)

  with at_work(workdir, '--workdir'), open_run(workdir, keep) as run:
    splits = {'train': train_ds.source, 'test': eval_ds.source}
    record(_recorded(config), workdir, _guarded, **splits)
    log_start(config)
    module = _network(config)
    state = restore_or_init(run.directories, like, lambda: parallelism.draw(fresh_state))
    table = train_ds.table('image', 'label')
    if table is not None:
      _check_labels(parallelism.to_host(table['label']), config)
    train_step = compile_steps(
      _train_step(config, module, train_ds.preprocess),
      table,
      debug_nans=config.training.debug_nans,
    )
    eval_step = jax.jit(_loss_fn(config, module, eval_ds.preprocess))

    def evaluate(state: State, step: int, metrics: reporting.MetricWriter) -> None:
      batch = parallelism.global_batch(eval_ds.batch(step // config.training.eval_freq))
      loss, accuracy = eval_step(state.params_ema, _key(config, 'eval', state.step), batch)
      metrics.scalar('eval_loss', float(loss), step)
      metrics.scalar('eval_accuracy', float(accuracy), step)

    batches = map(
      functools.partial(_checked, config), train_ds.inputs(int(state.step), 'image', 'label')
    )
    state = train_loop(
      config.training,
      run,
      state,
      batches=batches,
      train_step=train_step,
      evaluate=evaluate,
      at_snapshot=lambda state, metrics: True,
    )
    if state is not None:
      accuracy = _test_accuracy(config, module, state.params_ema, dataset=eval_ds)
      logging.info('Accuracy on the test split by noise level: %s', accuracy)
      state = state.replace(params_ema=jax.tree.map(parallelism.to_host, state.params_ema))
      if jax.process_index() == 0:
        save_classifier(workdir / FILE, config, state, accuracy=accuracy)
      logging.info('Written: %s', workdir / FILE)


def save_classifier(
  path: pathlib.Path, config: ConfigDict, state: State, *, accuracy: dict[str, float]
) -> None:
  """Writes the EMA parameters, and the metadata that `load_classifier` and readers need.

  Args:
    path: the file to write.
    config: the configuration of the training.
    state: its last state.
    accuracy: the share of test images that are classified correctly, by noise level.
  """
  section = config.classifier
  info = {
    'name': section.name,
    'fields': _fields(config),
    'image_shape': _image_shape(config),
    'sigma_min': section.sigma_min,
    'sigma_max': section.sigma_max,
    'dataset': config.data.dataset,
    'seed': config.seed,
    'step': int(state.step),
    'accuracy': accuracy,
  }
  reporting.write_atomic(path, write_classifier_file(state.params_ema, info))


def _own_config(config: ConfigDict) -> ConfigDict:
  """The configuration with the fields of `classifier` copied to `training`, `optim` and `model`.

  With it, the data pipeline, the optimizer and the training loop of score networks serve the
  classifier.
  """
  config, section = config.copy_and_resolve_references(), config.classifier
  config.training.n_iters = section.n_iters
  config.training.batch_size = section.batch_size
  config.optim.optimizer = 'AdamW'
  config.optim.lr = section.lr
  config.optim.warmup = section.warmup
  config.optim.weight_decay = section.weight_decay
  config.model.name = section.name
  config.model.ema_rate = section.ema_rate
  config.data.centered = False  # the classifier sees images in [0, 1] under every SDE
  return config


def _recorded(config: ConfigDict) -> ConfigDict:
  """The part of the configuration that the training of a classifier depends on."""
  sections = ('seed', 'training', 'data', 'optim', 'classifier')
  return ConfigDict({name: config[name] for name in sections})


def _image_shape(config: ConfigDict) -> tuple[int, int, int]:
  return (config.data.image_size, config.data.image_size, config.data.num_channels)


def _fields(config: ConfigDict) -> dict[str, Any]:
  """The fields of the network, from the keys of the same names in `config.classifier`."""
  known = CLASSIFIERS.fields(config.classifier.name)
  return {name: config.classifier[name] for name in known if name in config.classifier}


def _init_state(config: ConfigDict) -> State:
  _, params = create_classifier(
    _key(config, 'init'),
    batch_size=1,
    name=config.classifier.name,
    image_shape=_image_shape(config),
    **_fields(config),
  )
  return train_state.first_state(config, {}, params)


def _key(config: ConfigDict, name: str, step: Count = 0) -> RandomKey:
  return jax.random.fold_in(stream(config.seed, f'classifier_{name}'), step)


def _check_labels(labels: Labels, config: ConfigDict) -> None:
  """Refuses labels that are out of range, or all zero as in a data set without labels."""
  classes = config.classifier.num_classes
  if labels.min() < 0 or labels.max() >= classes:
    wrong = labels[(labels < 0) | (labels >= classes)][0]
    raise UserError(
      f'The data set {config.data.dataset} has the label {wrong}, but '
      f'classifier.num_classes={classes} allows 0 to {classes - 1}: set it to the number of '
      f'classes.'
    )
  if len(labels) > 1 and not labels.any():
    raise UserError(
      f'All labels in the first batch of {config.data.dataset} are 0: '
      f'set data.dataset to one with labels, such as MNIST5K or CIFAR10.'
    )


def _checked(config: ConfigDict, batch: datasets.Example) -> datasets.Example:
  if 'label' in batch and batch['label'].max() >= config.classifier.num_classes:
    _check_labels(batch['label'], config)
  return batch


def _loss_fn(config: ConfigDict, module: Network, preprocess: datasets.Preprocess) -> LossFn:
  """The function `(params, rng, batch) -> (cross entropy, accuracy)` at random noise levels."""
  lowest, highest = np.log([config.classifier.sigma_min, config.classifier.sigma_max])

  def loss_fn(params: PyTree, rng: RandomKey, batch: PyTree) -> tuple[Scalar, Scalar]:
    data_rng, sigma_rng, noise_rng = jax.random.split(rng, 3)
    images, labels = preprocess(data_rng, batch['image']), batch['label']
    sigmas = jnp.exp(jax.random.uniform(sigma_rng, labels.shape, minval=lowest, maxval=highest))
    images += batch_mul(sigmas, jax.random.normal(noise_rng, images.shape))
    logits = module.apply({'params': params}, images, sigmas)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels)

  return loss_fn


def _train_step(
  config: ConfigDict, module: Network, preprocess: datasets.Preprocess
) -> Callable[[State, PyTree, PyTree], tuple[State, Numbers]]:
  """The function of one optimizer step, `(state, inputs, table) -> (state, numbers)`."""
  grad_fn = jax.value_and_grad(_loss_fn(config, module, preprocess), has_aux=True)
  optimize_fn = train_state.optimization_manager(config)
  observe = train_state.observer(config)

  def step(state: State, inputs: PyTree, table: PyTree) -> tuple[State, Numbers]:
    batch = datasets.take(inputs, table)
    (loss, _), grad = grad_fn(state.params, _key(config, 'train', state.step), batch)
    numbers = {'training_loss': loss, **observe(state, grad)}
    new_state = optimize_fn(state, grad)
    if config.training.on_nonfinite == 'skip':
      new_state = train_state.skip_unless(train_state.is_finite(loss, grad), new_state, state)
    return new_state, numbers

  return step


def _test_accuracy(
  config: ConfigDict, module: Network, params: PyTree, *, dataset: datasets.Dataset
) -> dict[str, float]:
  """The share of test images that are classified correctly, by noise level."""
  section = config.classifier
  source, size = dataset.source, dataset.batch_size

  @jax.jit
  def correct(params: PyTree, rng: RandomKey, sigma: Scalar, batch: PyTree) -> Count:
    data_rng, noise_rng = jax.random.split(rng)
    images = dataset.preprocess(data_rng, parallelism.shard_batch(batch['image']))
    images += sigma * jax.random.normal(noise_rng, images.shape)
    level = jnp.full(len(images), jnp.clip(sigma, section.sigma_min, section.sigma_max))
    logits = module.apply({'params': params}, images, level, train=False)
    return jnp.sum(jnp.argmax(logits, axis=-1) == batch['label'])

  sigmas = [sigma for sigma in TEST_SIGMAS if sigma <= section.sigma_max]
  counts = dict.fromkeys(map(str, sigmas), 0)
  starts = range(0, len(source), size)
  for start in progress.bar(starts, 'accuracy', unit='images', scale=size):
    examples = [source[i] for i in range(start, min(start + size, len(source)))]
    batch = {key: np.stack([example[key] for example in examples]) for key in ('image', 'label')}
    # Every device gets the whole batch: the last one may be too small to share evenly.
    batch = parallelism.replicate(batch)
    rng = _key(config, 'test', start)
    for sigma in sigmas:
      counts[str(sigma)] += int(correct(params, rng, sigma, batch))
  return {sigma: count / len(source) for sigma, count in counts.items()}
