"""Label sequences: with start and end, and backwards."""

import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked

# No token has it, so `targets >= 0` says what is real.
PADDING = -1


@typechecked
def add_sos_eos(
  labels: Int[Array, 'B U'],
  lengths: Int[Array, 'B'],
  *,
  sos: int,
  eos: int,
) -> tuple[Int[Array, 'B U1'], Int[Array, 'B U1']]:
  """Makes the inputs and the targets of a decoder that is taught.

  Args:
    labels: label ids; what stands beyond `lengths` is ignored.
    lengths: labels of each row.
    sos: id that starts the inputs.
    eos: id that ends the targets, and pads the inputs.

  Returns:
    Inputs `sos y`, padded with eos, and targets `y eos`, padded with -1; both
    are one longer than the labels.
  """
  positions = jnp.arange(labels.shape[1] + 1)[None]
  column = lengths[:, None]
  before = jnp.pad(labels, ((0, 0), (1, 0)), constant_values=sos)  # [B, U1]
  after = jnp.pad(labels, ((0, 0), (0, 1)))  # [B, U1]
  # Up to the length itself: with sos there is one input more than labels.
  inputs = jnp.where(positions <= column, before, eos)
  ending = jnp.where(positions == column, eos, PADDING)
  return inputs, jnp.where(positions < column, after, ending)


@typechecked
def reverse_by_length(
  labels: Int[Array, 'B U'], lengths: Int[Array, 'B']
) -> Int[Array, 'B U']:
  """Reverses each row within its own length; the rest becomes -1 padding."""
  size = labels.shape[1]
  positions = jnp.arange(size)[None]
  column = lengths[:, None]
  # Behind the labels places would be negative; what is read there is masked.
  places = jnp.clip(column - 1 - positions, 0, max(size - 1, 0))
  turned = jnp.take_along_axis(labels, places, axis=1)
  return jnp.where(positions < column, turned, PADDING)
