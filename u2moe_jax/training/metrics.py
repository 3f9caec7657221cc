"""Metrics as mergeable (sum, count); the division happens on the host."""

from collections.abc import Mapping

from flax import struct
import jax.numpy as jnp
import numpy as np

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float


@struct.dataclass
class Mean:
  """A weighted mean that can still be merged.

  Attributes:
    total: sum of the values, any shape.
    count: how many there were.
  """

  total: Float[Array, '...']
  count: Float[Array, '']

  @classmethod
  def of(cls, total: Array, count: Array | float = 1.0) -> 'Mean':
    """Wraps a sum and its count, both in float32."""
    return cls(
      total=jnp.asarray(total, jnp.float32),
      count=jnp.asarray(count, jnp.float32),
    )


def merge(
  a: Mapping[str, Mean] | None, b: Mapping[str, Mean]
) -> dict[str, Mean]:
  """Adds two sets of metrics with the same names; None is empty."""
  if a is None:
    return dict(b)
  return {
    name: Mean(
      total=a[name].total + b[name].total, count=a[name].count + b[name].count
    )
    for name in b
  }


def compute(metrics: Mapping[str, Mean]) -> dict[str, np.ndarray]:
  """Fetches and divides; what was never counted is left out."""
  counts = {name: float(mean.count) for name, mean in metrics.items()}
  return {
    name: np.asarray(mean.total) / counts[name]
    for name, mean in metrics.items()
    if counts[name] > 0
  }
