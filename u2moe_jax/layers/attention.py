"""Multi-head self- and cross-attention; caches go in and out by hand."""

import dataclasses

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.layers import dropout as dropout_lib
from u2moe_jax.layers import linear
from u2moe_jax.layers import positional
from u2moe_jax.ops import dot_product
from u2moe_jax.sharding import axes

_HEAD_AXES = (axes.EMBED, axes.HEADS, axes.KV)


@struct.dataclass
class KeyValue:
  """Projected keys and values, oldest frame first."""

  key: Float[Array, 'B P H K']
  value: Float[Array, 'B P H K']

  @property
  def layout(self) -> dot_product.Layout:
    """How the axes lie."""
    return 'BPHK'


@struct.dataclass
class HeadsFirst:
  """The same as a matrix product reads them.

  For caches that a loop reads at every step: with frames first, each step
  would move the whole cache before it multiplies.
  """

  key: Float[Array, 'B H P K']
  value: Float[Array, 'B H P K']

  @property
  def layout(self) -> dot_product.Layout:
    """How the axes lie."""
    return 'BHPK'


Keys = KeyValue | HeadsFirst


def heads_first(keys: Keys) -> HeadsFirst:
  """Brings the heads in front of the frames."""
  if isinstance(keys, HeadsFirst):
    return keys
  move = lambda x: jnp.swapaxes(x, 1, 2)  # [B, H, P, K]
  return HeadsFirst(key=move(keys.key), value=move(keys.value))


def _join(past: Keys | None, new: Keys, write_at: Array | None) -> Keys:
  """Appends the new keys and values to the past, or writes them into it."""
  if past is None:
    return new
  axis = 1  # of the frames
  if isinstance(past, HeadsFirst):
    new, axis = heads_first(new), 2

  def join(old: Array, fresh: Array) -> Array:
    # The cache keeps its type, so that one program serves every chunk. A search
    # has caches of a fixed size and overwrites; streams append.
    fresh = fresh.astype(old.dtype)
    if write_at is None:
      return jnp.concatenate([old, fresh], axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(old, fresh, write_at, axis=axis)

  return jax.tree.map(join, past, new)


class MultiHeadAttention(nn.Module):
  """Attention of T queries over P keys.

  Attributes:
    num_heads: heads H; must divide the model width.
    dropout: on attention weights, active when a `dropout` key is given.
    key_position: keys get a learned score of their absolute position (the
      reference's `rel_selfattn`, which never shifts).
    fused: one kernel for queries, keys and values; for self-attention.
    dtype: compute type.
  """

  num_heads: int
  dropout: float = 0.0
  key_position: bool = False
  fused: bool = False
  dtype: linear.Dtype = jnp.float32

  @nn.compact
  @typechecked
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    memory: Float[Array, 'B new D'] | Keys,
    mask: Bool[Array, '#B #T P'],
    *,
    past: Keys | None = None,
    key_embedding: Float[Array, '#B P D'] | None = None,
    rotation: positional.Rotation | None = None,
    write_at: Int[Array, ''] | None = None,
  ) -> tuple[Float[Array, 'B T D'], Keys]:
    """Attends from `x` to `past` followed by `memory`.

    Args:
      x: queries before projection.
      memory: frames to project to keys and values, or projected ones; with
        `fused` it is x.
      mask: True where a query may look at a key; P counts past and new.
      past: cached keys and values, in front of those of `memory`; their
        layout is that of the result.
      key_embedding: position embedding of every key, with `key_position`.
      rotation: rotary angles of the new frames, applied to queries and new
        keys; cached keys were rotated when they were new.
      write_at: overwrite `past` from this position on instead of appending.

    Returns:
      The output, and all P keys and values (without position terms).
    """
    width = x.shape[-1]
    head_dim = width // self.num_heads
    query, new = self._project_all(x, memory)
    if rotation is not None:
      query = positional.rotate(query, rotation)
      new = dataclasses.replace(new, key=positional.rotate(new.key, rotation))
    # Kept rotated, but without the terms of `rel_pos`: these are made anew from
    # the embeddings of all P keys.
    keys = _join(past, new, write_at)
    key, key_score = keys.key, None
    if self.key_position:
      key, key_score = self._position_terms(key, key_embedding, head_dim)
    weights = dot_product.attention_weights(
      query, key, mask, key_score=key_score, layout=keys.layout
    )
    weights = dropout_lib.Dropout(self.dropout)(weights)
    output = dot_product.weighted_values(
      weights, keys.value, layout=keys.layout
    )
    output = linear.dense(
      width,
      fan_in=width,
      contract=2,
      kernel_axes=(axes.HEADS, axes.KV, axes.EMBED),
      dtype=self.dtype,
      name='output',
    )(output)
    return output, keys

  def _project_all(
    self, x: Float[Array, 'B T D'], memory: Float[Array, 'B new D'] | Keys
  ) -> tuple[Array, Keys]:
    """Queries (B, T, H, K), and the new keys and values."""
    width = x.shape[-1]
    if self.fused:
      # The axis of the three goes by a name that no rule splits.
      shape = (3, self.num_heads, width // self.num_heads)
      fused = linear.dense(
        shape,
        fan_in=width,
        kernel_axes=(axes.EMBED, axes.KV, axes.HEADS, axes.KV),
        dtype=self.dtype,
        name='query_key_value',
      )(x)  # [B, T, 3, H, K]
      return fused[:, :, 0], KeyValue(key=fused[:, :, 1], value=fused[:, :, 2])
    query = self._project('query', width)(x)
    # A search projects the encoder frames once, not at every step.
    if isinstance(memory, Keys):
      return query, memory
    return query, KeyValue(
      key=self._project('key', width)(memory),
      value=self._project('value', width)(memory),
    )

  def _project(self, name: str, width: int, use_bias: bool = True):
    return linear.dense(
      (self.num_heads, width // self.num_heads),
      fan_in=width,
      kernel_axes=_HEAD_AXES,
      dtype=self.dtype,
      use_bias=use_bias,
      name=name,
    )

  def _position_terms(
    self,
    key: Float[Array, 'B P H K'],
    key_embedding: Float[Array, '#B P D'] | None,
    head_dim: int,
  ) -> tuple[Array, Array]:
    """Folds positions into the keys and one score per key.

    (q + u) . k + (q + w) . p  =  q . (k + p)  +  (u . k + w . p), so one
    product over queries does for both terms.
    """
    if key_embedding is None:
      raise ValueError('key_position attention needs key_embedding')
    width = self.num_heads * head_dim
    position = self._project('position', width, use_bias=False)(key_embedding)

    # u and w of the formula; they belong to the queries' side and are the same
    # for all of them.
    def bias(name: str) -> Array:
      init, names = nn.initializers.xavier_uniform(), (axes.HEADS, axes.KV)
      shape = (self.num_heads, head_dim)
      return linear.parameter(self, name, init, names, shape).astype(key.dtype)

    position = jnp.broadcast_to(position, key.shape)  # [B, P, H, K]
    score = jnp.einsum('BPHK,HK->BPH', key, bias('content_bias'))
    score += jnp.einsum('BPHK,HK->BPH', position, bias('position_bias'))
    return key + position, score
