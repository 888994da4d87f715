"""The loop of every training: steps, metrics, checkpoints and stopping."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from ml_collections import ConfigDict

from runtime import checkpoints, parallelism, reporting
from runtime.checkpoints import CheckpointDirectory
from runtime.preemption import Preemption
from train_state import State


class NonFiniteLoss(FloatingPointError):
  """Training has diverged; the message names the metric and the step."""


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
  preemption: Preemption

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
  training: ConfigDict,
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
        run.snapshots.save(-(-step // training.snapshot_freq), step, state)
        stop = not at_snapshot(state, metrics) or stop
      if save_due or stop:
        run.latest.save(step, step, state)
      if stop:
        logging.info('Stopped by a signal at step %d; the same command resumes.', step)
        return None
  logging.info('Training is complete at step %d.', step)
  return state


def _is_snapshot(step: int, last: int, frequency: int) -> bool:
  return step > 0 and (step % frequency == 0 or step == last)


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
