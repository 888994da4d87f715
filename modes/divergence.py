"""What a training does when its numbers are not finite, or have left all bounds."""

import collections
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jaxtyping import Float
from ml_collections import ConfigDict

from runtime.array_types import Array
from runtime.errors import UserError

Numbers = dict[str, Float[Array, 'n']]  # noqa: F821 (of n steps, by name)

POLICIES = ('stop', 'skip')
_WATCHED = ('training_loss', 'gradient_norm')

# A loss is hopeless if its median over the recent steps is that many times the one before. Single
# losses vary by more, above all with likelihood weighting.
_RECENT, _REMEMBERED, _HOPELESS = 100, 1000, 10.0


class NonFiniteLoss(FloatingPointError):
  """Training has diverged; the message names the metric and the step."""


def check(training: ConfigDict) -> None:
  """Refuses settings of `config.training` that cannot work.

  Raises:
    UserError: for an unknown policy, or a negative number of steps.
  """
  if training.on_nonfinite not in POLICIES:
    raise UserError(
      f'Unknown training.on_nonfinite {training.on_nonfinite!r}: choose one of '
      f'{", ".join(POLICIES)}.'
    )
  if training.max_skipped_steps < 0:
    raise UserError(
      f'training.max_skipped_steps={training.max_skipped_steps} must not be negative.'
    )


class Guard:
  """Watches the loss and the gradient norm of every step.

  Args:
    skips: whether the training step skips what is not finite, as `training.on_nonfinite` says.
    most: how many steps in a row may be skipped.
    skipped: how many were skipped before the run was resumed.

  Attributes:
    skipped: the number of steps skipped so far.
  """

  def __init__(self, *, skips: bool, most: int, skipped: int = 0):
    self.skipped = skipped
    self._most = most if skips else 0
    self._in_a_row = 0
    self._losses: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)

  def __call__(self, last: int, numbers: Numbers) -> None:
    """Takes the numbers of the steps up to `last`.

    Raises:
      NonFiniteLoss: if one of them is not finite, and may not be skipped.
    """
    values = {name: np.atleast_1d(numbers[name]) for name in _WATCHED if name in numbers}
    finite = np.all([np.isfinite(x) for x in values.values()], axis=0)
    first = last - len(finite) + 1
    for i in np.flatnonzero(~finite):
      step = int(first + i)
      self._in_a_row = self._in_a_row + 1 if i == 0 or not finite[i - 1] else 1
      name, value = next((n, float(x[i])) for n, x in values.items() if not np.isfinite(x[i]))
      if self._in_a_row > self._most:
        raise NonFiniteLoss(self._stopped(name, value, step))
      self.skipped += 1
      logging.warning(
        '%s is %s at step %d: the step is skipped, which leaves the parameters as they were '
        '(%d in a row, %d so far).',
        name,
        value,
        step,
        self._in_a_row,
        self.skipped,
      )
    if finite[-1]:
      self._in_a_row = 0
    self._losses.extend(values['training_loss'][finite].tolist())
    self._report_a_spike(last)

  def _stopped(self, name: str, value: float, step: int) -> str:
    before = self._in_a_row - 1
    skipped = f', after {before} skipped steps in a row' if before else ''
    return (
      f'{name} is {value} at step {step}{skipped}, which no checkpoint holds: train in a new '
      f'--workdir with a lower optim.lr, a longer optim.warmup or a smaller optim.grad_clip, or '
      f'check the data. training.debug_nans=True finds where it comes from.'
    )

  def _report_a_spike(self, step: int) -> None:
    if len(self._losses) < 2 * _RECENT:
      return
    losses = np.array(self._losses)
    before, recent = np.median(losses[:-_RECENT]), np.median(losses[-_RECENT:])
    if recent > _HOPELESS * abs(before):
      logging.warning(
        'The loss has risen at step %d: its median over %d steps is %.4g, and was %.4g before. If '
        'it does not return, train in a new --workdir with a lower optim.lr, a longer '
        'optim.warmup or a smaller optim.grad_clip.',
        step,
        _RECENT,
        recent,
        before,
      )
      self._losses.clear()  # a second report needs a second rise


def raise_if_nonfinite(
  numbers: dict[str, np.ndarray], step_fn: Callable[[], Any], step: int
) -> None:
  """If a number of a training step is not finite, says which operation is the first to blame.

  For that it runs the step again, operation by operation.

  Args:
    numbers: the numbers of the step, scalars by name.
    step_fn: the training step, with its arguments.
    step: the number of the step.

  Raises:
    NonFiniteLoss: if any of them is not finite.
  """
  bad = {name: numbers[name] for name in _WATCHED if not np.isfinite(numbers.get(name, 0.0))}
  if not bad:
    return
  path: list[str] = []  # of the layer that is being computed

  def note(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    outer, path[:] = path[:], context.module.path
    result = call(*args, **kwargs)
    path[:] = outer  # not if the call raises, so that the path is that of the failure
    return result

  found = 'no operation gives such a value when each is computed alone'
  logging.info('Looking for the first value that is not finite, which takes a while.')
  with nn.intercept_methods(note), jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
    try:
      step_fn()
    except FloatingPointError as error:
      match = re.search(r'\((\w+)\) encountered in (.+?)\.?$', str(error).splitlines()[0])
      what = f'{match[2]} gives {match[1]}' if match else str(error).splitlines()[0]
      where = f'in the layer {"/".join(path)}' if path else 'outside the layers or in a gradient'
      found = f'{what} {where}'
  name, value = next(iter(bad.items()))
  raise NonFiniteLoss(
    f'{name} is {value} at step {step}. The first value that is not finite: {found}.'
  )
