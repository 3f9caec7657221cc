"""Pairs sorted by expert, and `lax.ragged_dot` over groups of any size.

XLA expands that product to all experts on CPU and on most GPUs, so this is
never chosen by default there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.ops import dropout as dropout_lib
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops import permutation
from u2moe_jax.ops.dropout import ExpertDropout
from u2moe_jax.ops.routing import Routing

# (rows [R, K], matrices [E, K, N], group sizes [E]) -> [R, N]
RaggedDot = Callable[[Array, Array, Array], Array]


def run(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  options: grouped_matmul.Options,
  dropout: ExpertDropout | None,
) -> grouped_matmul.Execution:
  """Multiplies sorted rows by `lax.ragged_dot`."""
  return run_sorted(x, plan, weights, options, dropout, jax.lax.ragged_dot)


def run_sorted(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  options: grouped_matmul.Options,
  dropout: ExpertDropout | None,
  ragged_dot: RaggedDot,
) -> grouped_matmul.Execution:
  """Sorts the pairs by expert and multiplies by any ragged product."""
  weights = grouped_matmul.stacked(weights)
  num_experts = plan.num_experts
  pair_expert = plan.expert_index.reshape(-1)  # [S * J]
  num_pairs = pair_expert.size
  order = jnp.argsort(pair_expert)  # [S * J], pairs in the order of their rows
  # The inverse of that permutation: the row of each pair.
  rank = jnp.zeros(num_pairs, jnp.int32).at[order].set(jnp.arange(num_pairs))
  position = jnp.where(pair_expert < num_experts, rank, num_pairs)
  slots = permutation.make_slots(
    position.reshape(plan.expert_index.shape).astype(jnp.int32), num_pairs
  )
  sizes = jnp.bincount(pair_expert, length=num_experts + 1)
  # Padded pairs sort last; their rows are empty and join the last expert.
  sizes = sizes[:-1].at[-1].add(sizes[-1]).astype(jnp.int32)
  # The expert of each row, for the biases, which the product does not know.
  expert = jnp.minimum(pair_expert[order], num_experts - 1)
  rows = permutation.dispatch(x, slots)
  hidden = ragged_dot(rows, weights.w_in, sizes) + weights.b_in[expert]
  hidden = dropout_lib.drop_units(
    options.activation(hidden), permutation.row_dropout(dropout, slots)
  )
  rows = ragged_dot(hidden, weights.w_out, sizes)
  rows += weights.b_out[expert]
  output = permutation.combine(rows, plan.weight, slots)
  return grouped_matmul.nothing_dropped(output)
