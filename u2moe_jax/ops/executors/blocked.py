"""Rows sorted by expert, multiplied in blocks that belong to one expert each.

Dropless with static shapes: the loops run over the blocks in use only. The
choice for CPU, where batched products with empty slots cost what full ones do.
Experts lie next to each other without gaps. The last block of one reaches into
the rows of the next, where it writes what means nothing; experts take their
turns in that order, so the next one writes over it.
"""

from collections.abc import Callable
import functools
import math
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

# What whole blocks of a stack leave is covered by one block of as many parts of
# theirs as it takes. Each part is a loop to compile, forward and backward: more
# than two pay where a matrix has so many entries.
_PARTS = 2
_PARTS_OF_LARGE = 4
_LARGE = 2**18
# Of fewer rows: reading the weights takes longer than multiplying.
_SMALLEST_BLOCK = 16


@struct.dataclass
class _Ranges:
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
  slots, ranges = _sort_by_expert(plan, sizes[-1])
  rows = _run_blocks(
    options.activation,
    sizes,
    permutation.dispatch(x, slots),
    weights,
    ranges,
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
  """Rows of the blocks, largest first, in equal steps."""
  if isinstance(weights, tuple):
    # They have loops of their own: all sizes would be compiled for each expert.
    return (block_size,)
  _, *matrix = weights.w_in.shape
  parts = _PARTS_OF_LARGE if math.prod(matrix) >= _LARGE else _PARTS
  # A block is never larger than the buffer, not even one that never runs.
  step = max(block_size // parts, min(_SMALLEST_BLOCK, block_size))
  largest = min(block_size // step, -(-num_pairs // step)) * step
  return tuple(range(largest, 0, -step))


def _sort_by_expert(
  plan: Routing, reach: int
) -> tuple[permutation.Slots, _Ranges]:
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
  ranges = _Ranges(start=start.astype(jnp.int32), end=end.astype(jnp.int32))
  return permutation.make_slots(position, num_rows), ranges


def _block(array: Array, first: Array, size: int) -> Array:
  return jax.lax.dynamic_slice_in_dim(array, first, size)


def _set_block(array: Array, first: Array, value: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(
    array, value.astype(array.dtype), first, axis=0
  )


def _over_blocks(
  first: Callable[[Array, int, Any], Any],
  other: Callable[[Array, int, Any], Any],
  sizes: tuple[int, ...],
  ranges: _Ranges,
  e: Array | int,
  carry: Any,
):
  """Runs bodies (first row, rows, carry) over blocks that cover an expert.

  Args:
    first: of one block, the one that is not whole; of none if there are no
      rows.
    other: of each other block.
    sizes: rows of the blocks; with one size all blocks are `other` ones.
    ranges: rows of the experts.
    e: the expert.
    carry: what the bodies take and return.
  """
  start, end, largest = ranges.start[e], ranges.end[e], sizes[0]

  def body_of(body: Callable[..., Any], start: Array, size: int):
    # With a start that does not depend on the counter XLA would take the work
    # out of a loop that seldom runs, and do it always.
    return lambda i, carry: body(start + i * size, size, carry)

  if len(sizes) == 1:
    count = -(-(end - start) // largest)
    return jax.lax.fori_loop(0, count, body_of(other, start, largest), carry)
  num_whole = jnp.maximum(end - start - 1, 0) // largest
  rest = start + num_whole * largest
  # One of these loops runs, and once. Before the others: it may write behind the
  # expert's last row, they do not.
  for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
    fits = (smaller < end - rest) & (end - rest <= size)
    body = body_of(first, rest, size)
    carry = jax.lax.fori_loop(0, fits.astype(jnp.int32), body, carry)
  return jax.lax.fori_loop(0, num_whole, body_of(other, start, largest), carry)


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
  ranges: _Ranges,
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
      out = _over_blocks(run_one, run_one, sizes, ranges, e, out)
    return out

  def run_expert(e: Array, out: Array):
    # A loop in a loop: the slice of the stack is copied once for all blocks.
    expert = grouped_matmul.one_expert(weights, e)
    run_one = functools.partial(run_rows, expert)
    return _over_blocks(run_one, run_one, sizes, ranges, e, out)

  return jax.lax.fori_loop(0, len(ranges.end), run_expert, out)


def _run_blocks_forward(
  activation: grouped_matmul.Activation,
  sizes: tuple[int, ...],
  rows: Float[Array, 'R D'],
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  ranges: _Ranges,
  dropout: RowDropout | None,
):
  out = _run_blocks(activation, sizes, rows, weights, ranges, dropout)
  # No hidden values: they are computed again, block by block.
  return out, (rows, weights, ranges, dropout)


def _run_blocks_backward(
  activation: grouped_matmul.Activation,
  sizes: tuple[int, ...],
  residuals: tuple[Any, ...],
  d_out: Float[Array, 'R D'],
):
  rows, weights, ranges, dropout = residuals
  drop = functools.partial(_drop, dropout)

  def gradients(
    expert: grouped_matmul.OneExpert,
    e: Array | int,
    first: Array,
    size: int,
    d_rows: Array,
  ):
    """Writes the rows' gradient of a block; returns that of the weights."""
    row, d_row_out = _block(rows, first, size), _block(d_out, first, size)
    # The next expert's rows add nothing to the gradient of this one.
    is_own = first + jnp.arange(size) < ranges.end[e]
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
    return d_rows, d_expert

  d_rows = jnp.zeros_like(rows)
  if isinstance(weights, tuple):
    d_separate = []
    for e, separate in enumerate(weights):
      expert = separate.transposed()
      carry = d_rows, jax.tree.map(jnp.zeros_like, expert)
      of_block = functools.partial(gradients, expert, e)
      add = functools.partial(_add_gradients, of_block)
      d_rows, d_expert = _over_blocks(add, add, sizes, ranges, e, carry)
      d_separate.append(grouped_matmul.SeparateExpert.of(d_expert))
    return d_rows, tuple(d_separate), None, None

  def of_expert(e: Array, carry: tuple[Array, grouped_matmul.ExpertWeights]):
    of_block = functools.partial(
      gradients, grouped_matmul.one_expert(weights, e), e
    )

    # Most experts have a single block, or few. What the first gives is put there;
    # to add it to zeros takes a thirtieth of a step.
    def put(first: Array, size: int, carry: Any):
      d_rows, d_weights = carry
      d_rows, d_expert = of_block(first, size, d_rows)
      return d_rows, grouped_matmul.put_expert(d_weights, e, d_expert)

    def add(first: Array, size: int, carry: Any):
      d_rows, d_weights = carry
      before = d_rows, grouped_matmul.one_expert(d_weights, e)
      d_rows, d_expert = _add_gradients(of_block, first, size, before)
      return d_rows, grouped_matmul.put_expert(d_weights, e, d_expert)

    return _over_blocks(put, add, sizes, ranges, e, carry)

  d_none = jax.tree.map(jnp.zeros_like, weights)
  d_rows, d_weights = jax.lax.fori_loop(
    0, len(ranges.end), of_expert, (d_rows, d_none)
  )
  return d_rows, d_weights, None, None


def _add_gradients(
  of_block: Callable[..., tuple[Array, grouped_matmul.OneExpert]],
  first: Array,
  size: int,
  carry: tuple[Array, grouped_matmul.OneExpert],
):
  d_rows, d_sum = carry
  d_rows, d_expert = of_block(first, size, d_rows)
  return d_rows, jax.tree.map(_add, d_sum, d_expert)


def _add(total: Array, new: Array) -> Array:
  # What a loop carries must keep its type, that of the weights.
  return total + new.astype(total.dtype)


_run_blocks.defvjp(_run_blocks_forward, _run_blocks_backward)
