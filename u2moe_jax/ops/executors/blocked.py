"""Rows sorted by expert, multiplied in blocks that belong to one expert each.

Dropless with static shapes: the loops run over the blocks in use only. The
choice for CPU, where batched products with empty slots cost what full ones do.
Experts lie next to each other without gaps. The last block of one reaches into
the rows of the next, where it writes what means nothing; experts take their
turns in that order, so the next one writes over it.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.ops import dropout as dropout_lib
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops import permutation
from u2moe_jax.ops import quantization
from u2moe_jax.ops.dropout import ExpertDropout
from u2moe_jax.ops.dropout import RowDropout
from u2moe_jax.ops.routing import Routing

# (most pairs per expert, rows of a block): large blocks multiply faster, small
# ones have fewer filler rows. Measured on CPU, E 8, D 640, M 2560. What trains
# is stacked, and adds up a gradient of all weights for every block, so there
# large ones pay earlier.
_STACKED = ((24, 16), (96, 32), (256, 128), (float('inf'), 256))
_SEPARATE = ((12, 8), (24, 16), (400, 32), (float('inf'), 128))

# What a block of a stack leaves is covered by halves and quarters of it, down to
# so many rows; below, reading the weights takes longer than multiplying.
_HALVINGS, _SMALLEST = 2, 16


@struct.dataclass
class _Rows:
  """Which rows each expert has.

  Attributes:
    start: first row of each expert.
    end: behind its last one.
  """

  start: Int[Array, 'E']
  end: Int[Array, 'E']


def run(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  options: grouped_matmul.Options,
  dropout: ExpertDropout | None,
) -> grouped_matmul.Execution:
  """Sorts rows by expert and loops over blocks."""
  block_size = options.block_size
  if block_size == 0:
    # By the mean, padding included: shapes are fixed before anything is routed.
    table = _SEPARATE if isinstance(weights, tuple) else _STACKED
    block_size = _choose_block_size(plan.weight.size / plan.num_experts, table)
  sizes = _block_sizes(block_size, plan.weight.size, weights)
  slots, held = _sort_by_expert(plan, sizes[-1])
  rows = _run_blocks(
    options.activation,
    sizes,
    permutation.dispatch(x, slots),
    weights,
    held,
    permutation.row_dropout(dropout, slots),
  )
  output = permutation.combine(rows, plan.weight, slots)
  return grouped_matmul.nothing_dropped(output)


def _choose_block_size(
  pairs_per_expert: float, table: tuple[tuple[float, int], ...]
) -> int:
  return next(size for most, size in table if pairs_per_expert <= most)


def _block_sizes(
  block_size: int,
  num_pairs: int,
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
) -> tuple[int, ...]:
  """Rows of the blocks, largest first."""
  if isinstance(weights, tuple):
    # Each size is a loop more for each expert, to be compiled.
    return (block_size,)
  halves = (block_size >> i for i in range(1, _HALVINGS + 1))
  sizes = [block_size, *(size for size in halves if size >= _SMALLEST)]
  # No block is larger than the buffer, loops that never run included.
  return *(size for size in sizes[:-1] if size <= num_pairs), sizes[-1]


def _sort_by_expert(
  plan: Routing, reach: int
) -> tuple[permutation.Slots, _Rows]:
  """Gives each pair a row; behind all of them are `reach` empty ones."""
  num_experts = plan.num_experts
  num_rows = plan.weight.size + reach
  rank, counts = permutation.rank_in_expert(plan)
  end = jnp.cumsum(counts)
  start = end - counts
  # By the index and not by the weight, which may underflow to 0 for an expert
  # that was kept, and has a gradient all the same.
  real = plan.expert_index < num_experts
  # Padded pairs borrow the last expert's first row; below they get none.
  row = start[jnp.minimum(plan.expert_index, num_experts - 1)] + rank
  position = jnp.where(real, row, num_rows).astype(jnp.int32)
  held = _Rows(start=start.astype(jnp.int32), end=end.astype(jnp.int32))
  return permutation.make_slots(position, num_rows), held


def _block(array: Array, first: Array, size: int) -> Array:
  return jax.lax.dynamic_slice_in_dim(array, first, size)


def _set_block(array: Array, first: Array, value: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(
    array, value.astype(array.dtype), first, axis=0
  )


def _over_blocks(
  body: Callable[[Array, int, Any], Any],
  sizes: tuple[int, ...],
  held: _Rows,
  e: Array | int,
  carry: Any,
):
  """Runs `body(first row, rows, carry)` over blocks that cover an expert."""
  first, end = held.start[e], held.end[e]
  for size in sizes:
    # The smallest size covers what is left, and more.
    whole = (end - first) // size
    count = whole if size > sizes[-1] else -(-(end - first) // size)

    def body_of(i: Array, carry: Any, first: Array = first, size: int = size):
      return body(first + i * size, size, carry)

    carry = jax.lax.fori_loop(0, count, body_of, carry)
    first += count * size
  return carry


def _drop(dropout: RowDropout | None, first: Array, hidden: Array) -> Array:
  """Dropout of the hidden values of a block."""
  if dropout is not None:
    dropout = dropout.block(first, len(hidden))
  return dropout_lib.drop_units(hidden, dropout)


# The loops run over the blocks in use, counts known only at run time, which
# JAX cannot differentiate in reverse; hence the gradient by hand.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_blocks(
  activation: grouped_matmul.Activation,
  sizes: tuple[int, ...],
  rows: Float[Array, 'R D'],
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  held: _Rows,
  dropout: RowDropout | None,
):
  drop = functools.partial(_drop, dropout)

  def run_rows(
    expert: grouped_matmul.OneExpert, first: Array, size: int, out: Array
  ):
    row = _block(rows, first, size)  # [rows of a block, D]
    hidden = drop(first, activation(row @ expert.w_in + expert.b_in[None]))
    return _set_block(out, first, hidden @ expert.w_out + expert.b_out[None])

  def run_columns(
    expert: grouped_matmul.SeparateExpert, first: Array, size: int, out: Array
  ):
    # Without the barriers XLA puts the matrices on the right again. Everything
    # is transposed, [D or M, rows of a block], as the matrices are.
    columns = jax.lax.optimization_barrier(_block(rows, first, size).T)
    hidden = quantization.matmul(expert.w_in, columns) + expert.b_in[:, None]
    # Units are dropped in rows; without dropout the transposes vanish.
    hidden = drop(first, activation(hidden).T).T
    columns = quantization.matmul(expert.w_out, hidden)
    columns = jax.lax.optimization_barrier(columns + expert.b_out[:, None])
    return _set_block(out, first, columns.T)

  out = jnp.zeros_like(rows)
  if isinstance(weights, tuple):
    # A loop written out for each expert: its weights are read where they lie.
    for e, expert in enumerate(weights):
      run_one = functools.partial(run_columns, expert)
      out = _over_blocks(run_one, sizes, held, e, out)
    return out

  def run_expert(e: Array, out: Array):
    # A loop in a loop: the slice of the stack is copied once for all blocks.
    expert = grouped_matmul.one_expert(weights, e)
    run_one = functools.partial(run_rows, expert)
    return _over_blocks(run_one, sizes, held, e, out)

  return jax.lax.fori_loop(0, len(held.end), run_expert, out)


def _run_blocks_forward(
  activation: grouped_matmul.Activation,
  sizes: tuple[int, ...],
  rows: Float[Array, 'R D'],
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  held: _Rows,
  dropout: RowDropout | None,
):
  out = _run_blocks(activation, sizes, rows, weights, held, dropout)
  # No hidden values: they are computed again, block by block.
  return out, (rows, weights, held, dropout)


def _run_blocks_backward(
  activation: grouped_matmul.Activation,
  sizes: tuple[int, ...],
  residuals: tuple[Any, ...],
  d_out: Float[Array, 'R D'],
):
  rows, weights, held, dropout = residuals
  drop = functools.partial(_drop, dropout)

  def gradients(
    expert: grouped_matmul.OneExpert,
    end: Array,
    first: Array,
    size: int,
    carry: Any,
  ):
    """Writes the rows' gradient of a block, adds that of the weights."""
    d_rows, d_sum = carry
    row, d_row_out = _block(rows, first, size), _block(d_out, first, size)
    # The next expert's rows add nothing to the gradient of this one.
    is_own = first + jnp.arange(size) < end
    d_row_out = jnp.where(is_own[:, None], d_row_out, 0)
    # Computed again: it would take M / D times the memory of the rows.
    before = row @ expert.w_in + expert.b_in[None]
    hidden, pull_back = jax.vjp(lambda x: drop(first, activation(x)), before)
    (d_before,) = pull_back(d_row_out @ expert.w_out.T)
    # As products: XLA:CPU makes of sums over rows what took a tenth of a step.
    ones = jnp.ones((size,), rows.dtype)
    d_expert = grouped_matmul.OneExpert(
      w_in=row.T @ d_before,
      b_in=ones @ d_before,
      w_out=hidden.T @ d_row_out,
      b_out=ones @ d_row_out,
    )
    d_rows = _set_block(d_rows, first, d_before @ expert.w_in.T)
    return d_rows, jax.tree.map(_add, d_sum, d_expert)

  def of_expert(
    expert: grouped_matmul.OneExpert, e: Array | int, d_rows: Array
  ):
    d_none = jax.tree.map(jnp.zeros_like, expert)
    body = functools.partial(gradients, expert, held.end[e])
    return _over_blocks(body, sizes, held, e, (d_rows, d_none))

  d_rows = jnp.zeros_like(rows)
  if isinstance(weights, tuple):
    d_separate = []
    for e, expert in enumerate(weights):
      d_rows, d_expert = of_expert(expert.transposed(), e, d_rows)
      d_separate.append(grouped_matmul.SeparateExpert.of(d_expert))
    return d_rows, tuple(d_separate), None, None

  def body(e: Array, carry: tuple[Array, grouped_matmul.ExpertWeights]):
    d_rows, d_weights = carry
    expert = grouped_matmul.one_expert(weights, e)
    d_rows, d_expert = of_expert(expert, e, d_rows)
    # Its blocks follow each other, so its gradient is put there once.
    return d_rows, grouped_matmul.put_expert(d_weights, e, d_expert)

  d_rows, d_weights = jax.lax.fori_loop(
    0, len(held.end), body, (d_rows, jax.tree.map(jnp.zeros_like, weights))
  )
  return d_rows, d_weights, None, None


def _add(held: Array, new: Array) -> Array:
  # What a loop carries must keep its type, that of the weights.
  return held + new.astype(held.dtype)


_run_blocks.defvjp(_run_blocks_forward, _run_blocks_backward)
