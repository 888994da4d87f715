"""Training and evaluation: the wiring between configuration, data, state and outputs."""

import pathlib
import signal
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import tqdm
from absl import logging

import checkpoints
import configuration
import datasets
import evaluation
import evaluation_run
import losses
import parallelism
import reporting
import sampling
import sde_lib
from checkpoints import CheckpointDirectory
from errors import UserError
from losses import State
from sde_lib import SDE


class NonFiniteLoss(FloatingPointError):
  """Training has diverged; the message names the metric and the step."""


def train(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains, or goes on training, the configured network.

  Leaves in `workdir`: `checkpoints/` (every `training.snapshot_freq` steps, all kept),
  `checkpoints-meta/` (the latest states, where the same command continues), `samples/`,
  `metrics.jsonl`, `tensorboard/`, `config.json`, `versions.json` and `stdout.txt`.

  Every batch and every random number is a function of the seed and the step, so a run that was
  killed continues to the same bits.

  Raises:
    UserError: a configuration that is wrong or contradicts the run in `workdir`.
    NonFiniteLoss: the loss is NaN or infinite.
  """
  reporting.log_to_console()
  config = configuration.prepare(config)
  workdir = pathlib.Path(workdir)
  make_directory(workdir)
  configuration.record(config, workdir)
  reporting.log_to_file(workdir / 'stdout.txt')
  configuration.log_start(config)

  training = config.training
  train_ds, eval_ds, _ = datasets.get_dataset(config, config.data.uniform_dequantization)
  sde = sde_lib.get_sde(config)
  with (
    CheckpointDirectory(workdir / 'checkpoints') as snapshots,
    CheckpointDirectory(workdir / 'checkpoints-meta', keep=2) as latest,
    Preemption() as preemption,
  ):
    model, state = _initial_state(config, [latest, snapshots])
    step = int(state.step)
    last = training.n_iters - training.n_iters % training.n_jitted_steps
    train_step = compile_train_step(config, sde, model, train_ds.preprocess)
    eval_step = compile_eval_step(config, sde, model, eval_ds.preprocess)
    draw = SampleDrawer(config, workdir, sde, model)

    with (
      reporting.MetricWriter(workdir, step) as metrics,
      tqdm.tqdm(total=last, initial=step, unit='step', disable=None) as progress,
    ):
      if _is_snapshot(step, last, training.snapshot_freq):
        draw(state, metrics)  # if the process was killed between the checkpoint and its samples
      batches = train_ds.iterate(step)
      unchecked = []
      while step < last:
        group = [next(batches)['image'] for _ in range(training.n_jitted_steps)]
        state, step_losses = train_step(state, group)
        step += training.n_jitted_steps
        unchecked.append(step_losses)
        progress.update(training.n_jitted_steps)

        snapshot_due = _is_snapshot(step, last, training.snapshot_freq)
        save_due = snapshot_due or step % training.snapshot_freq_for_preemption == 0
        stop = preemption.requested(step % training.log_freq == 0)
        if step % training.log_freq == 0 or save_due or stop:
          loss = _check_finite(unchecked, step)
          unchecked = []
        if step % training.log_freq == 0:
          metrics.scalar('training_loss', loss, step)
          progress.set_postfix(loss=f'{loss:.4g}')
        if step % training.eval_freq == 0:
          images = eval_ds.batch(step // training.eval_freq)['image']
          batch = parallelism.global_batch(images)
          metrics.scalar('eval_loss', float(eval_step(state, batch)), step)
        if snapshot_due:
          snapshots.save(-(-step // training.snapshot_freq), state)
          draw(state, metrics)
        if save_due or stop:
          latest.save(step, state)
        if stop:
          logging.info('Stopped by a signal at step %d; the same command continues.', step)
          return
    logging.info('Training is complete at step %d.', step)


def make_directory(path: pathlib.Path) -> None:
  """Makes a working directory.

  Raises:
    UserError: if that cannot be done.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f'--workdir={path} cannot be made ({error.strerror}): choose another.'
    ) from error


def _is_snapshot(step: int, last: int, frequency: int) -> bool:
  return step > 0 and (step % frequency == 0 or step == last)


def _initial_state(config: Any, directories: list[CheckpointDirectory]) -> tuple[nn.Module, State]:
  """The network, and the newest saved state or that of step 0, on all devices."""
  model, like = losses.abstract_state(config)
  state = checkpoints.restore_newest(directories, like)
  if state is None:
    state = parallelism.replicate(
      losses.init_state(configuration.stream(config, 'init'), config)[1]
    )
  count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  logging.info('parameters: %d', count)
  return model, state


def _check_finite(chunks: list[jax.Array], step: int) -> float:
  """The last of the losses up to `step`.

  Raises:
    NonFiniteLoss: if any of them is NaN or infinite.
  """
  values = np.concatenate([np.atleast_1d(np.asarray(chunk)) for chunk in chunks])
  bad = np.flatnonzero(~np.isfinite(values))
  if len(bad):
    raise NonFiniteLoss(
      f'training_loss is {values[bad[0]]} at step {step - len(values) + 1 + bad[0]}; the '
      f'checkpoints hold earlier steps. Lower optim.lr, lengthen optim.warmup or check the data.'
    )
  return float(values[-1])


def compile_train_step(
  config: Any,
  sde: SDE,
  model: nn.Module,
  preprocess: datasets.Preprocess,
  fused: bool | None = None,
) -> Callable[[State, list[np.ndarray]], tuple[State, jax.Array]]:
  """The function `(state, n uint8 batches) -> (state, n losses)`; it consumes the state.

  On accelerators the n steps are one compiled loop. On CPU, where a call costs nothing and XLA
  slows convolutions in loops down, they are n calls of the same compiled step.

  Args:
    config: reads `training`, `optim`, `seed`.
    sde: the forward SDE.
    model: the network.
    preprocess: see `datasets.get_preprocess_fn`.
    fused: overrides the choice.
  """
  step_fn = losses.build_step_fn(config, sde, model, train=True)
  root = configuration.stream(config, 'train')

  def one_step(state: State, images: jax.Array) -> tuple[State, jax.Array]:
    data_rng, step_rng = jax.random.split(jax.random.fold_in(root, state.step))
    batch = {'image': preprocess(data_rng, images)}
    (_, state), loss = step_fn((step_rng, state), batch)
    return state, loss

  whole = parallelism.replicated()
  if fused is None:
    fused = jax.default_backend() != 'cpu'
  if fused:
    compiled = jax.jit(
      lambda state, images: jax.lax.scan(one_step, state, images),
      donate_argnums=0,
      in_shardings=(whole, parallelism.batch_sharding(axis=1)),
      out_shardings=whole,
    )
    return lambda state, group: compiled(state, parallelism.global_batch(np.stack(group), axis=1))

  compiled = jax.jit(
    one_step,
    donate_argnums=0,
    in_shardings=(whole, parallelism.batch_sharding()),
    out_shardings=whole,
  )

  def steps(state: State, group: list[np.ndarray]) -> tuple[State, np.ndarray]:
    step_losses = []
    for images in group:
      state, loss = compiled(state, parallelism.global_batch(images))
      step_losses.append(loss)
    return state, np.asarray(step_losses)

  return steps


def compile_eval_step(
  config: Any, sde: SDE, model: nn.Module, preprocess: datasets.Preprocess
) -> Callable[[State, jax.Array], jax.Array]:
  """The function `(state, global uint8 batch) -> loss` of the EMA parameters."""
  step_fn = losses.build_step_fn(config, sde, model, train=False)
  root = configuration.stream(config, 'eval')

  @jax.jit
  def compiled(state: State, images: jax.Array) -> jax.Array:
    data_rng, step_rng = jax.random.split(jax.random.fold_in(root, state.step))
    batch = {'image': preprocess(data_rng, parallelism.shard_batch(images))}
    _, loss = step_fn((step_rng, state), batch)
    return loss

  return compiled


class SampleDrawer:
  """Draws a batch from the EMA parameters and writes it to `samples/iter_<step>_host_0`.

  The random numbers depend on the seed and the step only.
  """

  def __init__(self, config: Any, workdir: pathlib.Path, sde: SDE, model: nn.Module):
    data = config.data
    shape = (config.training.batch_size, data.image_size, data.image_size, data.num_channels)
    inverse_scaler = datasets.get_data_inverse_scaler(config)
    self._sampling_fn = sampling.get_sampling_fn(config, sde, model, shape, inverse_scaler)
    self._root = configuration.stream(config, 'sample')
    self._workdir = workdir
    self._enabled = config.training.snapshot_sampling

  def __call__(self, state: State, metrics: reporting.MetricWriter) -> None:
    step = int(state.step)
    directory = self._workdir / 'samples' / f'iter_{step}_host_0'
    if not self._enabled or (directory / 'sample.png').exists():
      return
    samples, nfe = self._sampling_fn(jax.random.fold_in(self._root, step), state)
    samples = parallelism.to_host(samples)
    if jax.process_index() == 0:
      reporting.write_samples(directory, samples)
    metrics.images('samples', samples, step)
    logging.info(
      'step: %d, %d samples with %d network calls: %s', step, len(samples), nfe, directory
    )


class Preemption:
  """Turns SIGTERM and SIGINT into a request to save and stop; a second SIGINT stops at once."""

  def __enter__(self) -> 'Preemption':
    self._signalled = False
    self._previous = {
      number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if self._signalled and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._signalled = True

  def requested(self, agreed: bool) -> bool:
    """Whether to stop now. Several processes ask one another only where all are `agreed` to."""
    if jax.process_count() == 1:
      return self._signalled
    return agreed and parallelism.any_process(self._signalled)

  def __exit__(self, *exc_info: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)


def evaluate(config: ml_collections.ConfigDict, workdir: str, eval_folder: str = 'eval') -> None:
  """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt` with their EMA parameters.

  Leaves in `workdir/eval_folder`: `report.json` and `report.csv`, and what they are made from, as
  `evaluation_run` describes. The same command continues an evaluation that was killed, to the same
  numbers.

  Raises:
    UserError: a wrong configuration, what cannot be read or written, or a checkpoint that does not
      exist.
  """
  reporting.log_to_console()
  config = configuration.prepare(config)
  evaluation_run.evaluate(config, pathlib.Path(workdir), eval_folder)


def make_stats(config: ml_collections.ConfigDict) -> None:
  """Makes the statistics of a data set that samples are compared with, and measures `sigma_max`.

  Raises:
    UserError: as `evaluation.write_stats`.
  """
  reporting.log_to_console()
  config = configuration.prepare(config)
  configuration.log_start(config)
  evaluation.write_stats(config)
