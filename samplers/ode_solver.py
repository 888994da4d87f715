"""Initial value problems over a batch, solved on the device by diffrax."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp

from runtime.errors import UserError

# SciPy's names, which the reference's `method` arguments take, and the same methods in diffrax.
_SCIPY = {'RK45': 'Dopri5', 'RK23': 'Bosh3', 'DOP853': 'Dopri8'}


def check_method(method: str) -> str:
  """Returns `method` if `solve` knows it.

  Raises:
    UserError: if not.
  """
  solver = getattr(diffrax, _SCIPY.get(method, method), None)
  known = isinstance(solver, type) and issubclass(solver, diffrax.AbstractERK)
  if not known or solver is diffrax.AbstractERK:
    raise UserError(
      f'Unknown ODE solver {method!r}: choose {", ".join(_SCIPY)} or the name of an explicit '
      f'Runge-Kutta method of diffrax, such as Tsit5.'
    )
  return method


def solve(
  drift: Callable[[jax.Array, Any], Any],
  y0: Any,
  t0: float,
  t1: float,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  method: str = 'RK45',
  max_steps: int = 100_000,
) -> tuple[Any, jax.Array]:
  """y(t1) of dy/dt = drift(t, y), y(t0) = y0, and the number of calls of `drift`.

  The steps are chosen once for the whole tree `y0`, by the root mean square of the estimated errors
  relative to atol + rtol |y|, so that all devices take the same ones. Memory does not grow with
  their number.

  Args:
    drift: of a scalar time and a tree like `y0`.
    y0: initial values.
    t0: initial time; may be later than `t1`.
    t1: final time.
    rtol: relative tolerance.
    atol: absolute tolerance.
    method: 'RK45', 'RK23', 'DOP853' or an explicit Runge-Kutta method of diffrax.
    max_steps: more raise an error at run time.

  Raises:
    UserError: for an unknown method, or tolerances that no step can meet.
  """
  name = check_method(method)
  if rtol < 0 or atol < 0 or rtol == atol == 0:
    raise UserError(f'rtol={rtol} and atol={atol} must not be negative, nor both zero.')
  solver = getattr(diffrax, _SCIPY.get(name, name))()
  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, y, args: drift(t, y)),
    solver,
    t0,
    t1,
    dt0=0.01 * (t1 - t0),  # a first try; steps whose error is too large are taken again
    y0=y0,
    stepsize_controller=diffrax.PIDController(rtol, atol),
    max_steps=max_steps,
    adjoint=diffrax.ForwardMode(),  # keeps nothing for a gradient
  )
  # Where a method allows it, the first stage of a step is the last of the one before.
  reused = int(solver.tableau.fsal)
  calls = solution.stats['num_steps'] * (len(solver.tableau.b_sol) - reused) + reused
  final = jax.tree.map(lambda y: y[0], solution.ys)
  return final, jnp.asarray(calls, jnp.int32)
