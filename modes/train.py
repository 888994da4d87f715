"""`--mode=train`: trains a score network, or resumes its training."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

import datasets
import losses
import sampling
import sde_lib
import train_state
from losses import StepFn
from modes.training_loop import (
  Run,
  TrainStep,
  compile_steps,
  open_run,
  restore_or_init,
  train_loop,
)
from runtime import parallelism, reporting
from runtime.array_types import GreyLevels, RandomKey, Scalar
from runtime.checkpoints import DIRECTORIES
from runtime.errors import UserError
from runtime.rng import stream
from runtime.workdir import at_work, check_run, log_start, read_config, record
from train_state import State

PyTree = Any


def check(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Refuses what a training would refuse, but reads no data."""
  check_run(config, workdir)
  saved = any(path for name in DIRECTORIES for path in workdir.glob(f'{name}/checkpoint_*'))
  if read_config(workdir) is None and not saved and any(workdir.glob('samples/iter_*')):
    raise UserError(
      f'{workdir} has the samples of a training, but neither its checkpoints nor its config.json: '
      f'use another --workdir, or remove {workdir / "samples"}.'
    )


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
  """See `run_lib.train`; `config` comes from `preparation.prepare`."""
  check(config, workdir)
  data, training = config.data, config.training
  train_ds, eval_ds, _ = datasets.get_dataset(config, data.uniform_dequantization)
  sde = sde_lib.get_sde(config)
  model, like = train_state.abstract_state(config)
  init = lambda: train_state.init_state(stream(config.seed, 'init'), config)[1]
  train_step = compile_train_step(
    losses.build_step_fn(config, sde, model, train=True, observe=train_state.observer(config)),
    train_ds.preprocess,
    stream(config.seed, 'train'),
    table=train_ds.table('image'),
    debug_nans=training.debug_nans,
  )
  eval_step = compile_eval_step(
    losses.build_step_fn(config, sde, model, train=False),
    eval_ds.preprocess,
    stream(config.seed, 'eval'),
  )
  shape = (training.batch_size, data.image_size, data.image_size, data.num_channels)
  inverse_scaler = datasets.get_data_inverse_scaler(config)
  sampling_fn = sampling.get_sampling_fn(config, sde, model, shape, inverse_scaler)

  def evaluate(state: State, step: int, metrics: reporting.MetricWriter) -> None:
    batch = parallelism.global_batch(eval_ds.batch(step // training.eval_freq)['image'])
    metrics.scalar('eval_loss', float(eval_step(state, batch)), step)

  with at_work(workdir, '--workdir'):
    record(config, workdir, train=train_ds.source, test=eval_ds.source)
    log_start(config)
    with open_run(workdir, training.keep_checkpoints) as run:
      draw = SnapshotSampler(sampling_fn, stream(config.seed, 'sample'), run)
      state = restore_or_init(run.directories, like, init)
      batches = train_ds.inputs(int(state.step), 'image')
      at_snapshot = draw if training.snapshot_sampling else lambda state, metrics: True
      train_loop(
        training,
        run,
        state,
        batches=batches,
        train_step=train_step,
        evaluate=evaluate,
        at_snapshot=at_snapshot,
      )


def compile_train_step(
  step_fn: StepFn,
  preprocess: datasets.Preprocess,
  rng: RandomKey,
  *,
  table: datasets.Table = None,
  fused: bool | None = None,
  debug_nans: bool = False,
) -> TrainStep:
  """Compiles a training step `(state, batches) -> (state, numbers (n,))`, which consumes the state.

  It takes a list of n batches, each of which gives one optimizer step: dictionaries with `image`,
  grey levels (B, H, W, C), or with a `table` of all images their numbers, `index`, (B,).

  Args:
    step_fn: the result of `losses.get_step_fn` with `train=True`.
    preprocess: see `datasets.get_preprocess_fn`.
    rng: the root key of all steps.
    table: see `datasets.Dataset.table`.
    fused: see `training_loop.compile_steps`.
    debug_nans: see `training_loop.compile_steps`.
  """
  return compile_steps(train_step_of(step_fn, preprocess, rng), table, fused, debug_nans=debug_nans)


def train_step_of(
  step_fn: StepFn, preprocess: datasets.Preprocess, rng: RandomKey
) -> Callable[[State, datasets.Inputs, datasets.Table], tuple[State, PyTree]]:
  """The step that `compile_train_step` compiles, `(state, inputs, table) -> (state, numbers)`.

  The numbers are what `step_fn` returns: the loss, or a dictionary that has it.
  """

  def one_step(
    state: State, inputs: datasets.Inputs, table: datasets.Table
  ) -> tuple[State, PyTree]:
    data_rng, step_rng = jax.random.split(jax.random.fold_in(rng, state.step))
    images = parallelism.shard_batch(datasets.take(inputs, table)['image'])
    batch = {'image': preprocess(data_rng, images)}
    (_, state), numbers = step_fn((step_rng, state), batch)
    return state, numbers

  return one_step


def compile_eval_step(
  step_fn: StepFn, preprocess: datasets.Preprocess, rng: RandomKey
) -> Callable[[State, GreyLevels], Scalar]:
  """Compiles `(state, global batch of grey levels (B, H, W, C)) -> loss` of the EMA parameters.

  Args:
    step_fn: the result of `losses.get_step_fn` with `train=False`.
    preprocess: see `datasets.get_preprocess_fn`.
    rng: the root key of all steps.
  """

  @jax.jit
  def compiled(state: State, images: GreyLevels) -> Scalar:
    data_rng, step_rng = jax.random.split(jax.random.fold_in(rng, state.step))
    batch = {'image': preprocess(data_rng, parallelism.shard_batch(images))}
    _, loss = step_fn((step_rng, state), batch)
    return loss

  return compiled


class _Interrupted(Exception):
  """A signal asked the run to stop while samples were being drawn."""


class SnapshotSampler:
  """Draws a batch with the EMA parameters and writes it to `samples/iter_<step>_host_0`.

  The random numbers depend only on the root key and the step. A signal stops the drawing between
  two steps of the sampler.

  Args:
    sampling_fn: draws a batch.
    rng: the root key of all snapshots.
    run: the run, which has the directory and knows of signals.
  """

  def __init__(self, sampling_fn: sampling.SamplingFn, rng: RandomKey, run: Run):
    self._sampling_fn = sampling_fn
    self._rng = rng
    self._run = run

  def __call__(self, state: State, metrics: reporting.MetricWriter) -> bool:
    """Draws the samples of `state` unless they exist; returns False if the run must stop."""
    step = int(state.step)
    directory = self._run.workdir / 'samples' / f'iter_{step}_host_0'
    if parallelism.from_first_process((directory / 'sample.png').exists()):
      return True
    rng = jax.random.fold_in(self._rng, step)
    try:
      samples, nfe = self._sampling_fn(rng, state, callback=self._stop_if_asked)
    except _Interrupted:
      return False
    samples = parallelism.to_host(samples)
    if not np.isfinite(samples).all():
      logging.warning('step: %d, the samples are not finite: they are shown as black.', step)
      samples = np.nan_to_num(samples, posinf=0.0, neginf=0.0)
    if jax.process_index() == 0:
      reporting.write_samples(directory, samples)
    metrics.images('samples', samples, step)
    logging.info('step: %d, %d samples with NFE %d: %s', step, len(samples), nfe, directory)
    return True

  def _stop_if_asked(self, *progress: Any) -> None:
    del progress
    if self._run.preemption.requested(agreed=False):
      raise _Interrupted
