"""The floating point operations of a function, counted from its jaxpr without computing anything.

A product and a sum are two operations. Only convolutions and matrix products count, of which dense
layers and attention consist; everything else that a network does is a small part of its work.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

AnyJaxpr = core.Jaxpr | core.ClosedJaxpr


def of(function: Callable[..., Any], *args: Any) -> int:
  """The operations of `function(*args)`; arguments may be `jax.ShapeDtypeStruct`."""
  return count(jax.make_jaxpr(function)(*args))


def count(jaxpr: AnyJaxpr) -> int:
  """The operations of a jaxpr and of all jaxprs inside it.

  The body of a `scan` counts as often as it runs. The body of a `while` loop, whose number of runs
  is unknown, counts once. Of the branches of a `cond` the most expensive counts.
  """
  return sum(_operations(equation) for equation in jaxpr.eqns)


def _operations(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'conv_general_dilated':
    return _convolution(equation)
  if name == 'dot_general':
    return _matrix_product(equation)
  inner = [count(jaxpr) for jaxpr in _inner(params)]
  if name == 'cond':
    return max(inner)
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'shard_map':  # its body is what one device does
    mesh = params['mesh']
    # jax calls this parameter manual_axes or newly_manual_axes.
    axes = next(value for key, value in params.items() if key.endswith('manual_axes'))
    return math.prod(mesh.shape[axis] for axis in axes) * sum(inner)
  return sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[AnyJaxpr]:
  """The jaxprs among the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else [value]:
      if isinstance(item, AnyJaxpr):
        yield item


def _matrix_product(equation: core.JaxprEqn) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  shape = equation.invars[0].aval.shape
  return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
  """Products with the padding count; those with the zeros of a dilated input do not."""
  params = equation.params
  kernel, output = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
  numbers = params['dimension_numbers']
  _, inputs, *kernel_axes = numbers.rhs_spec
  batch, features, *output_axes = numbers.out_spec
  total = 2 * output[batch] * output[features] * kernel[inputs]
  for axis, (of_output, of_kernel) in enumerate(zip(output_axes, kernel_axes, strict=True)):
    # Where each element of the kernel reads, for each element of the output, in the dilated input.
    places = (
      np.arange(output[of_output])[:, None] * params['window_strides'][axis]
      + np.arange(kernel[of_kernel]) * params['rhs_dilation'][axis]
      - params['padding'][axis][0]
    )
    total *= int((places % params['lhs_dilation'][axis] == 0).sum())
  return total
