"""Every expert on every token, masked: the oracle of the others."""

import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.ops import dropout as dropout_lib
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops.dropout import ExpertDropout
from u2moe_jax.ops.routing import Routing


def run(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  options: grouped_matmul.Options,
  dropout: ExpertDropout | None,
) -> grouped_matmul.Execution:
  """Runs all experts; zero weights remove what was not chosen."""
  weights = grouped_matmul.stacked(weights)
  chosen = jax.nn.one_hot(plan.expert_index, plan.num_experts)  # [S, J, E]
  weight = jnp.einsum('SJ,SJE->SE', plan.weight, chosen).astype(x.dtype)
  hidden = jnp.einsum('SD,EDM->SEM', x, weights.w_in) + weights.b_in[None]
  hidden = options.activation(hidden)
  if dropout is not None:
    # An expert that a token did not choose has number 0, and weight 0 below.
    numbers = dropout.pairs[..., None] * chosen.astype(jnp.uint32)  # [S, J, E]
    rows = dropout.of_rows(numbers.sum(axis=1, dtype=jnp.uint32))
    hidden = dropout_lib.drop_units(hidden, rows)
  # The combination goes through the second product, so no [S, E, D] arises.
  hidden *= weight[:, :, None]
  output = jnp.einsum('SEM,EMD->SD', hidden, weights.w_out)
  return grouped_matmul.nothing_dropped(output + weight @ weights.b_out)
