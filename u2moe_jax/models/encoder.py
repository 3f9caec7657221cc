"""Conformer encoder: one masked pass, or chunk by chunk with a cache."""

from flax import linen as nn
from flax import struct
import jax.numpy as jnp

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import PyTree
from u2moe_jax.array_types import typechecked
from u2moe_jax.layers import attention
from u2moe_jax.layers import convolution
from u2moe_jax.layers import dropout as dropout_lib
from u2moe_jax.layers import linear
from u2moe_jax.layers import moe
from u2moe_jax.layers import positional
from u2moe_jax.layers import subsampling
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import conformer_block
from u2moe_jax.models import stack
from u2moe_jax.ops import masks


@struct.dataclass
class EncoderOutput:
  """Encoder frames and what came with them.

  Attributes:
    frames: after the last norm; at padded frames they mean nothing.
    mask: True for real frames.
    moe: per MoE layer name, statistics stacked over the blocks that have it;
      empty when dense.
    embedded: after subsampling and positions, before the first block.
    block_outputs: every block's output.
    buffers: the buffers, with running statistics updated in training.
  """

  frames: Float[Array, 'B T D']
  mask: Bool[Array, 'B T']
  moe: dict[str, moe.MoeStats]
  embedded: Float[Array, 'B T D']
  block_outputs: Float[Array, 'L B T D']
  buffers: PyTree


class ConformerEncoder(nn.Module):
  """CMVN, subsampling, positions, L blocks, norm.

  Attributes:
    config: the encoder.
    form: of the parameters.
    dtype: compute type.
  """

  config: config_lib.EncoderConfig
  form: config_lib.Form = 'training'
  dtype: linear.Dtype = jnp.float32

  def setup(self):
    config = self.config
    self.subsampling = subsampling.ConvSubsampling(
      config.subsampling,
      config.model_dim,
      config.subsampling_channels,
      dtype=self.dtype,
    )
    self.blocks = stack.build(
      conformer_block.ConformerBlock,
      config,
      config.expert_ffns,
      unrolled=self.form == 'inference',
      form=self.form,
      dtype=self.dtype,
    )
    self.norm = linear.layer_norm()
    self.positional_dropout = dropout_lib.Dropout(config.positional_dropout)

  @property
  def geometry(self) -> subsampling.Geometry:
    """Arithmetic of the subsampling."""
    return subsampling.geometry(self.config.subsampling)

  @typechecked
  def __call__(
    self,
    features: Float[Array, 'B T_in F'],
    feature_lengths: Int[Array, 'B'],
    buffers: PyTree,
    *,
    chunk_size: int | Int[Array, ''] = -1,
    left_chunks: int | Int[Array, ''] = -1,
  ) -> EncoderOutput:
    """Encodes whole utterances under a chunk mask.

    Args:
      features: log-mel frames before CMVN, padded.
      feature_lengths: real frames of each utterance.
      buffers: CMVN, and batch-norm statistics where there are any.
      chunk_size: encoder frames per chunk; -1 for full context.
      left_chunks: chunks of left context; -1 for all.

    Returns:
      T = geometry.output_length(T_in) frames; inputs too short for one frame
      give a row whose mask is all False.
    """
    x = self._subsample(features, buffers)
    num_frames = x.shape[1]
    lengths = self.geometry.output_length(feature_lengths)
    mask = masks.length_mask(lengths, max_length=num_frames)
    # One mask for the batch: [T, T].
    chunks = masks.chunk_mask(
      num_frames, chunk_size=chunk_size, left_chunks=left_chunks
    )
    positions = jnp.arange(num_frames)[None]  # [1, T]
    x, key_embedding, rotation = self._positions(x, positions, positions)
    context = conformer_block.BlockContext(
      frame_mask=mask,
      # Padding is no key. As a query it may be anything: nobody reads it.
      attention_mask=chunks[None] & mask[:, None, :],  # [B, T, T]
      key_embedding=key_embedding,
      rotation=rotation,
    )
    state = conformer_block.BlockState(running=_running(buffers))
    frames, output = self._run(x, state, context)
    if output.state.running is not None:
      buffers = dict(buffers, conv_norm=_to_tree(output.state.running))
    return EncoderOutput(
      frames=self.norm(frames).astype(self.dtype),
      mask=mask,
      moe=output.moe,
      embedded=x,
      block_outputs=output.output,
      buffers=buffers,
    )

  @typechecked
  def encode_chunk(
    self,
    features: Float[Array, 'B T_in F'],
    num_valid: Int[Array, 'B'],
    buffers: PyTree,
    cache: cache_lib.StreamingCache,
  ) -> tuple[EncoderOutput, cache_lib.StreamingCache]:
    """Encodes the next chunk of B streams.

    Args:
      features: the chunk's input window, `geometry.window(chunk)` frames:
        the convolutions' overlap is computed again, not cached.
      num_valid: real encoder frames of each stream in this chunk. Fewer than
        a whole chunk end the stream; 0 leaves its cache as it is.
      buffers: as in `__call__`.
      cache: state after the previous chunk; its capacity is the left context.

    Returns:
      The chunk's frames and the next cache.

    Raises:
      ValueError: for a non-causal model, which cannot stream.
    """
    if not self.config.causal_conv:
      raise ValueError(
        'this model has a non-causal convolution (encoder.causal_conv=false) '
        'and cannot stream; decode whole utterances instead'
      )
    x = self._subsample(features, buffers)
    num_frames, capacity = x.shape[1], cache.capacity
    mask = masks.length_mask(num_valid, max_length=num_frames)
    # The newest cached frame is the last, so unfilled places are in front.
    filled = jnp.arange(capacity)[None] >= capacity - cache.length[:, None]
    key_mask = jnp.concatenate([filled, mask], axis=1)  # [B, P + T]
    # Positions count from the start of each stream; those of unfilled places,
    # negative ones at first, mean nothing and are masked.
    new = cache.offset[:, None] + jnp.arange(num_frames)[None]  # [B, T]
    keys = cache.offset[:, None] + jnp.arange(-capacity, num_frames)[None]
    x, key_embedding, rotation = self._positions(x, new, keys)
    context = conformer_block.BlockContext(
      frame_mask=mask,
      # One row for all queries: a frame sees all of its chunk and of the cache.
      attention_mask=key_mask[:, None],
      key_embedding=key_embedding,
      rotation=rotation,
    )
    state = conformer_block.BlockState(
      past=attention.KeyValue(key=cache.key, value=cache.value),
      history=cache.convolution,
      running=_running(buffers),
    )
    frames, output = self._run(x, state, context)
    result = EncoderOutput(
      frames=self.norm(frames).astype(self.dtype),
      mask=mask,
      moe=output.moe,
      embedded=x,
      block_outputs=output.output,
      buffers=buffers,
    )
    return result, _next_cache(cache, output.state, num_valid)

  def _run(
    self,
    x: Float[Array, 'B T D'],
    state: conformer_block.BlockState,
    context: conformer_block.BlockContext,
  ) -> tuple[Array, conformer_block.BlockOutput]:
    return stack.run(self.blocks, self.config.expert_ffns, x, state, context)

  def _subsample(
    self, features: Float[Array, 'B T_in F'], buffers: PyTree
  ) -> Array:
    # CMVN: each mel bin to mean 0 and variance 1 by statistics of a corpus,
    # `istd` being one over the standard deviation.
    cmvn = buffers['cmvn']
    x = (features - cmvn['mean'][None, None]) * cmvn['istd'][None, None]
    return self.subsampling(x)

  def _positions(
    self,
    x: Float[Array, 'B T D'],
    positions: Int[Array, '#B T'],
    key_positions: Int[Array, '#B P'],
  ) -> tuple[Array, Array | None, positional.Rotation | None]:
    """Scales x and makes the position terms of the configured kind."""
    config = self.config
    width = config.model_dim
    key_embedding, rotation = None, None
    # As the reference: `no_pos` alone leaves x as it is.
    if config.position != 'no_pos':
      x = x * width**0.5
    if config.position == 'abs_pos':
      embedding = positional.sinusoids(positions, width=width)
      x = x + embedding.astype(x.dtype)
    elif config.position == 'rel_pos':
      embedding = positional.sinusoids(key_positions, width=width)
      # Not added to x: every block's attention projects it by itself.
      key_embedding = self.positional_dropout(embedding.astype(x.dtype))
    elif config.position == 'rope_pos':
      head_dim = width // config.num_heads
      rotation = positional.rotation(positions, head_dim=head_dim)
    return self.positional_dropout(x), key_embedding, rotation


def _running(buffers: PyTree) -> convolution.RunningStats | None:
  tree = buffers.get('conv_norm')
  return convolution.RunningStats(**tree) if tree else None


def _to_tree(running: convolution.RunningStats) -> PyTree:
  return {'mean': running.mean, 'variance': running.variance}


def _next_cache(
  cache: cache_lib.StreamingCache,
  state,
  num_valid: Int[Array, 'B'],
) -> cache_lib.StreamingCache:
  """Drops the oldest frames; padded new frames never enter."""

  # The `keep` frames that end at each stream's last valid one. In front of the
  # new frames of x are `keep` old ones, so they begin at `num_valid`.
  def last(x: Float[Array, 'L B P *rest'], keep: int) -> Array:
    index = num_valid[:, None] + jnp.arange(keep)[None]  # [B, keep]
    index = index.reshape(1, *index.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, index, axis=2)

  return cache_lib.StreamingCache(
    key=last(state.past.key, cache.capacity),
    value=last(state.past.value, cache.capacity),
    convolution=last(state.history, cache.convolution.shape[2]),
    length=jnp.minimum(cache.length + num_valid, cache.capacity),
    offset=cache.offset + num_valid,
  )
