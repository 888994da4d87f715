"""Initial value problems over a batch, solved on the device by diffrax.

Diffrax is Kidger, "On neural differential equations", 2021, https://arxiv.org/abs/2202.02435.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from runtime.array_types import Count, Scalar
from runtime.errors import UserError

PyTree = Any

# The names of SciPy, which the `method` arguments of the 2021 code take, and those of diffrax.
_SCIPY = {'RK45': 'Dopri5', 'RK23': 'Bosh3', 'DOP853': 'Dopri8'}
_LEAST_STEP = 1e-9  # relative to the whole interval


def check_method(method: str) -> str:
  """Returns `method`, the name of an ODE solver.

  Raises:
    UserError: if `solve` does not know the name.
  """
  import diffrax  # here, since it takes half a second and most runs solve no ODE

  solver = getattr(diffrax, _SCIPY.get(method, method), None)
  known = isinstance(solver, type) and issubclass(solver, diffrax.AbstractERK)
  if not known or solver is diffrax.AbstractERK:
    raise UserError(
      f'Unknown ODE solver {method!r}: choose {", ".join(_SCIPY)} or the name of an explicit '
      f'Runge-Kutta method in diffrax, such as Tsit5.'
    )
  return method


def check_eps(eps: float, end: float) -> None:
  """Checks the time that the data of a flow from `eps` to `end` are assigned to.

  Raises:
    UserError: if it is not in (0, end).
  """
  if not 0 < eps < end:
    raise UserError(f'eps={eps} must be a time in (0, {end}): set likelihood.eps=1e-5 or so.')


def solve(
  drift: Callable[[Scalar, PyTree], PyTree],
  y0: PyTree,
  *,
  t0: float,
  t1: float,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  method: str = 'RK45',
  max_steps: int = 100_000,
) -> tuple[PyTree, Count]:
  """Solves dy/dt = drift(t, y), y(t0) = y0.

  The steps are chosen once for the whole tree `y0`, by the root mean square of the estimated errors
  relative to atol + rtol |y|, so that all devices take the same ones. Memory does not grow with
  their number.

  Args:
    drift: (t, y) -> dy/dt for a scalar time and a tree like `y0`.
    y0: the initial values, a tree of arrays.
    t0: the initial time, which may be later than `t1`.
    t1: the final time.
    rtol: the relative tolerance.
    atol: the absolute tolerance.
    method: 'RK45', 'RK23', 'DOP853' or the name of an explicit Runge-Kutta method in diffrax.
    max_steps: the largest number of steps; a solution that needs more, or steps shorter than a
      billionth of the interval, is NaN.

  Returns:
    y(t1), a tree like `y0`, and the NFE, which here is the number of calls of `drift`.

  Raises:
    UserError: if the method is unknown, a tolerance is negative, or both are zero.
  """
  import diffrax

  name = check_method(method)
  if rtol < 0 or atol < 0 or rtol == atol == 0:
    raise UserError(
      f'rtol={rtol} and atol={atol} must not be negative, nor both zero: set both to 1e-5 or so.'
    )
  solver = getattr(diffrax, _SCIPY.get(name, name))()
  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, y, args: drift(t, y)),
    solver,
    t0,
    t1,
    dt0=0.01 * (t1 - t0),  # only a first guess: a step whose error is too large is repeated
    y0=y0,
    # Where the drift is not finite, every step is refused: the least one ends that.
    stepsize_controller=diffrax.PIDController(
      rtol, atol, dtmin=_LEAST_STEP * abs(t1 - t0), force_dtmin=False
    ),
    max_steps=max_steps,
    throw=False,  # a program that can raise calls the host, and such a program is never cached
    adjoint=diffrax.ForwardMode(),  # no solution is differentiated backwards, so none is stored
  )
  # With the FSAL property, the first stage of a step is the last stage of the step before.
  reused = int(solver.tableau.fsal)
  calls = solution.stats['num_steps'] * (len(solver.tableau.b_sol) - reused) + reused
  solved = solution.result == diffrax.RESULTS.successful
  final = jax.tree.map(lambda y: jnp.where(solved, y[0], jnp.nan), solution.ys)
  return final, jnp.asarray(calls, jnp.int32)
