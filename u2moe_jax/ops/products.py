"""Products with a kernel whose gradients suit XLA:CPU.

Values and gradients are those of `jnp.tensordot`, up to the order of sums. What
is chosen here is in which order the gradient of the kernel multiplies.
"""

import functools
import math

import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def tensordot(
  x: Float[Array, '...'], kernel: Float[Array, '...'], contract: int
) -> Float[Array, '...']:
  """Sums over the last `contract` axes of x and the first of the kernel."""
  return jnp.tensordot(x, kernel, axes=contract)


def _forward(x: Array, kernel: Array, contract: int):
  return tensordot(x, kernel, contract), (x, kernel)


def _backward(
  contract: int, residuals: tuple[Array, Array], d_out: Array
) -> tuple[Array, Array]:
  x, kernel = residuals
  inputs, outputs = kernel.shape[:contract], kernel.shape[contract:]
  # The trailing axes of both are the outputs.
  output_axes = [*range(-len(outputs), 0)]
  d_x = jnp.tensordot(d_out, kernel, axes=(output_axes, output_axes))
  # One axis to sum over: with two XLA:CPU copies both factors.
  rows, d_rows = x.reshape(-1, *inputs), d_out.reshape(-1, *outputs)
  # The factor on the left is transposed, which is a copy, so the narrower one
  # stands there. JAX's own rule always puts d_out there: a step of
  # `aishell_u2pp`, whose width of 256 feeds 2048, copied for a twentieth of its
  # time.
  if math.prod(inputs) <= math.prod(outputs):
    return d_x, jnp.tensordot(rows, d_rows, axes=(0, 0))
  d_kernel = jnp.tensordot(d_rows, rows, axes=(0, 0))
  inputs_first = *range(len(outputs), kernel.ndim), *range(len(outputs))
  return d_x, jnp.transpose(d_kernel, inputs_first)


tensordot.defvjp(_forward, _backward)
