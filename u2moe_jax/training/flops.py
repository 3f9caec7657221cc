"""Floating-point operations of a step, and what a device could do."""

import math
import re
from typing import Any

# bfloat16 multiply-adds counted as two, per second and device, dense, as the
# makers state them; by a part of `device_kind`, the more special ones first.
_PEAKS = (
  ('TPU v6 lite', 918e12),
  ('TPU v5 lite', 197e12),
  ('TPU v5', 459e12),
  ('TPU v4', 275e12),
  ('TPU v3', 123e12),
  ('TPU v2', 46e12),
  ('B200', 2250e12),
  ('H200', 989e12),
  ('H100 PCIe', 756e12),
  ('H100', 989e12),
  ('A100', 312e12),
  ('A10G', 70e12),
  ('L40S', 362e12),
  ('L4', 121e12),
  ('V100', 125e12),
  ('T4', 65e12),
)


def peak(device_kind: str) -> float | None:
  """Operations a second that a device could do at best; None if unknown."""
  for name, value in _PEAKS:
    # An L40 is no L4.
    if re.search(rf'\b{name}(?!\d)', device_kind):
      return value
  return None


def count(jaxpr: Any) -> float:
  """Operations of the products in a program, a multiply-add being two.

  The compiler's own cost analysis counts the body of a loop once, and a stack
  of blocks is a loop; here a scan counts as often as it runs. A loop whose
  number of rounds is known only at run time (the `blocked` executor) counts
  once, so its programs do more than is told.

  Args:
    jaxpr: what `jax.jit(f).trace(...)` holds as `jaxpr`.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = equation.invars[0].aval.shape
    depth = math.prod(left[i] for i in contracted)
    return 2.0 * _size(equation.outvars[0]) * depth
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    # The first entry of `rhs_spec` is the kernel's axis of outputs; an output
    # element sums over all the others.
    outputs = kernel[params['dimension_numbers'].rhs_spec[0]]
    return 2.0 * _size(equation.outvars[0]) * math.prod(kernel) / outputs
  # Each row meets the matrix of its own group only.
  if name in ('ragged_dot', 'ragged_dot_general'):
    return 2.0 * _size(equation.outvars[0]) * equation.invars[0].aval.shape[-1]
  # One branch runs, nobody knows which: the dearest.
  if name == 'cond':
    return max(count(branch) for branch in params['branches'])
  rounds = params['length'] if name == 'scan' else 1
  if name == 'shard_map':
    rounds = params['mesh'].size  # inside stands the part of one device
  inside = (value for value in params.values() if _is_program(value))
  return rounds * sum(count(program) for program in inside)


def _size(variable: Any) -> int:
  return math.prod(variable.aval.shape)


def _is_program(value: Any) -> bool:
  return hasattr(getattr(value, 'jaxpr', value), 'eqns')
