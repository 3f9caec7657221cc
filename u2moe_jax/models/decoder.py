"""Left-to-right and right-to-left Transformer decoders.

Both are the same stack with their own parameters; the right-to-left one is
fed reversed tokens, and positions run forward in both.

While decoding, the hypotheses of an utterance stand where the tokens of a text
stand in training: side by side on the time axis, told apart by the mask. Each
step writes their keys and values behind those of the step before and never
moves them; which of them belong to a hypothesis is said by its ancestry.
"""

import dataclasses
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import PyTree
from u2moe_jax.array_types import typechecked
from u2moe_jax.layers import attention
from u2moe_jax.layers import dropout as dropout_lib
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
    write_at: where the new tokens go in the cache, while decoding.
  """

  token_mask: Bool[Array, 'R U1']
  attention_mask: Bool[Array, '#R #U1 P']
  memory_mask: Bool[Array, 'B T']
  memory: Float[Array, 'B T D'] | None = None
  write_at: Int[Array, ''] | None = None


@struct.dataclass
class LayerCache:
  """What a layer keeps during an autoregressive search.

  Attributes:
    tokens: self-attention keys and values, those of token `p` of hypothesis
      `n` at place p * N + n.
    memory: projected encoder frames.
  """

  tokens: attention.HeadsFirst
  memory: attention.HeadsFirst


# One for each layer: stacked in one array they would be copied at every step.
DecoderCache = tuple[LayerCache, ...]


@struct.dataclass
class StepInputs:
  """The newest token of N hypotheses for each of B utterances.

  Attributes:
    tokens: their ids.
    position: their position, the same for all.
    ancestry: of every hypothesis, at which place 0..N-1 its ancestor stood at
      each of P positions, its own place at `position`; -1 for those to come.
    live: False for hypotheses whose scores nobody will read.
  """

  tokens: Int[Array, 'B N']
  position: Int[Array, '']
  ancestry: Int[Array, 'B N P']
  live: Bool[Array, 'B N']


@struct.dataclass
class LayerOutput:
  """A layer's side results: keys and values, and MoE statistics if any."""

  keys: attention.Keys
  moe: dict[str, moe.MoeStats]


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention, feed-forward; all pre-norm.

  Attributes:
    config: the decoder.
    experts: `('ffn',)` if the feed-forward layer has experts, else `()`.
    form: of the parameters.
    dtype: compute type.
  """

  config: config_lib.DecoderConfig
  experts: tuple[str, ...]
  form: config_lib.Form = 'training'
  dtype: linear.Dtype = jnp.float32

  @nn.compact
  @typechecked
  def __call__(
    self,
    x: Float[Array, 'R U1 D'],
    cache: LayerCache | None,
    context: DecoderContext,
  ) -> tuple[Float[Array, 'R U1 D'], LayerOutput]:
    normed = self._normed('self_attention', x)
    past = None if cache is None else cache.tokens
    attended, keys = self._self_attention(normed, past, context)
    x += self._dropout(attended)
    # While decoding the memory comes projected, in the cache.
    memory = context.memory if cache is None else cache.memory
    normed = self._normed('cross_attention', x)
    x += self._dropout(self._cross_attention(normed, memory, context))
    fed, stats = self._feed_forward(self._normed('ffn', x), context)
    x += self._dropout(fed)
    x = nn.with_logical_constraint(
      x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)
    )
    return x, LayerOutput(keys=keys, moe=stats)

  def _normed(self, name: str, x: Float[Array, 'R U1 D']) -> Array:
    # The norm gives float32; what follows is in the compute type.
    return linear.layer_norm(f'norm_{name}')(x).astype(self.dtype)

  def _dropout(self, x: Float[Array, 'R U1 D']) -> Array:
    return dropout_lib.Dropout(self.config.dropout)(x)

  def _attention(self, name: str, dropout: float, *, fused: bool = False):
    return attention.MultiHeadAttention(
      self.config.num_heads, dropout, fused=fused, dtype=self.dtype, name=name
    )

  def _self_attention(
    self,
    x: Float[Array, 'R U1 D'],
    past: attention.Keys | None,
    context: DecoderContext,
  ) -> tuple[Array, attention.Keys]:
    layer = self._attention(
      'self_attention',
      self.config.self_attention_dropout,
      fused=self.form == 'inference',
    )
    return layer(
      x, x, context.attention_mask, past=past, write_at=context.write_at
    )

  def _cross_attention(
    self,
    x: Float[Array, 'R U1 D'],
    memory: Float[Array, 'B T D'] | attention.Keys | None,
    context: DecoderContext,
  ) -> Array:
    layer = self._attention(
      'cross_attention', self.config.cross_attention_dropout
    )
    # All hypotheses of an utterance as one long row of queries: without a
    # causal mask it makes no difference who asks. [B, R / B * U1, D]
    mask = context.memory_mask
    queries = x.reshape(mask.shape[0], -1, x.shape[-1])
    attended, _ = layer(queries, memory, mask[:, None])
    return attended.reshape(x.shape)

  def _feed_forward(
    self, x: Float[Array, 'R U1 D'], context: DecoderContext
  ) -> tuple[Array, dict[str, moe.MoeStats]]:
    config = self.config
    if 'ffn' in self.experts:
      experts = moe.MoeFeedForward(
        config.moe,
        config.ffn_dim,
        config.activation,
        config.dropout,
        separate=self.form == 'inference',
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
    unrolled: every layer is a module of its own, as `step` needs it, and the
      parameters are those of `unstack`.
    form: of the parameters; that of inference is unrolled.
  """

  config: config_lib.DecoderConfig
  num_blocks: int
  vocab_size: int
  model_dim: int
  dtype: linear.Dtype = jnp.float32
  unrolled: bool = False
  form: config_lib.Form = 'training'

  def setup(self):
    self.embedding = nn.Embed(
      self.vocab_size,
      self.model_dim,
      # As PyTorch starts embeddings.
      embedding_init=nn.with_logical_partitioning(
        nn.initializers.normal(1.0), (axes.VOCAB, axes.EMBED)
      ),
      dtype=self.dtype,
    )
    self.layers: Any = stack.build(
      DecoderLayer,
      self.config,
      self._kinds,
      unrolled=self.unrolled or self.form == 'inference',
      form=self.form,
      dtype=self.dtype,
    )
    self.norm = linear.layer_norm()
    self.output = linear.dense(
      self.vocab_size,
      fan_in=self.model_dim,
      kernel_axes=(axes.EMBED, axes.VOCAB),
      dtype=self.dtype,
    )
    self.positional_dropout = dropout_lib.Dropout(
      self.config.positional_dropout
    )

  @property
  def _kinds(self) -> stack.Kinds:
    return self.config.expert_ffns(self.num_blocks)

  @typechecked
  def __call__(
    self,
    tokens: Int[Array, 'R U1'],
    token_mask: Bool[Array, 'R U1'],
    memory: Float[Array, 'B T D'],
    memory_mask: Bool[Array, 'B T'],
    *,
    positions: Int[Array, '#R U1'] | None = None,
    attention_mask: Bool[Array, '#R U1 U1'] | None = None,
  ) -> tuple[Float[Array, 'R U1 V'], dict[str, moe.MoeStats]]:
    """Scores every next token, teacher-forced.

    Args:
      tokens: inputs that start with sos; R is a multiple of B, the rows of
        one utterance next to each other.
      token_mask: True for real inputs.
      memory: encoder frames.
      memory_mask: True for real frames.
      positions: of the inputs in their texts; None: a row is one text.
      attention_mask: which inputs precede which, themselves included; None: a
        row is one text.

    Returns:
      Logits in float32, and MoE statistics stacked over the layers with
      experts.
    """
    # In rescoring a row is a tree of hypotheses with common beginnings, which
    # brings positions and a mask of its own.
    size = tokens.shape[1]
    if positions is None:
      positions = jnp.arange(size)[None]
    if attention_mask is None:
      attention_mask = masks.causal_mask(size)[None]
    context = DecoderContext(
      token_mask=token_mask,
      attention_mask=attention_mask & token_mask[:, None],  # [R, U1, U1]
      memory=memory,
      memory_mask=memory_mask,
    )
    x = self._embed(tokens, positions)
    x, output = stack.run(self.layers, self._kinds, x, None, context)
    return self._logits(x), output.moe

  @typechecked
  def step(
    self,
    inputs: StepInputs,
    cache: DecoderCache,
    memory_mask: Bool[Array, 'B T'],
  ) -> tuple[
    Float[Array, 'B N V'], DecoderCache, list[dict[str, moe.MoeStats]]
  ]:
    """Scores what follows the newest tokens; needs the unrolled form.

    Args:
      inputs: the newest tokens and where they belong.
      cache: earlier tokens, and the memory.
      memory_mask: True for real frames.

    Returns:
      Logits in float32, the cache with these tokens in it, and the MoE
      statistics of each layer.
    """
    batch, places = inputs.tokens.shape
    # At each position a hypothesis sees the one place of the N where its
    # ancestor stood; -1, a position to come, is no place.
    slots = jnp.arange(places)[None, None, None]
    visible = inputs.ancestry[..., None] == slots  # [B, N, P, N]
    context = DecoderContext(
      token_mask=inputs.live,
      attention_mask=visible.reshape(batch, places, -1),  # [B, N, P * N]
      memory_mask=memory_mask,
      write_at=inputs.position * places,
    )
    # N stands where U1 does in training; all N are at the same position.
    x = self._embed(inputs.tokens, inputs.position[None, None])
    written, stats = [], []
    for layer, own in zip(self.layers, cache, strict=True):
      x, output = layer(x, own, context)
      tokens = attention.heads_first(output.keys)
      written.append(dataclasses.replace(own, tokens=tokens))
      stats.append(output.moe)
    return self._logits(x), tuple(written), stats

  def init_step_cache(
    self, memory: Float[Array, 'B T D'], *, hypotheses: int, capacity: int
  ) -> DecoderCache:
    """A cache for `step`: no tokens yet, the memory projected once.

    Args:
      memory: encoder frames.
      hypotheses: N.
      capacity: tokens P of each that there is room for.
    """
    heads = self.config.num_heads
    size = (capacity * hypotheses, self.model_dim // heads)
    empty = jnp.zeros((memory.shape[0], heads, *size), self.dtype)
    tokens = attention.HeadsFirst(key=empty, value=empty)

    # What `MultiHeadAttention` would do with the memory at every step, straight
    # into the layout of the cache.
    def project(layer: nn.Module, name: str) -> Array:
      part = layer.variables['params']['cross_attention'][name]
      kernel = linear.float_kernel(part).astype(self.dtype)
      bias = part['bias'].astype(self.dtype)[None, :, None]  # [1, H, 1, K]
      return jnp.einsum('BTD,DHK->BHTK', memory, kernel) + bias

    return tuple(
      LayerCache(
        tokens=tokens,
        memory=attention.HeadsFirst(
          key=project(layer, 'key'), value=project(layer, 'value')
        ),
      )
      for layer in self.layers
    )

  def _embed(
    self, tokens: Int[Array, 'R U1'], positions: Int[Array, '#R U1']
  ) -> Array:
    # The scale of Vaswani et al. (1706.03762, 3.4).
    x = self.embedding(tokens) * self.model_dim**0.5
    table = positional.sinusoids(positions, width=self.model_dim)
    x += table.astype(x.dtype)
    return self.positional_dropout(x)

  def _logits(self, x: Float[Array, 'R U1 D']) -> Array:
    x = self.norm(x).astype(self.dtype)
    return self.output(x).astype(jnp.promote_types(jnp.float32, self.dtype))


def unstack(params: PyTree) -> PyTree:
  """The parameters of a decoder as its unrolled form wants them.

  Those of the inference form are unrolled already.
  """
  if 'layers' not in params:
    return params
  layers = {
    f'layers_{i}': layer
    for i, layer in enumerate(stack.unstack(params['layers']))
  }
  return {k: v for k, v in params.items() if k != 'layers'} | layers


def grow(
  cache: DecoderCache, capacity: int, *, hypotheses: int
) -> DecoderCache:
  """Makes room for longer hypotheses; what is known stays.

  Args:
    cache: the state so far.
    capacity: tokens of each that there is room for from now on.
    hypotheses: N.
  """

  # At the end: token p of hypothesis n stays at place p * N + n.
  def pad(leaf: Float[Array, 'B H P K']) -> Array:
    missing = capacity * hypotheses - leaf.shape[2]
    return jnp.pad(leaf, ((0, 0), (0, 0), (0, missing), (0, 0)))

  return tuple(
    dataclasses.replace(own, tokens=jax.tree.map(pad, own.tokens))
    for own in cache
  )
