"""Counts the floating-point operations of matrix products and convolutions in a traced function.

XLA's cost analysis counts the body of a loop once. The trace contains the length of each scan and the grid of each
Pallas kernel, so this count includes all iterations and programs, the padding of their blocks, and products that shift
images.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def count(function: Callable[..., Any], *args: Any) -> int:
  """Returns the operations of one call; a multiply-add counts as two.

  Args:
    function: a function that JAX can trace. Loops of unknown length count as one iteration.
    args: arrays or `jax.ShapeDtypeStruct`.
  """
  return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    elif name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      outputs = params["dimension_numbers"].rhs_spec[0]
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
    else:
      inner = sum(_of(sub) for value in params.values() for sub in _jaxprs(value))
      if name == "scan":
        inner *= params["length"]
      elif name == "pallas_call":
        inner *= math.prod(params["grid_mapping"].grid)
      total += inner
  return total


def _jaxprs(value: Any) -> list[Any]:
  if hasattr(value, "jaxpr"):
    return [value.jaxpr]
  if hasattr(value, "eqns"):
    return [value]
  if isinstance(value, tuple | list):
    return [jaxpr for item in value for jaxpr in _jaxprs(item)]
  return []
