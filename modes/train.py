"""--mode=train: trains a score network, or resumes its training."""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

import datasets
import losses
import sampling
import sde_lib
import train_state
from modes.training_loop import compile_steps, open_run, restore_or_init, train_loop
from runtime import parallelism, reporting
from runtime.checkpoints import CheckpointDirectory
from runtime.rng import stream
from runtime.workdir import at_work, check_run, log_start, record
from sde_lib import SDE
from train_state import State


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
  """See `run_lib.train`."""
  check_run(config, workdir)
  train_ds, eval_ds, _ = datasets.get_dataset(config, config.data.uniform_dequantization)
  sde = sde_lib.get_sde(config)

  with at_work(workdir, '--workdir'):
    record(config, workdir, train=train_ds.source, test=eval_ds.source)
    log_start(config)
    with open_run(workdir) as run:
      model, state = _initial_state(config, run.directories)
      train_step = compile_train_step(config, sde, model, train_ds.preprocess)
      eval_step = compile_eval_step(config, sde, model, eval_ds.preprocess)
      draw = SnapshotSampler(
        config, workdir, sde, model, lambda: run.preemption.requested(agreed=False)
      )

      def evaluate(state: State, step: int, metrics: reporting.MetricWriter) -> None:
        images = eval_ds.batch(step // config.training.eval_freq)['image']
        batch = parallelism.global_batch(images)
        metrics.scalar('eval_loss', float(eval_step(state, batch)), step)

      batches = (batch['image'] for batch in train_ds.iterate(int(state.step)))
      train_loop(config.training, run, state, batches, train_step, evaluate, draw)


def _initial_state(
  config: ConfigDict, directories: list[CheckpointDirectory]
) -> tuple[nn.Module, State]:
  """The network, and the newest saved state or that of step 0, on all devices."""
  model, like = train_state.abstract_state(config)
  init = lambda: train_state.init_state(stream(config.seed, 'init'), config)[1]
  return model, restore_or_init(directories, like, init)


def compile_train_step(
  config: ConfigDict,
  sde: SDE,
  model: nn.Module,
  preprocess: datasets.Preprocess,
  fused: bool | None = None,
) -> Callable[[State, list[np.ndarray]], tuple[State, jax.Array]]:
  """The function `(state, n uint8 batches) -> (state, n losses)`; it consumes the state.

  Args:
    config: reads `training`, `optim`, `seed`.
    sde: the forward SDE.
    model: the network.
    preprocess: see `datasets.get_preprocess_fn`.
    fused: see `compile_steps`.
  """
  step_fn = losses.build_step_fn(config, sde, model, train=True)
  root = stream(config.seed, 'train')

  def one_step(state: State, images: jax.Array) -> tuple[State, jax.Array]:
    data_rng, step_rng = jax.random.split(jax.random.fold_in(root, state.step))
    batch = {'image': preprocess(data_rng, images)}
    (_, state), loss = step_fn((step_rng, state), batch)
    return state, loss

  return compile_steps(one_step, fused)


def compile_eval_step(
  config: ConfigDict, sde: SDE, model: nn.Module, preprocess: datasets.Preprocess
) -> Callable[[State, jax.Array], jax.Array]:
  """The function `(state, global uint8 batch) -> loss` of the EMA parameters."""
  step_fn = losses.build_step_fn(config, sde, model, train=False)
  root = stream(config.seed, 'eval')

  @jax.jit
  def compiled(state: State, images: jax.Array) -> jax.Array:
    data_rng, step_rng = jax.random.split(jax.random.fold_in(root, state.step))
    batch = {'image': preprocess(data_rng, parallelism.shard_batch(images))}
    _, loss = step_fn((step_rng, state), batch)
    return loss

  return compiled


class _Interrupted(Exception):
  """Sampling was asked to stop."""


class SnapshotSampler:
  """Draws a batch from the EMA parameters and writes it to `samples/iter_<step>_host_0`.

  The random numbers depend on the seed and the step only.

  Args:
    config: reads `sampling`, `data`, `seed` and the training batch size.
    workdir: of the run.
    sde: the forward SDE.
    model: the network.
    stop_requested: asked after every step of the sampler.
  """

  def __init__(
    self,
    config: ConfigDict,
    workdir: pathlib.Path,
    sde: SDE,
    model: nn.Module,
    stop_requested: Callable[[], bool] = lambda: False,
  ):
    data = config.data
    shape = (config.training.batch_size, data.image_size, data.image_size, data.num_channels)
    inverse_scaler = datasets.get_data_inverse_scaler(config)
    self._sampling_fn = sampling.get_sampling_fn(config, sde, model, shape, inverse_scaler)
    self._root = stream(config.seed, 'sample')
    self._workdir = workdir
    self._enabled = config.training.snapshot_sampling
    self._stop_requested = stop_requested

  def __call__(self, state: State, metrics: reporting.MetricWriter) -> bool:
    """Returns whether the samples are there; if not, the run was asked to stop."""
    step = int(state.step)
    directory = self._workdir / 'samples' / f'iter_{step}_host_0'
    if not self._enabled or (directory / 'sample.png').exists():
      return True
    rng = jax.random.fold_in(self._root, step)
    try:
      samples, nfe = self._sampling_fn(rng, state, callback=self._callback)
    except _Interrupted:
      return False
    samples = parallelism.to_host(samples)
    if not np.isfinite(samples).all():
      logging.warning('step: %d, the samples are not finite: they are shown as black.', step)
      samples = np.nan_to_num(samples)
    if jax.process_index() == 0:
      reporting.write_samples(directory, samples)
    metrics.images('samples', samples, step)
    logging.info(
      'step: %d, %d samples with %d network calls: %s', step, len(samples), nfe, directory
    )
    return True

  def _callback(self, *progress: Any) -> None:
    del progress
    if self._stop_requested():
      raise _Interrupted
