"""Training and evaluation: the wiring between configuration, data, state and outputs."""

import contextlib
import dataclasses
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import tqdm
from absl import logging

import datasets
import evaluation
import losses
import sampling
import sde_lib
from losses import State
from modes import evaluate as evaluation_run
from modes import sample as sampling_run
from runtime import checkpoints, configuration, parallelism, reporting
from runtime.checkpoints import CheckpointDirectory
from runtime.workdir import at_work, check_run, log_start, record
from sde_lib import SDE


class NonFiniteLoss(FloatingPointError):
  """Training has diverged; the message names the metric and the step."""


def train(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains the configured network, or resumes its training.

  Leaves in `workdir`: `checkpoints/` (every `training.snapshot_freq` steps, all kept),
  `checkpoints-meta/` (the latest states, where the same command resumes), `samples/`,
  `metrics.jsonl`, `tensorboard/`, `config.json`, `data.json`, `versions.json` and `stdout.txt`.

  Every batch and every random number is a function of the seed and the step, so a run that was
  killed continues to the same bits.

  Raises:
    UserError: a configuration or data that are wrong or contradict the run in `workdir`, or another
      process that is at work there.
    NonFiniteLoss: the loss is NaN or infinite.
  """
  reporting.log_to_console()
  config = configuration.prepare(config)
  workdir = pathlib.Path(workdir).expanduser()
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
      draw = SampleDrawer(
        config, workdir, sde, model, lambda: run.preemption.requested(agreed=False)
      )

      def evaluate(state: State, step: int, metrics: reporting.MetricWriter) -> None:
        images = eval_ds.batch(step // config.training.eval_freq)['image']
        batch = parallelism.global_batch(images)
        metrics.scalar('eval_loss', float(eval_step(state, batch)), step)

      batches = (batch['image'] for batch in train_ds.iterate(int(state.step)))
      train_loop(config.training, run, state, batches, train_step, evaluate, draw)


@dataclasses.dataclass(frozen=True)
class Run:
  """A working directory in which a training is going on.

  Attributes:
    workdir: the directory.
    snapshots: the checkpoints that are kept.
    latest: the latest states, from which the run continues.
    preemption: says when to stop.
  """

  workdir: pathlib.Path
  snapshots: CheckpointDirectory
  latest: CheckpointDirectory
  preemption: 'Preemption'

  @property
  def directories(self) -> list[CheckpointDirectory]:
    return [self.latest, self.snapshots]


@contextlib.contextmanager
def open_run(workdir: pathlib.Path) -> Iterator[Run]:
  """Opens the checkpoint directories of a run and takes its signals; waits for the last save."""
  with (
    CheckpointDirectory(workdir / checkpoints.DIRECTORIES[0]) as snapshots,
    CheckpointDirectory(workdir / checkpoints.DIRECTORIES[1], keep=2) as latest,
    Preemption() as preemption,
  ):
    yield Run(workdir, snapshots, latest, preemption)


def train_loop(
  training: Any,
  run: Run,
  state: State,
  batches: Iterator[Any],
  train_step: Callable[[State, list[Any]], tuple[State, jax.Array]],
  evaluate: Callable[[State, int, reporting.MetricWriter], None],
  at_snapshot: Callable[[State, reporting.MetricWriter], bool],
) -> State | None:
  """Steps from `state` to the last, with metrics, checkpoints and stopping.

  Args:
    training: `n_iters`, `n_jitted_steps` and the four frequencies.
    run: where everything goes.
    state: the state to start from.
    batches: one per step, from that of `state` on.
    train_step: `(state, n batches) -> (state, n losses)`; it consumes the state.
    evaluate: called every `eval_freq` steps.
    at_snapshot: called after every kept checkpoint, and again when a run continues from one;
      returns False if it was asked to stop.

  Returns:
    The last state; None if a signal stopped the run before.

  Raises:
    NonFiniteLoss: the loss is NaN or infinite.
  """
  step = int(state.step)
  last = training.n_iters - training.n_iters % training.n_jitted_steps
  with (
    reporting.MetricWriter(run.workdir, step) as metrics,
    tqdm.tqdm(total=last, initial=step, unit='step', disable=None) as progress,
  ):
    if _is_snapshot(step, last, training.snapshot_freq):
      at_snapshot(state, metrics)  # if the process was killed after the checkpoint, before this
    unchecked = []
    while step < last:
      group = [next(batches) for _ in range(training.n_jitted_steps)]
      state, step_losses = train_step(state, group)
      step += training.n_jitted_steps
      unchecked.append(step_losses)
      progress.update(training.n_jitted_steps)

      snapshot_due = _is_snapshot(step, last, training.snapshot_freq)
      save_due = snapshot_due or step % training.snapshot_freq_for_preemption == 0
      stop = run.preemption.requested(step % training.log_freq == 0)
      if step % training.log_freq == 0 or save_due or stop:
        loss = _check_finite(unchecked, step, run)
        unchecked = []
      if step % training.log_freq == 0:
        metrics.scalar('training_loss', loss, step)
        progress.set_postfix(loss=f'{loss:.4g}')
      if step % training.eval_freq == 0:
        evaluate(state, step, metrics)
      if snapshot_due:
        run.snapshots.save(-(-step // training.snapshot_freq), state)
        stop = not at_snapshot(state, metrics) or stop
      if save_due or stop:
        run.latest.save(step, state)
      if stop:
        logging.info('Stopped by a signal at step %d; the same command resumes.', step)
        return None
  logging.info('Training is complete at step %d.', step)
  return state


def _is_snapshot(step: int, last: int, frequency: int) -> bool:
  return step > 0 and (step % frequency == 0 or step == last)


def _initial_state(config: Any, directories: list[CheckpointDirectory]) -> tuple[nn.Module, State]:
  """The network, and the newest saved state or that of step 0, on all devices."""
  model, like = losses.abstract_state(config)
  init = lambda: losses.init_state(configuration.stream(config, 'init'), config)[1]
  return model, restore_or_init(directories, like, init)


def restore_or_init(
  directories: list[CheckpointDirectory], like: State, init: Callable[[], State]
) -> State:
  """The newest saved state, shaped as `like`, or else that of `init`, on all devices."""
  state = checkpoints.resume(directories, like)
  if state is None:
    state = parallelism.replicate(init())
  count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  logging.info('parameters: %d', count)
  return state


def _check_finite(chunks: list[jax.Array], step: int, run: Run) -> float:
  """The last of the losses up to `step`.

  Raises:
    NonFiniteLoss: if any of them is NaN or infinite.
  """
  values = np.concatenate([np.atleast_1d(np.asarray(chunk)) for chunk in chunks])
  bad = np.flatnonzero(~np.isfinite(values))
  if len(bad):
    saved = any(directory.numbers() for directory in run.directories)
    raise NonFiniteLoss(
      f'training_loss is {values[bad[0]]} at step {step - len(values) + 1 + bad[0]}'
      f'{"; the checkpoints hold earlier steps" if saved else ""}. Start again in a new --workdir '
      f'with a lower optim.lr, a longer optim.warmup or a smaller optim.grad_clip, or check '
      f'the data.'
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

  Args:
    config: reads `training`, `optim`, `seed`.
    sde: the forward SDE.
    model: the network.
    preprocess: see `datasets.get_preprocess_fn`.
    fused: see `compile_steps`.
  """
  step_fn = losses.build_step_fn(config, sde, model, train=True)
  root = configuration.stream(config, 'train')

  def one_step(state: State, images: jax.Array) -> tuple[State, jax.Array]:
    data_rng, step_rng = jax.random.split(jax.random.fold_in(root, state.step))
    batch = {'image': preprocess(data_rng, images)}
    (_, state), loss = step_fn((step_rng, state), batch)
    return state, loss

  return compile_steps(one_step, fused)


def compile_steps(
  one_step: Callable[[State, Any], tuple[State, jax.Array]], fused: bool | None = None
) -> Callable[[State, list[Any]], tuple[State, jax.Array]]:
  """The function `(state, n batches) -> (state, n losses)`; it consumes the state.

  On accelerators the n steps are one compiled loop. On CPU, where a call costs nothing and XLA
  slows convolutions in loops down, they are n calls of the same compiled step.

  Args:
    one_step: `(state, global batch) -> (state, loss)`.
    fused: overrides the choice.
  """
  whole = parallelism.replicated()
  if fused is None:
    fused = jax.default_backend() != 'cpu'
  if fused:
    compiled = jax.jit(
      lambda state, batches: jax.lax.scan(one_step, state, batches),
      donate_argnums=0,
      in_shardings=(whole, parallelism.batch_sharding(axis=1)),
      out_shardings=whole,
    )
    stack = lambda group: jax.tree.map(lambda *arrays: np.stack(arrays), *group)
    return lambda state, group: compiled(state, parallelism.global_batch(stack(group), axis=1))

  compiled = jax.jit(
    one_step,
    donate_argnums=0,
    in_shardings=(whole, parallelism.batch_sharding()),
    out_shardings=whole,
  )

  def steps(state: State, group: list[Any]) -> tuple[State, np.ndarray]:
    step_losses = []
    for batch in group:
      state, loss = compiled(state, parallelism.global_batch(batch))
      # Waits: several calls in flight may deadlock, each with a share of XLA's threads.
      step_losses.append(np.asarray(loss))
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


class _Interrupted(Exception):
  """Sampling was asked to stop."""


class SampleDrawer:
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
    config: Any,
    workdir: pathlib.Path,
    sde: SDE,
    model: nn.Module,
    stop_requested: Callable[[], bool] = lambda: False,
  ):
    data = config.data
    shape = (config.training.batch_size, data.image_size, data.image_size, data.num_channels)
    inverse_scaler = datasets.get_data_inverse_scaler(config)
    self._sampling_fn = sampling.get_sampling_fn(config, sde, model, shape, inverse_scaler)
    self._root = configuration.stream(config, 'sample')
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
      samples, nfe = self._sampling_fn(rng, state, watch=self._watch)
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

  def _watch(self, *progress: Any) -> None:
    del progress
    if self._stop_requested():
      raise _Interrupted


class Preemption:
  """Turns SIGTERM and SIGINT into a request to save and stop; a second SIGINT stops at once."""

  def __enter__(self) -> 'Preemption':
    self._signalled = False
    # Only the main thread may handle signals; a training elsewhere is stopped by its caller.
    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if in_main else ()
    self._previous = {number: signal.signal(number, self._handle) for number in numbers}
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


def sample(
  config: ml_collections.ConfigDict, workdir: str, checkpoint_number: int | None = None
) -> None:
  """Draws `sampling.num_samples` images with the EMA parameters, under `sampling.task`.

  Leaves them in `samples/<task>_<method>_step_<S>_seed_<seed>/`, as `sampling_run` describes.

  Args:
    config: the configuration of the run.
    workdir: its directory.
    checkpoint_number: which of `checkpoints/` to take; by default the newest state.

  Raises:
    UserError: a wrong configuration, or a checkpoint that does not exist.
  """
  reporting.log_to_console()
  config = configuration.prepare(config)
  sampling_run.sample(config, pathlib.Path(workdir).expanduser(), checkpoint_number)


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
  evaluation_run.evaluate(config, pathlib.Path(workdir).expanduser(), eval_folder)


def make_stats(config: ml_collections.ConfigDict) -> None:
  """Makes the statistics of a data set that samples are compared with, and measures `sigma_max`.

  Raises:
    UserError: as `evaluation.write_stats`.
  """
  reporting.log_to_console()
  config = configuration.prepare(config)
  log_start(config)
  evaluation.write_stats(config)
