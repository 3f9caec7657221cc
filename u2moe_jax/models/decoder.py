"""Left-to-right and right-to-left Transformer decoders.

Both are the same stack with their own parameters; the right-to-left one is
fed reversed tokens, and positions run forward in both.
"""

import dataclasses

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.layers import attention
from u2moe_jax.layers import feed_forward
from u2moe_jax.layers import linear
from u2moe_jax.layers import moe
from u2moe_jax.layers import positional
from u2moe_jax.models import stack
from u2moe_jax.ops import masks
from u2moe_jax.sharding import axes


@struct.dataclass
class DecoderContext:
  """What every layer of a pass shares.

  The R rows of tokens are R / B hypotheses for each of B utterances, so that
  an n-best list needs its encoder frames only once.

  Attributes:
    token_mask: True for real tokens.
    attention_mask: True where a token may look; P counts cached and new.
    memory_mask: True for real encoder frames.
    memory: encoder frames; None where they come projected.
    write_at: position of the new token in the cache, while decoding.
  """

  token_mask: Bool[Array, 'R U1']
  attention_mask: Bool[Array, '#R #U1 P']
  memory_mask: Bool[Array, 'B T']
  memory: Float[Array, 'B T D'] | None = None
  write_at: Int[Array, ''] | None = None


@struct.dataclass
class DecoderCache:
  """State of an autoregressive search, layers stacked in front.

  Attributes:
    tokens: self-attention keys and values, room for P tokens.
    memory: projected encoder frames.
  """

  tokens: attention.KeyValue
  memory: attention.KeyValue


@struct.dataclass
class LayerOutput:
  """A layer's side results: keys and values, and MoE statistics if any."""

  keys: attention.KeyValue
  moe: dict[str, moe.MoeStats]


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention, feed-forward; all pre-norm.

  Attributes:
    config: the decoder.
    dtype: compute type.
  """

  config: config_lib.DecoderConfig
  dtype: linear.Dtype = jnp.float32

  @nn.compact
  @typechecked
  def __call__(
    self,
    x: Float[Array, 'R U1 D'],
    cache: DecoderCache | None,
    context: DecoderContext,
  ) -> tuple[Float[Array, 'R U1 D'], LayerOutput]:
    normed = self._normed('self_attention', x)
    past = None if cache is None else cache.tokens
    attended, keys = self._self_attention(normed, past, context)
    x += self._dropout(attended)
    memory = context.memory if cache is None else cache.memory
    normed = self._normed('cross_attention', x)
    x += self._dropout(self._cross_attention(normed, memory, context))
    fed, stats = self._feed_forward(self._normed('ffn', x), context)
    x += self._dropout(fed)
    x = nn.with_logical_constraint(
      x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)
    )
    return x, LayerOutput(keys=keys, moe=stats)

  def _normed(self, name, x):
    return linear.layer_norm(f'norm_{name}')(x).astype(self.dtype)

  def _dropout(self, x):
    return nn.Dropout(self.config.dropout)(
      x, deterministic=not self.has_rng('dropout')
    )

  def _attention(self, name, dropout):
    return attention.MultiHeadAttention(
      self.config.num_heads, dropout, dtype=self.dtype, name=name
    )

  def _self_attention(self, x, past, context):
    layer = self._attention(
      'self_attention', self.config.self_attention_dropout
    )
    return layer(
      x, x, context.attention_mask, past=past, write_at=context.write_at
    )

  def _cross_attention(self, x, memory, context):
    layer = self._attention(
      'cross_attention', self.config.cross_attention_dropout
    )
    # All hypotheses of an utterance as one long row of queries.
    mask = context.memory_mask
    queries = x.reshape(mask.shape[0], -1, x.shape[-1])
    attended, _ = layer(queries, memory, mask[:, None])
    return attended.reshape(x.shape)

  def _feed_forward(self, x, context):
    config = self.config
    if config.moe.num_experts:
      experts = moe.MoeFeedForward(
        config.moe,
        config.ffn_dim,
        config.activation,
        dtype=self.dtype,
        name='ffn',
      )
      x, stats = experts(x, context.token_mask)
      return x, {'ffn': stats}
    layer = feed_forward.FeedForward(
      config.ffn_dim,
      config.activation,
      config.dropout,
      dtype=self.dtype,
      name='ffn',
    )
    return layer(x), {}


class TransformerDecoder(nn.Module):
  """Embedding, positions, layers, norm, output.

  Attributes:
    config: the decoder.
    num_blocks: layers of this direction.
    vocab_size: tokens V.
    model_dim: width D.
    dtype: compute type.
  """

  config: config_lib.DecoderConfig
  num_blocks: int
  vocab_size: int
  model_dim: int
  dtype: linear.Dtype = jnp.float32

  def setup(self):
    self.embedding = nn.Embed(
      self.vocab_size,
      self.model_dim,
      embedding_init=nn.with_logical_partitioning(
        nn.initializers.normal(1.0), (axes.VOCAB, axes.EMBED)
      ),
      dtype=self.dtype,
    )
    layers = stack.scanned(
      DecoderLayer,
      length=self.num_blocks,
      scan=self.config.scan_blocks,
      remat=self.config.remat,
    )
    self.layers = layers(self.config, dtype=self.dtype)
    self.norm = linear.layer_norm()
    self.output = linear.dense(
      self.vocab_size,
      fan_in=self.model_dim,
      kernel_axes=(axes.EMBED, axes.VOCAB),
      dtype=self.dtype,
    )
    self.positional_dropout = nn.Dropout(self.config.positional_dropout)

  @typechecked
  def __call__(
    self,
    tokens: Int[Array, 'R U1'],
    token_mask: Bool[Array, 'R U1'],
    memory: Float[Array, 'B T D'],
    memory_mask: Bool[Array, 'B T'],
  ) -> tuple[Float[Array, 'R U1 V'], dict[str, moe.MoeStats]]:
    """Scores every next token, teacher-forced.

    Args:
      tokens: inputs that start with sos; R is a multiple of B, the rows of
        one utterance next to each other.
      token_mask: True for real inputs.
      memory: encoder frames.
      memory_mask: True for real frames.

    Returns:
      Logits in float32, and MoE statistics stacked over layers.
    """
    size = tokens.shape[1]
    context = DecoderContext(
      token_mask=token_mask,
      attention_mask=masks.causal_mask(size)[None] & token_mask[:, None],
      memory=memory,
      memory_mask=memory_mask,
    )
    x = self._embed(tokens, jnp.arange(size)[None])
    x, output = self.layers(x, None, context)
    return self._logits(x), output.moe

  @typechecked
  def step(
    self,
    tokens: Int[Array, 'R'],
    position: Int[Array, ''],
    cache: DecoderCache,
    memory_mask: Bool[Array, 'B T'],
  ) -> tuple[Float[Array, 'R V'], DecoderCache]:
    """Scores the next token after `tokens` at `position`.

    Args:
      tokens: the newest token of each hypothesis.
      position: its position, the same for all.
      cache: earlier tokens, and the memory.
      memory_mask: True for real frames.

    Returns:
      Logits in float32, and the cache with this token in it.
    """
    capacity = cache.tokens.key.shape[2]
    context = DecoderContext(
      token_mask=jnp.ones((tokens.shape[0], 1), bool),
      attention_mask=jnp.arange(capacity)[None, None] <= position,
      memory_mask=memory_mask,
      write_at=position,
    )
    x = self._embed(tokens[:, None], position[None, None])
    x, output = self.layers(x, cache, context)
    return self._logits(x)[:, 0], dataclasses.replace(cache, tokens=output.keys)

  def init_step_cache(
    self, memory: Float[Array, 'B T D'], *, rows: int, capacity: int
  ) -> DecoderCache:
    """A cache for `step`: no tokens yet, the memory projected once.

    Args:
      memory: encoder frames.
      rows: hypotheses R, a multiple of B.
      capacity: tokens there is room for.
    """
    stacked = self.layers.variables['params']['cross_attention']

    def project(name):
      part = jax.tree.map(lambda x: x.astype(self.dtype), stacked[name])
      bias = part['bias'][:, None, None]  # [L, 1, 1, H, K]
      return jnp.einsum('BTD,LDHK->LBTHK', memory, part['kernel']) + bias

    heads = self.config.num_heads
    shape = (self.num_blocks, rows, capacity, heads, self.model_dim // heads)
    empty = jnp.zeros(shape, self.dtype)
    return DecoderCache(
      tokens=attention.KeyValue(key=empty, value=empty),
      memory=attention.KeyValue(key=project('key'), value=project('value')),
    )

  def _embed(self, tokens, positions):
    x = self.embedding(tokens) * self.model_dim**0.5
    table = positional.sinusoids(positions, width=self.model_dim)
    x += table.astype(x.dtype)
    return self.positional_dropout(x, deterministic=not self.has_rng('dropout'))

  def _logits(self, x):
    x = self.norm(x).astype(self.dtype)
    return self.output(x).astype(jnp.promote_types(jnp.float32, self.dtype))
