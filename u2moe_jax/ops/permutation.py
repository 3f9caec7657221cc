"""Moves tokens to rows of their experts and back, by gathers alone.

The gradient of a gather is a scatter-add, which is slow on every platform. A
routing plan is a permutation with holes, so its inverse is known, and both
directions of both passes can be gathers.
"""

from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import Size
from u2moe_jax.array_types import typechecked
from u2moe_jax.ops.dropout import ExpertDropout
from u2moe_jax.ops.dropout import RowDropout
from u2moe_jax.ops.routing import Routing


@struct.dataclass
class Slots:
  """Which of R rows each (token, slot) pair has, if any.

  Attributes:
    source: token of each row; S for an empty one.
    position: row of each pair; R for a pair that has none.
  """

  source: Int[Array, 'R']
  position: Int[Array, 'S J']


@typechecked
def rank_in_expert(
  plan: Routing,
) -> tuple[Int[Array, 'S J'], Int[Array, 'E']]:
  """How many earlier pairs go to the same expert, and pairs of each expert.

  The rank of a padded token's pairs means nothing.
  """
  pair_expert = plan.expert_index.reshape(-1)  # [S * J]
  # Padded tokens have index E, of which one-hot makes zeros: they count for no
  # expert and move nobody's rank.
  chosen = jax.nn.one_hot(pair_expert, plan.num_experts, dtype=jnp.int32)
  seen = jnp.cumsum(chosen, axis=0)  # [S * J, E], this pair included
  rank = jnp.sum((seen - 1) * chosen, axis=-1)
  return rank.reshape(plan.expert_index.shape), seen[-1]


@typechecked
def make_slots(position: Int[Array, 'S J'], num_rows: Size) -> Slots:
  """Inverts `position`, which is `num_rows` for a pair without a row."""
  num_tokens, num_kept = position.shape
  # The token of each pair: [S * J], the order of a flattened `position`.
  token = jnp.arange(num_tokens * num_kept, dtype=jnp.int32) // num_kept
  # One row more collects the pairs without a row.
  source = jnp.full((num_rows + 1,), num_tokens, jnp.int32)
  source = source.at[position.reshape(-1)].set(token)[:-1]
  return Slots(source=source, position=position)


@typechecked
def row_dropout(
  dropout: ExpertDropout | None, slots: Slots
) -> RowDropout | None:
  """Dropout goes where the pairs go; an empty row has number 0."""
  if dropout is None:
    return None
  rows = jnp.zeros((slots.source.shape[0] + 1,), dropout.pairs.dtype)
  position = slots.position.reshape(-1)
  return dropout.of_rows(rows.at[position].set(dropout.pairs.reshape(-1))[:-1])


def _take(rows: Array, index: Array) -> Array:
  """Rows by number; one past the last gives zeros, without a copy of them."""
  return rows.at[index].get(mode='fill', fill_value=0)


@jax.custom_vjp
def dispatch(x: Float[Array, 'S D'], slots: Slots) -> Float[Array, 'R D']:
  """Puts each token into its rows; empty rows are zero."""
  return _take(x, slots.source)


def _dispatch_forward(x: Array, slots: Slots) -> tuple[Array, Slots]:
  return dispatch(x, slots), slots


def _dispatch_backward(slots: Slots, d_rows: Float[Array, 'R D']):
  # One gather for each of the few J, not an array of [S, J, D] and its sum.
  kept = range(slots.position.shape[1])
  # The slots are integers, which have no gradient.
  return sum(_take(d_rows, slots.position[:, j]) for j in kept), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(
  rows: Float[Array, 'R D'], weight: Float[Array, 'S J'], slots: Slots
) -> Float[Array, 'S D']:
  """Adds up the rows of each token, weighed; pairs without a row give 0."""
  weight = weight.astype(rows.dtype)
  return sum(
    weight[:, j, None] * _take(rows, slots.position[:, j])
    for j in range(weight.shape[1])
  )


def _combine_forward(rows: Array, weight: Array, slots: Slots):
  return combine(rows, weight, slots), (rows, weight, slots)


def _combine_backward(
  residuals: tuple[Array, Array, Slots], d_output: Float[Array, 'S D']
):
  rows, weight, slots = residuals
  # By the rows and not by the output: a weight of 0 has a gradient too.
  d_weight = [
    jnp.sum(d_output * _take(rows, slots.position[:, j]), axis=-1)
    for j in range(weight.shape[1])
  ]
  # The weight of each row: a row belongs to one pair at most.
  row_weight = jnp.zeros(rows.shape[0] + 1, rows.dtype)  # [R + 1]
  row_weight = row_weight.at[slots.position.reshape(-1)].set(
    weight.reshape(-1).astype(rows.dtype)
  )[:-1]
  d_rows = _take(d_output, slots.source) * row_weight[:, None]
  return d_rows, jnp.stack(d_weight, axis=-1).astype(weight.dtype), None


combine.defvjp(_combine_forward, _combine_backward)
