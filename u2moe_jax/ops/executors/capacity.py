"""A buffer of equally many slots for each expert, and batched products.

The only executor that may drop: a pair that finds its expert's slots taken by
earlier pairs gets no output. Without a factor there are as many slots as could
ever be needed.
"""

import math

import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked
from u2moe_jax.ops import dropout as dropout_lib
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops import permutation
from u2moe_jax.ops.dropout import ExpertDropout
from u2moe_jax.ops.dropout import RowDropout
from u2moe_jax.ops.routing import Routing


def slots_per_expert(
  num_tokens: int, num_kept: int, num_experts: int, factor: float | None
) -> int:
  """C for S tokens: a multiple of the even share, at most S.

  Args:
    num_tokens: S; each visits an expert once at most.
    num_kept: J.
    num_experts: E.
    factor: of the even share S * J / E; None means S, so that none drops.
  """
  if factor is None:
    return num_tokens
  even = num_tokens * num_kept / num_experts
  # A product of 11 may come out a little below it.
  return min(num_tokens, max(1, math.floor(even * factor + 1e-6)))


@typechecked
def make_slots(
  plan: Routing, capacity: int
) -> tuple[permutation.Slots, Float[Array, '']]:
  """Gives each expert C rows, first come first served.

  Returns:
    The rows, expert after expert, and how many pairs found none.
  """
  rank, _ = permutation.rank_in_expert(plan)
  # By the index and not by the weight, which may underflow to 0 for an expert
  # that was kept, and has a gradient all the same.
  real = plan.expert_index < plan.num_experts
  kept = real & (rank < capacity)
  num_rows = plan.num_experts * capacity
  row = plan.expert_index * capacity + rank
  position = jnp.where(kept, row, num_rows).astype(jnp.int32)
  num_dropped = jnp.sum(real & ~kept).astype(jnp.float32)
  return permutation.make_slots(position, num_rows), num_dropped


@typechecked
def equal_groups(
  rows: Float[Array, 'E C D'],
  weights: grouped_matmul.ExpertWeights,
  activation: grouped_matmul.Activation,
  dropout: RowDropout | None = None,
) -> Float[Array, 'E C D']:
  """Each expert's two layers on its rows; an empty row gives anything."""
  hidden = jnp.einsum('ECD,EDM->ECM', rows, weights.w_in)  # [E, C, M]
  hidden = activation(hidden + weights.b_in[:, None])
  hidden = dropout_lib.drop_units(hidden, dropout)
  output = jnp.einsum('ECM,EMD->ECD', hidden, weights.w_out)
  return output + weights.b_out[:, None]


def run(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  options: grouped_matmul.Options,
  dropout: ExpertDropout | None,
) -> grouped_matmul.Execution:
  """Fills the slots, multiplies, and counts what found none."""
  num_tokens, num_kept = plan.expert_index.shape
  capacity = slots_per_expert(
    num_tokens, num_kept, plan.num_experts, options.capacity_factor
  )
  slots, num_dropped = make_slots(plan, capacity)
  rows = permutation.dispatch(x, slots)
  rows = rows.reshape(plan.num_experts, capacity, -1)  # [E, C, D]
  rows = equal_groups(
    rows,
    grouped_matmul.stacked(weights),
    options.activation,
    permutation.row_dropout(dropout, slots),
  )
  # Empty slots hold what biases make of zeros; no pair points there.
  rows = rows.reshape(plan.num_experts * capacity, -1)  # [E * C, D]
  output = permutation.combine(rows, plan.weight, slots)
  return grouped_matmul.Execution(output=output, num_dropped=num_dropped)
