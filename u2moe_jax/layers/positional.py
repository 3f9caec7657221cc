"""Position encodings; all computed on the fly, so no length limit."""

from flax import struct
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked


@typechecked
def sinusoids(
  positions: Int[Array, 'B T'], *, width: int
) -> Float[Array, 'B T D']:
  """Interleaved sines and cosines (Vaswani et al., 1706.03762, 3.5).

  pe[p, 2i] = sin(p * 10000^(-2i/D)), pe[p, 2i+1] = cos of the same.
  """
  angles = _angles(positions, width)  # [B, T, D/2]
  pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  # An odd width has a last sine without its cosine.
  return pairs.reshape(*positions.shape, -1)[..., :width]


def _angles(positions: Array, width: int) -> Array:
  # float32 whatever the model computes in: bfloat16 cannot count beyond 256.
  rates = 10000.0 ** (-jnp.arange(0, width, 2) / width)
  return positions[..., None].astype(jnp.float32) * rates[None, None]


@struct.dataclass
class Rotation:
  """Cosines and sines of a rotary embedding, half the head width each."""

  cos: Float[Array, 'B T half']
  sin: Float[Array, 'B T half']


@typechecked
def rotation(positions: Int[Array, 'B T'], *, head_dim: int) -> Rotation:
  """Angles p * 10000^(-2m/K) for m < K/2 (RoFormer, 2104.09864)."""
  angles = _angles(positions, head_dim)
  return Rotation(cos=jnp.cos(angles), sin=jnp.sin(angles))


@typechecked
def rotate(x: Float[Array, 'B T H K'], by: Rotation) -> Float[Array, 'B T H K']:
  """Rotates the pairs (x[m], x[m + K/2])."""
  real, imaginary = jnp.split(x, 2, axis=-1)
  cos = by.cos[:, :, None].astype(x.dtype)  # [B, T, 1, K/2]: the same per head
  sin = by.sin[:, :, None].astype(x.dtype)
  return jnp.concatenate(
    [real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1
  )
