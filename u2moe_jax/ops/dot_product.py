"""Scaled dot-product attention with an additive score per key."""

from typing import Literal

import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked

# How the axes of keys and values lie: frames first, or heads first.
Layout = Literal['BPHK', 'BHPK']


@typechecked
def attention_weights(
  query: Float[Array, 'B T H K'],
  key: Float[Array, 'B _ _ K'],
  mask: Bool[Array, '#B #T P'],
  *,
  key_score: Float[Array, 'B P H'] | None = None,
  layout: Layout = 'BPHK',
) -> Float[Array, 'B H T P']:
  """Softmax of (q . k + key_score) / sqrt(K) over the keys that may be seen.

  Args:
    query: queries.
    key: keys; P counts cached and current frames.
    mask: True where a query may look at a key.
    key_score: added to every query's product with a key, before scaling.
    layout: of the keys.

  Returns:
    Float32 weights; a query that may see nothing gets zeros, not NaN.
  """
  scores = jnp.einsum(f'BTHK,{layout}->BHTP', query, key)  # [B, H, T, P]
  # Softmax in float32: in bfloat16 long rows lose their small weights.
  scores = scores.astype(_at_least_float32(scores.dtype))
  if key_score is not None:
    # As [B, H, 1, P]: a key has one score for all queries.
    scores += jnp.moveaxis(key_score, 1, 2)[:, :, None, :].astype(scores.dtype)
  scores *= query.shape[-1] ** -0.5
  mask = mask[:, None]  # [B, 1, T, P]
  # Not -inf: the row of a query without keys would be NaN, and its gradient
  # too. With the least number it is uniform, and zeroed behind the softmax.
  scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
  return jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)


@typechecked
def weighted_values(
  weights: Float[Array, 'B H T P'],
  value: Float[Array, 'B _ _ K'],
  *,
  layout: Layout = 'BPHK',
) -> Float[Array, 'B T H K']:
  """Sums the values under the weights, in the values' dtype."""
  return jnp.einsum(f'BHTP,{layout}->BTHK', weights.astype(value.dtype), value)


def _at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  # Of a model in float64 nothing is narrowed.
  return jnp.promote_types(dtype, jnp.float32)
