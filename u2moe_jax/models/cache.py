"""What a stream carries from chunk to chunk."""

import dataclasses

from flax import struct
import jax.numpy as jnp

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int


@struct.dataclass
class StreamingCache:
  """Encoder state of B streams, blocks stacked in front.

  Attributes:
    key: attention keys of the last P frames, newest last.
    value: attention values of the same frames.
    convolution: the last W - 1 inputs of each convolution module.
    length: how many of the P frames are filled.
    offset: frames each stream has produced so far.
  """

  key: Float[Array, 'L B P H K']
  value: Float[Array, 'L B P H K']
  convolution: Float[Array, 'L B W D']
  length: Int[Array, 'B']
  offset: Int[Array, 'B']

  @property
  def capacity(self) -> int:
    """P, the frames of left context that can be kept."""
    return self.key.shape[2]


def init_cache(
  config: config_lib.EncoderConfig,
  *,
  batch: int,
  capacity: int,
  dtype=jnp.float32,
) -> StreamingCache:
  """The cache of B streams that have heard nothing.

  Args:
    config: the encoder.
    batch: streams B.
    capacity: frames of left context P: chunk size times left chunks.
    dtype: type of the cached arrays.
  """
  head_dim = config.model_dim // config.num_heads
  layers = config.num_blocks
  shape = (layers, batch, capacity, config.num_heads, head_dim)
  history = (layers, batch, config.conv_kernel - 1, config.model_dim)
  return StreamingCache(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),
    convolution=jnp.zeros(history, dtype),
    length=jnp.zeros((batch,), jnp.int32),
    offset=jnp.zeros((batch,), jnp.int32),
  )


def grow(cache: StreamingCache, capacity: int) -> StreamingCache:
  """Returns the cache with room for more frames, the old ones kept."""
  # In front: the newest frame is the last, and `length` counts from there.
  extra = capacity - cache.capacity
  pad = ((0, 0), (0, 0), (extra, 0), (0, 0), (0, 0))
  return dataclasses.replace(
    cache, key=jnp.pad(cache.key, pad), value=jnp.pad(cache.value, pad)
  )
