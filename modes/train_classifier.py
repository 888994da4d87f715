"""--mode=train_classifier: trains the noise-conditional classifier of `models.classifier`."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import logging
from ml_collections import ConfigDict

import datasets
import train_state
from models.classifier import CLASSIFIERS, create_classifier, write_classifier_file
from modes.training_loop import compile_steps, open_run, restore_or_init, train_loop
from runtime import parallelism, reporting
from runtime.errors import UserError
from runtime.rng import stream
from runtime.workdir import FREE, at_work, check_run, log_start, record
from sde_lib import batch_mul
from train_state import State

PyTree = Any

FILE = 'classifier.safetensors'
# Test accuracy is reported at these noise levels, as far as they are in the trained range.
TEST_SIGMAS = (0.0, 0.1, 0.3, 1.0, 3.0)

# What may change when the training of a classifier resumes.
_FREE = (
  *(name for name in FREE if name != 'classifier.'),
  'training.sde',
  'training.continuous',
  'training.likelihood_weighting',
  'training.reduce_mean',
  'classifier.n_iters',
  'classifier.checkpoint',
)


def train_classifier(config: ConfigDict, workdir: pathlib.Path) -> None:
  """See `run_lib.train_classifier`; `config` is complete."""
  config = _own_config(config)
  guarded = lambda name: not name.startswith(_FREE)
  check_run(_recorded(config), workdir, guarded)
  init = functools.partial(_init_state, config)
  like = jax.eval_shape(init)  # the network refuses shapes that do not fit
  train_ds, eval_ds, _ = datasets.get_dataset(config, config.data.uniform_dequantization)
  _check_labels(train_ds.batch(0)['label'], config)

  with at_work(workdir, '--workdir'), open_run(workdir) as run:
    splits = {'train': train_ds.source, 'test': eval_ds.source}
    record(_recorded(config), workdir, guarded, **splits)
    log_start(config)
    module = CLASSIFIERS.build(config.classifier.name, config.classifier)
    state = restore_or_init(run.directories, like, init)
    train_step = compile_steps(_train_step(config, module, train_ds.preprocess))
    eval_step = jax.jit(_loss_fn(config, module, eval_ds.preprocess))

    def evaluate(state: State, step: int, metrics: reporting.MetricWriter) -> None:
      batch = parallelism.global_batch(eval_ds.batch(step // config.training.eval_freq))
      loss, accuracy = eval_step(state.params_ema, _key(config, 'eval', state.step), batch)
      metrics.scalar('eval_loss', float(loss), step)
      metrics.scalar('eval_accuracy', float(accuracy), step)

    batches = map(functools.partial(_checked, config), train_ds.iterate(int(state.step)))
    state = train_loop(
      config.training, run, state, batches, train_step, evaluate, lambda state, metrics: True
    )
    if state is not None:
      accuracy = _test_accuracy(config, module, state.params_ema, eval_ds)
      logging.info('Accuracy on the test split by noise level: %s', accuracy)
      if jax.process_index() == 0:
        save_classifier(workdir / FILE, config, state, accuracy)
      logging.info('Written: %s', workdir / FILE)


def save_classifier(
  path: pathlib.Path, config: ConfigDict, state: State, accuracy: dict[str, float]
) -> None:
  """Writes the EMA parameters and what `load_classifier` and a reader need to know of them."""
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
  """The configuration with `classifier` put in place of what it has in common with a score model.

  So the data pipeline, the optimizer and the loop of score models serve the classifier.
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
  config.data.centered = False  # it sees images of the range [0, 1], whatever the SDE
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


def _key(config: ConfigDict, name: str, step: jax.Array | int = 0) -> jax.Array:
  return jax.random.fold_in(stream(config.seed, f'classifier_{name}'), step)


def _check_labels(labels: np.ndarray, config: ConfigDict) -> None:
  """Refuses labels that are out of range, or of an unlabelled data set (all zero)."""
  classes = config.classifier.num_classes
  if labels.min() < 0 or labels.max() >= classes:
    wrong = labels[(labels < 0) | (labels >= classes)][0]
    raise UserError(
      f'The data set {config.data.dataset} has the label {wrong}, but '
      f'classifier.num_classes={classes}: labels must be 0 to num_classes - 1.'
    )
  if len(labels) > 1 and not labels.any():
    raise UserError(
      f'All labels in the first batch of {config.data.dataset} are 0: '
      f'a classifier needs a data set with labels, such as MNIST5K or CIFAR10.'
    )


def _checked(config: ConfigDict, batch: datasets.Example) -> datasets.Example:
  if batch['label'].max() >= config.classifier.num_classes:
    _check_labels(batch['label'], config)
  return {'image': batch['image'], 'label': batch['label']}


def _loss_fn(config: ConfigDict, module: Any, preprocess: datasets.Preprocess) -> Callable:
  """The function `(params, rng, batch) -> (cross entropy, accuracy)` at random noise levels."""
  lowest, highest = np.log([config.classifier.sigma_min, config.classifier.sigma_max])

  def loss_fn(params: PyTree, rng: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    data_rng, sigma_rng, noise_rng = jax.random.split(rng, 3)
    images, labels = preprocess(data_rng, batch['image']), batch['label']
    sigmas = jnp.exp(jax.random.uniform(sigma_rng, labels.shape, minval=lowest, maxval=highest))
    images += batch_mul(sigmas, jax.random.normal(noise_rng, images.shape))
    logits = module.apply({'params': params}, images, sigmas)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels)

  return loss_fn


def _train_step(config: ConfigDict, module: Any, preprocess: datasets.Preprocess) -> Callable:
  """One optimizer step, `(state, batch) -> (state, loss)`."""
  grad_fn = jax.value_and_grad(_loss_fn(config, module, preprocess), has_aux=True)
  optimize_fn = train_state.optimization_manager(config)

  def step(state: State, batch: Any) -> tuple[State, jax.Array]:
    (loss, _), grad = grad_fn(state.params, _key(config, 'train', state.step), batch)
    return optimize_fn(state, grad), loss

  return step


def _test_accuracy(
  config: ConfigDict, module: Any, params: PyTree, dataset: datasets.Dataset
) -> dict[str, float]:
  """The share of the test split that is classified rightly, by noise level."""
  section = config.classifier
  source, size = dataset.source, dataset.batch_size

  @jax.jit
  def correct(params: PyTree, rng: jax.Array, sigma: jax.Array, batch: Any) -> jax.Array:
    data_rng, noise_rng = jax.random.split(rng)
    images = dataset.preprocess(data_rng, parallelism.shard_batch(batch['image']))
    images += sigma * jax.random.normal(noise_rng, images.shape)
    level = jnp.full(len(images), jnp.clip(sigma, section.sigma_min, section.sigma_max))
    logits = module.apply({'params': params}, images, level, train=False)
    return jnp.sum(jnp.argmax(logits, axis=-1) == batch['label'])

  sigmas = [sigma for sigma in TEST_SIGMAS if sigma <= section.sigma_max]
  counts = dict.fromkeys(map(str, sigmas), 0)
  for start in tqdm.trange(0, len(source), size, unit='batch', disable=None):
    examples = [source[i] for i in range(start, min(start + size, len(source)))]
    batch = {key: np.stack([example[key] for example in examples]) for key in ('image', 'label')}
    # Whole in every process: the last batch may be one that devices cannot share equally.
    batch = parallelism.replicate(batch)
    rng = _key(config, 'test', start)
    for sigma in sigmas:
      counts[str(sigma)] += int(correct(params, rng, sigma, batch))
  return {sigma: count / len(source) for sigma, count in counts.items()}
