"""The loop of every training: steps, metrics, checkpoints and stopping."""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from ml_collections import ConfigDict

from modes.divergence import Guard, raise_if_nonfinite
from runtime import checkpoints, parallelism, reporting
from runtime.checkpoints import CheckpointDirectory
from runtime.errors import UserError
from runtime.preemption import Preemption, to_resume
from runtime.progress import Pace, duration, memory
from runtime.stragglers import Stragglers
from train_state import State, updates

PyTree = Any
TrainStep = Callable[[State, list[PyTree]], tuple[State, PyTree]]
KEPT_STATES = checkpoints.Retention(last=2)  # of those from which a run resumes


@dataclasses.dataclass(frozen=True)
class Run:
  """A training in progress.

  Attributes:
    workdir: its directory.
    snapshots: the checkpoints that are all kept.
    latest: the two latest states, from which the run resumes.
    preemption: tells when a signal asks the run to stop.
  """

  workdir: pathlib.Path
  snapshots: CheckpointDirectory
  latest: CheckpointDirectory
  preemption: Preemption

  @property
  def directories(self) -> list[CheckpointDirectory]:
    """Both checkpoint directories, the latest states first."""
    return [self.latest, self.snapshots]


@contextlib.contextmanager
def open_run(workdir: pathlib.Path, keep_checkpoints: str = 'all') -> Iterator[Run]:
  """Opens the checkpoint directories of a run and handles its signals; waits for the last save.

  Args:
    workdir: the directory of the run.
    keep_checkpoints: which of the snapshots stay, see `checkpoints.Retention`.
  """
  snapshots_kept = checkpoints.Retention.parse(keep_checkpoints)
  with (
    Preemption() as preemption,  # first, so that no signal interrupts the end of the last save
    CheckpointDirectory(workdir / checkpoints.DIRECTORIES[0], snapshots_kept) as snapshots,
    CheckpointDirectory(workdir / checkpoints.DIRECTORIES[1], KEPT_STATES) as latest,
  ):
    yield Run(workdir, snapshots, latest, preemption)


def train_loop(
  training: ConfigDict,
  run: Run,
  state: State,
  *,
  batches: Iterator[PyTree],
  train_step: TrainStep,
  evaluate: Callable[[State, int, reporting.MetricWriter], None],
  at_snapshot: Callable[[State, reporting.MetricWriter], bool],
) -> State | None:
  """Trains from `state` to the last step, with metrics, checkpoints and stopping.

  Args:
    training: `n_iters`, `batch_size`, `n_jitted_steps`, the four frequencies, and what to do about
      numbers that are not finite.
    run: the run.
    state: the state to start from.
    batches: one for each step, beginning with the step of `state`.
    train_step: `(state, n batches) -> (state, numbers)`, the loss and others of each of the n
      steps, with `training_loss`; it consumes the state.
    evaluate: called as `evaluate(state, step, metrics)` every `eval_freq` steps.
    at_snapshot: called after every kept checkpoint, and again when a run resumes from one; it
      returns False if a signal asked it to stop.

  Returns:
    The last state; None if a signal stopped the run before.

  Raises:
    NonFiniteLoss: the loss or the gradient is NaN or infinite, and may not be skipped.
    NonFiniteState: a parameter to be saved is NaN or infinite.
    UnsavedCheckpoint: a checkpoint could not be written.
    UserError: `n_jitted_steps` does not divide the step of `state`.
  """
  step = int(state.step)
  on_cpu = jax.default_backend() == 'cpu'  # where a call returns when its steps are done
  last = training.n_iters - training.n_iters % training.n_jitted_steps
  if step < last and step % training.n_jitted_steps:  # else no frequency would ever be met
    raise UserError(
      f'{run.workdir} resumes from step {step}, no multiple of training.n_jitted_steps='
      f'{training.n_jitted_steps}: add --config.training.n_jitted_steps=1.'
    )
  with (
    reporting.MetricWriter(run.workdir, step) as metrics,
    tqdm.tqdm(total=last, initial=step, unit='step', disable=None) as bar,
  ):
    log = StepLog(metrics, last, training.batch_size, saved=step)
    if _is_snapshot(step, last, training.snapshot_freq):
      # If the process was killed after one of the checkpoints, before the others of these.
      number = _snapshot_number(step, training.snapshot_freq)
      if parallelism.from_first_process(number not in run.snapshots.numbers()):
        run.snapshots.save(number, step, state)
      drawn = at_snapshot(state, metrics)
      if parallelism.from_first_process(step not in run.latest.numbers()):
        run.latest.save(step, step, state)
      if not drawn:  # else the next start would be beyond this step
        _log_stop(step)
        return None
    skips = training.on_nonfinite == 'skip'
    skipped = step - int(updates(state)) if skips else 0
    guard = Guard(skips=skips, most=training.max_skipped_steps, skipped=skipped)
    stragglers = Stragglers()
    unchecked = []

    def fetch() -> None:
      """Waits for the losses so far, and logs the one of the last step that is to be logged."""
      nonlocal unchecked
      if not unchecked:
        return
      last_step = unchecked[-1][0]
      numbers = jax.tree.map(lambda *x: np.concatenate(x), *(numbers for _, numbers in unchecked))
      guard(last_step, numbers)
      unchecked = []
      if last_step % training.log_freq == 0:
        skipped = {'skipped_steps': guard.skipped} if guard.skipped else {}
        log(last_step, {name: float(values[-1]) for name, values in numbers.items()} | skipped)

    if step < last:
      logging.info('Compiling the training step, which takes a while.')
    while step < last:
      with stragglers.waiting():
        group = [next(batches) for _ in range(training.n_jitted_steps)]
      state, numbers = train_step(state, group)
      if step % training.log_freq == 0 and not on_cpu:
        fetch()  # while an accelerator is busy with the steps that were just started
      step += training.n_jitted_steps
      unchecked.append((step, numbers))
      bar.update(training.n_jitted_steps)
      log.start(step)

      snapshot_due = _is_snapshot(step, last, training.snapshot_freq)
      save_due = snapshot_due or step % training.snapshot_freq_for_preemption == 0
      stop = run.preemption.requested(step % training.log_freq == 0)
      if step % training.log_freq == 0:
        stragglers.compare()
      evaluation_due = step % training.eval_freq == 0
      log_due = on_cpu and step % training.log_freq == 0
      if log_due or save_due or evaluation_due or stop or step == last:
        fetch()
      interrupted = save_due or evaluation_due
      if evaluation_due:
        evaluate(state, step, metrics)
      if snapshot_due:
        run.snapshots.save(_snapshot_number(step, training.snapshot_freq), step, state)
        stop = not at_snapshot(state, metrics) or stop
      if save_due or stop:
        run.latest.save(step, step, state)
        log.saved = step
      if stop:
        _log_stop(step)
        return None
      if interrupted:
        log.pace.resume(step)
  logging.info('Training is complete at step %d.', step)
  return state


def _log_stop(step: int) -> None:
  logging.info('Stopped by a signal at step %d and saved. %s', step, to_resume())


class StepLog:
  """Writes the numbers of steps to the metrics, and a line of them and of the speed to the log.

  Args:
    metrics: where the numbers go.
    last: the last step of the training.
    batch_size: the number of images of a step.
    saved: the step that was saved last; 0 if none was.
  """

  def __init__(self, metrics: reporting.MetricWriter, last: int, batch_size: int, *, saved: int):
    self.pace, self.saved = Pace(last), saved
    self._metrics, self._last, self._batch_size = metrics, last, batch_size
    self._started = False

  def start(self, step: int) -> None:
    """Starts the clock after the first call of a training step, which compiles it."""
    if not self._started:
      self.pace.resume(step)
      self._started = True

  def __call__(self, step: int, numbers: dict[str, float]) -> None:
    """Writes `numbers`, of which `training_loss` is one, of a step."""
    speed, seconds = self.pace.lap(step)
    images = None if speed is None else speed * self._batch_size
    measured = {'images_per_second': images, 'memory': memory()}
    loss = numbers['training_loss']  # first, whatever the order of the others
    written = {'training_loss': loss, **numbers, **measured}
    known = {name: x for name, x in written.items() if x is not None and math.isfinite(x)}
    self._metrics.scalars(known, step)
    rates = '' if speed is None else f'{speed:.4g} steps/s, {images:.0f} images/s, '
    others = {name.replace('_', ' '): x for name, x in numbers.items() if name != 'training_loss'}
    shown = ''.join(f', {name} {x:.4g}' for name, x in others.items())
    left = '' if seconds is None else f', {duration(seconds)} left'
    saved = f'last checkpoint at step {self.saved}' if self.saved else 'no checkpoint yet'
    logging.info(
      'step %d of %d: %sloss %.5g%s%s, %s', step, self._last, rates, loss, shown, left, saved
    )


def _is_snapshot(step: int, last: int, frequency: int) -> bool:
  return step > 0 and (step % frequency == 0 or step == last)


def _snapshot_number(step: int, frequency: int) -> int:
  """Its number among the snapshots; the last step of a run may come before the next is due."""
  return -(-step // frequency)


def restore_or_init(
  directories: list[CheckpointDirectory], like: State, init: Callable[[], State]
) -> State:
  """The newest saved state, or the result of `init` if none is saved, on all devices.

  Args:
    directories: where states are saved.
    like: the state with shapes in place of arrays.
    init: draws the state that a training starts from, on the devices.

  Raises:
    DamagedCheckpoint: if all saved states are damaged.
    MisfitCheckpoint: if a saved state is not shaped as `like`.
  """
  state = checkpoints.resume(directories, like)
  if state is None:
    state = init()
  count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  logging.info('parameters: %d', count)
  return state


def compile_steps(
  one_step: Callable[[State, PyTree, PyTree], tuple[State, PyTree]],
  constants: PyTree = None,
  fused: bool | None = None,
  *,
  debug_nans: bool = False,
) -> TrainStep:
  """Compiles `(state, n batches) -> (state, numbers (n,))`, which consumes the state.

  The state is split over the devices as `parallelism.place` does it.

  On accelerators the n steps are one compiled loop. On CPU, where a call costs nothing and XLA
  slows convolutions in loops down, they are n calls of the same compiled step.

  Args:
    one_step: `(state, global batch, constants) -> (state, numbers)`, a tree of scalars.
    constants: arrays that every device holds, such as all images.
    fused: whether to compile a loop; None decides by the kind of device.
    debug_nans: whether to check every step, and to search one that is not finite for the first
      operation that is to blame; the state is then not consumed, and steps are single calls.

  Raises:
    NonFiniteLoss: by the compiled steps, with `debug_nans`.
  """
  whole = parallelism.replicated()

  def step(state: State, batch: PyTree, constants: PyTree) -> tuple[State, PyTree]:
    state, numbers = one_step(state, batch, constants)
    return parallelism.split_parameters(state), numbers

  if fused is None:
    fused = jax.default_backend() != 'cpu'
  if fused and not debug_nans:
    compiled = jax.jit(
      lambda state, batches, constants: jax.lax.scan(
        lambda state, batch: step(state, batch, constants), state, batches
      ),
      donate_argnums=0,
      in_shardings=(None, parallelism.batch_sharding(axis=1), whole),
      out_shardings=(None, whole),
    )
    return lambda state, group: compiled(
      state, parallelism.global_batch(_stack(group), axis=1), constants
    )

  compiled = jax.jit(
    step,
    donate_argnums=() if debug_nans else 0,
    in_shardings=(None, parallelism.batch_sharding(), whole),
    out_shardings=(None, whole),
  )

  def steps(state: State, group: list[PyTree]) -> tuple[State, PyTree]:
    all_numbers = []
    for batch in group:
      arguments = state, parallelism.global_batch(batch), constants
      state, numbers = compiled(*arguments)
      # This waits: several calls in flight may deadlock, each with a share of XLA's threads.
      all_numbers.append(jax.tree.map(np.asarray, numbers))
      if debug_nans:
        raise_if_nonfinite(all_numbers[-1], functools.partial(step, *arguments), int(state.step))
    return state, _stack(all_numbers)

  return steps


def _stack(trees: list[PyTree]) -> PyTree:
  return jax.tree.map(lambda *arrays: np.stack(arrays), *trees)
