"""Carries a routing plan out: every token through its experts' two layers.

One signature, `expert_feed_forward`, over several executors:

  dense     every expert on every token, masked: the oracle
  capacity  a buffer of slots per expert, batched products; may drop in
            training, never at evaluation
  blocked   tokens sorted by expert, in blocks that belong to one expert;
            dropless, static shapes, its own gradient; the choice for CPU
  ragged    `lax.ragged_dot`; XLA expands it to all experts on CPU and most
            GPUs, so it is never chosen by default

To add one, write a function of (x, plan, weights, activation, ...) here and
call it in `expert_feed_forward`.
"""

from collections.abc import Callable
import functools

from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.config import Executor
from u2moe_jax.ops.routing import Routing

Activation = Callable[[Array], Array]


@struct.dataclass
class ExpertWeights:
  """Two-layer feed-forward experts, stacked."""

  w_in: Float[Array, 'E D M']
  b_in: Float[Array, 'E M']
  w_out: Float[Array, 'E M D']
  b_out: Float[Array, 'E D']


@struct.dataclass
class Execution:
  """What an executor returns: outputs, and the share of dropped pairs."""

  output: Float[Array, 'S D']
  dropped: Float[Array, '']


@typechecked
def expert_feed_forward(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: ExpertWeights,
  *,
  activation: Activation,
  executor: Executor = 'auto',
  capacity_factor: float | None = None,
  block_size: int = 0,
) -> Execution:
  """Computes y_s = sum_j weight_sj FFN_index(s,j)(x_s).

  Args:
    x: tokens.
    plan: which experts each token visits; padded tokens visit none.
    weights: the experts.
    activation: between the two layers.
    executor: see the module docstring.
    capacity_factor: slots per expert over the even share; None means as many
      as could ever be needed, so that nothing is dropped.
    block_size: rows per block of `blocked`; 0 chooses by size.

  Returns:
    Outputs (zero for padded tokens) in x's dtype.
  """
  # Parameters may be NumPy arrays, which a traced index cannot index.
  weights = jax.tree.map(jnp.asarray, weights)
  if executor == 'auto':
    executor = 'blocked' if jax.default_backend() == 'cpu' else 'capacity'
  if executor == 'capacity':
    return _capacity(x, plan, weights, activation, capacity_factor)
  if executor == 'blocked':
    output = _blocked(x, plan, weights, activation, block_size)
  elif executor == 'ragged':
    output = _ragged(x, plan, weights, activation)
  else:
    output = _dense(x, plan, weights, activation)
  return Execution(output=output, dropped=jnp.zeros((), jnp.float32))


def _dense(x, plan, weights, activation):
  """Runs every expert on every token; zero weights remove the rest."""
  chosen = jax.nn.one_hot(plan.expert_index, plan.num_experts)  # [S, J, E]
  combine = jnp.einsum('SJ,SJE->SE', plan.weight, chosen).astype(x.dtype)
  hidden = jnp.einsum('SD,EDM->SEM', x, weights.w_in) + weights.b_in[None]
  hidden = activation(hidden)
  # The combination goes through the second product, so no [S, E, D] arises.
  hidden *= combine[:, :, None]
  output = jnp.einsum('SEM,EMD->SD', hidden, weights.w_out)
  return output + combine @ weights.b_out


def _capacity(x, plan, weights, activation, capacity_factor):
  """Gathers tokens into (E, C) slots; pairs beyond C are dropped."""
  num_tokens, num_kept = plan.expert_index.shape
  num_experts = plan.num_experts
  if capacity_factor is None:
    capacity = num_tokens
  else:
    even = num_tokens * num_kept / num_experts
    capacity = min(num_tokens, max(1, int(even * capacity_factor)))
  pair_expert = plan.expert_index.reshape(-1)  # [S * J]
  chosen = jax.nn.one_hot(pair_expert, num_experts, dtype=jnp.int32)
  rank = jnp.sum((jnp.cumsum(chosen, axis=0) - 1) * chosen, axis=-1)
  kept = (rank < capacity) & (pair_expert < num_experts)
  slot = jnp.where(kept, pair_expert * capacity + rank, num_experts * capacity)
  token = jnp.arange(num_tokens * num_kept) // num_kept
  # The last slot and the last row collect what is dropped or padded.
  source = jnp.full((num_experts * capacity + 1,), num_tokens, jnp.int32)
  source = source.at[slot].set(token)[:-1]
  rows = _append_zero_row(x)[source].reshape(num_experts, capacity, -1)
  hidden = jnp.einsum('ECD,EDM->ECM', rows, weights.w_in)
  hidden = activation(hidden + weights.b_in[:, None])
  rows = jnp.einsum('ECM,EMD->ECD', hidden, weights.w_out)
  rows = (rows + weights.b_out[:, None]).reshape(num_experts * capacity, -1)
  gathered = _append_zero_row(rows)[slot].reshape(num_tokens, num_kept, -1)
  output = jnp.einsum('SJ,SJD->SD', plan.weight.astype(x.dtype), gathered)
  num_pairs = jnp.maximum(jnp.sum(plan.mask) * num_kept, 1)
  dropped = 1.0 - jnp.sum(kept) / num_pairs
  any_token = jnp.any(plan.mask)
  return Execution(
    output=output,
    dropped=jnp.where(any_token, dropped, 0.0).astype(jnp.float32),
  )


def _append_zero_row(x):
  return jnp.concatenate([x, jnp.zeros_like(x[:1])])


def _ragged(x, plan, weights, activation):
  """Sorts the pairs by expert and multiplies ragged groups."""
  num_tokens, num_kept = plan.expert_index.shape
  pair_expert = plan.expert_index.reshape(-1)
  order = jnp.argsort(pair_expert)
  sizes = jnp.bincount(pair_expert, length=plan.num_experts + 1)
  # Padded pairs sort last and join the last expert; their weight is 0.
  sizes = sizes[:-1].at[-1].add(sizes[-1]).astype(jnp.int32)
  expert = jnp.minimum(pair_expert[order], plan.num_experts - 1)
  rows = x[order // num_kept]
  hidden = jax.lax.ragged_dot(rows, weights.w_in, sizes) + weights.b_in[expert]
  rows = jax.lax.ragged_dot(activation(hidden), weights.w_out, sizes)
  rows += weights.b_out[expert]
  rows = jnp.zeros_like(rows).at[order].set(rows)
  rows = rows.reshape(num_tokens, num_kept, -1)  # [S, J, D]
  return jnp.einsum('SJ,SJD->SD', plan.weight.astype(x.dtype), rows)


@struct.dataclass
class _Blocks:
  """Pairs sorted by expert, each expert's rows padded to whole blocks.

  Attributes:
    source: token of each row; S for a filler row.
    position: row of each (token, slot) pair; 0 for a padded token.
    expert: expert of each block.
    num_used: blocks in use; those behind hold only filler rows.
  """

  source: Int[Array, 'R']
  position: Int[Array, 'S J']
  expert: Int[Array, 'NB']
  num_used: Int[Array, '']


def _blocked(x, plan, weights, activation, block_size):
  """Sorts rows by expert and loops over blocks of one expert each."""
  num_tokens, num_kept = plan.expert_index.shape
  if block_size == 0:
    block_size = _choose_block_size(num_tokens * num_kept, plan.num_experts)
  blocks = _sort_into_blocks(plan, block_size)
  combine = plan.weight.astype(x.dtype)
  return _run_blocks(activation, block_size, x, combine, weights, blocks)


def _choose_block_size(num_pairs: int, num_experts: int) -> int:
  """Large blocks multiply faster, small ones waste fewer filler rows."""
  per_expert = num_pairs / num_experts
  for block_size in (128, 64, 32, 16):
    if per_expert >= 1.5 * block_size:
      return block_size
  return 8


def _sort_into_blocks(plan: Routing, block_size: int) -> _Blocks:
  num_tokens, num_kept = plan.expert_index.shape
  num_experts = plan.num_experts
  num_pairs = num_tokens * num_kept
  num_blocks = -(-num_pairs // block_size) + num_experts
  num_rows = num_blocks * block_size
  pair_expert = plan.expert_index.reshape(-1)
  chosen = jax.nn.one_hot(pair_expert, num_experts, dtype=jnp.int32)
  counts = jnp.sum(chosen, axis=0)  # [E]
  blocks_per_expert = -(-counts // block_size)
  block_end = jnp.cumsum(blocks_per_expert)
  row_start = (block_end - blocks_per_expert) * block_size
  rank = jnp.sum((jnp.cumsum(chosen, axis=0) - 1) * chosen, axis=-1)
  valid = pair_expert < num_experts
  start = row_start[jnp.minimum(pair_expert, num_experts - 1)]
  position = jnp.where(valid, start + rank, num_rows)
  token = jnp.arange(num_pairs) // num_kept
  source = jnp.full((num_rows + 1,), num_tokens, jnp.int32)
  source = source.at[position].set(token.astype(jnp.int32))[:-1]
  expert = jnp.searchsorted(block_end, jnp.arange(num_blocks), side='right')
  return _Blocks(
    source=source,
    position=jnp.where(valid, position, 0).reshape(num_tokens, num_kept),
    expert=jnp.minimum(expert, num_experts - 1).astype(jnp.int32),
    num_used=block_end[-1].astype(jnp.int32),
  )


def _block(array: Array, i: Array, size: int) -> Array:
  return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def _set_block(array: Array, i: Array, value: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(
    array, value.astype(array.dtype), i * value.shape[0], axis=0
  )


def _add_at(array: Array, i: Array, value: Array) -> Array:
  return array.at[i].add(value.astype(array.dtype))


# The loop runs over the blocks in use, a count known only at run time, which
# JAX cannot differentiate in reverse; hence the gradient by hand. It also
# turns both scatters of the automatic gradient into gathers.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_blocks(activation, block_size, x, combine, weights, blocks):
  output, _ = _run_blocks_forward(
    activation, block_size, x, combine, weights, blocks
  )
  return output


def _run_blocks_forward(activation, block_size, x, combine, weights, blocks):
  rows = _append_zero_row(x)[blocks.source]  # [R, D]

  def body(i, out):
    e = blocks.expert[i]
    hidden = _block(rows, i, block_size) @ weights.w_in[e]
    hidden = activation(hidden + weights.b_in[e][None])
    return _set_block(
      out, i, hidden @ weights.w_out[e] + weights.b_out[e][None]
    )

  out = jax.lax.fori_loop(0, blocks.num_used, body, jnp.zeros_like(rows))
  output = jnp.einsum('SJ,SJD->SD', combine, out[blocks.position])
  return output, (x, combine, weights, blocks, out)


def _run_blocks_backward(activation, block_size, residuals, d_output):
  x, combine, weights, blocks, out = residuals
  rows = _append_zero_row(x)[blocks.source]
  d_combine = jnp.einsum('SD,SJD->SJ', d_output, out[blocks.position])
  # Each row's weight, by inverting `position`; filler rows get 0.
  row_weight = jnp.zeros(rows.shape[:1], combine.dtype)
  row_weight = row_weight.at[blocks.position.reshape(-1)].add(
    combine.reshape(-1)
  )
  d_out = _append_zero_row(d_output)[blocks.source] * row_weight[:, None]

  def body(i, carry):
    d_rows, d_weights = carry
    e = blocks.expert[i]
    row, d_row_out = _block(rows, i, block_size), _block(d_out, i, block_size)
    pre = row @ weights.w_in[e] + weights.b_in[e][None]
    hidden, pull_back = jax.vjp(activation, pre)
    (d_pre,) = pull_back(d_row_out @ weights.w_out[e].T)
    d_weights = ExpertWeights(
      w_in=_add_at(d_weights.w_in, e, row.T @ d_pre),
      b_in=_add_at(d_weights.b_in, e, jnp.sum(d_pre, axis=0)),
      w_out=_add_at(d_weights.w_out, e, hidden.T @ d_row_out),
      b_out=_add_at(d_weights.b_out, e, jnp.sum(d_row_out, axis=0)),
    )
    return _set_block(d_rows, i, d_pre @ weights.w_in[e].T), d_weights

  start = (jnp.zeros_like(rows), jax.tree.map(jnp.zeros_like, weights))
  d_rows, d_weights = jax.lax.fori_loop(0, blocks.num_used, body, start)
  visited = jnp.sum(combine != 0, axis=-1) > 0  # padded tokens point at row 0
  d_x = jnp.sum(d_rows[blocks.position], axis=1)
  d_x = jnp.where(visited[:, None], d_x, 0.0).astype(x.dtype)
  return d_x, d_combine, d_weights, None


_run_blocks.defvjp(_run_blocks_forward, _run_blocks_backward)
