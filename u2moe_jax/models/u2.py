"""The U2++ recogniser: encoder, CTC head, two attention decoders."""

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import Key
from u2moe_jax.array_types import PyTree
from u2moe_jax.array_types import typechecked
from u2moe_jax.layers import linear
from u2moe_jax.layers import moe
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import decoder
from u2moe_jax.models import encoder
from u2moe_jax.sharding import axes


@struct.dataclass
class DecoderInputs:
  """Teacher-forcing inputs of one direction, R / B rows for an utterance.

  Attributes:
    tokens: inputs that start with sos.
    mask: True for real inputs.
    positions: of the inputs in their texts; None: a row is one text.
    attention_mask: which inputs precede which, themselves included; None: a
      row is one text.
  """

  tokens: Int[Array, 'R U1']
  mask: Bool[Array, 'R U1']
  positions: Int[Array, 'R U1'] | None = None
  attention_mask: Bool[Array, 'R U1 U1'] | None = None


@struct.dataclass
class DecoderScores:
  """A decoder's logits (float32) and MoE statistics."""

  logits: Float[Array, 'R U1 V']
  moe: dict[str, moe.MoeStats]


@struct.dataclass
class Outputs:
  """Everything a training step needs from one pass.

  Attributes:
    encoder: encoder frames, mask, statistics, buffers.
    ctc_log_probs: CTC log-probabilities, float32.
    forward: left-to-right decoder; None for a CTC-only model.
    backward: right-to-left decoder; None where there is none.
  """

  encoder: encoder.EncoderOutput
  ctc_log_probs: Float[Array, 'B T V']
  forward: DecoderScores | None
  backward: DecoderScores | None


class U2MoeModel(nn.Module):
  """Streaming and non-streaming recogniser (U2++, arXiv 2106.05642).

  With `encoder.moe` and `decoder.moe` set, every feed-forward layer is a
  Mixture-of-Experts (U2++ MoE, arXiv 2404.16407), or those that `moe.where`
  chooses. Dropout and batch-norm
  updates are on when `apply` is given a `dropout` key, and off otherwise.

  Attributes:
    config: the model.
    form: of the parameters: as they train, or as decoding reads them fastest
      (`models/inference.py`).
  """

  config: config_lib.ModelConfig
  form: config_lib.Form = 'training'

  def setup(self):
    config = self.config
    dtype = jnp.dtype(config.dtype)
    self.encoder = encoder.ConformerEncoder(
      config.encoder, form=self.form, dtype=dtype
    )
    # For each frame a score of every token and of the blank, "nothing new".
    self.ctc = linear.dense(
      config.vocab_size,
      fan_in=config.encoder.model_dim,
      kernel_axes=(axes.EMBED, axes.VOCAB),
      dtype=dtype,
    )
    # What a model lacks has no parameters either, nor an attribute.
    if config.decoder.num_blocks:
      self.forward_decoder = make_decoder(
        config, config.decoder.num_blocks, form=self.form
      )
    if config.decoder.num_reverse_blocks:
      self.backward_decoder = make_decoder(
        config, config.decoder.num_reverse_blocks, form=self.form
      )

  def __call__(
    self,
    features: Float[Array, 'B T_in F'],
    feature_lengths: Int[Array, 'B'],
    buffers: PyTree,
    forward_inputs: DecoderInputs,
    backward_inputs: DecoderInputs,
    *,
    chunk_size: int | Int[Array, ''] = -1,
    left_chunks: int | Int[Array, ''] = -1,
  ) -> Outputs:
    """Encodes and scores both directions, teacher-forced.

    Args:
      features: log-mel frames before CMVN, padded.
      feature_lengths: real frames of each utterance.
      buffers: see `init_buffers`.
      forward_inputs: left-to-right inputs.
      backward_inputs: right-to-left inputs, that is of reversed labels.
      chunk_size: encoder frames per chunk; -1 for full context.
      left_chunks: chunks of left context; -1 for all.
    """
    encoded = self.encode(
      features,
      feature_lengths,
      buffers,
      chunk_size=chunk_size,
      left_chunks=left_chunks,
    )
    has_forward = self.config.decoder.num_blocks > 0
    has_backward = self.config.decoder.num_reverse_blocks > 0
    memory = encoded.frames, encoded.mask
    return Outputs(
      encoder=encoded,
      ctc_log_probs=self.ctc_log_probs(encoded.frames),
      forward=self.decode_forward(forward_inputs, *memory)
      if has_forward
      else None,
      backward=self.decode_backward(backward_inputs, *memory)
      if has_backward
      else None,
    )

  def encode(
    self,
    features: Float[Array, 'B T_in F'],
    feature_lengths: Int[Array, 'B'],
    buffers: PyTree,
    *,
    chunk_size: int | Int[Array, ''] = -1,
    left_chunks: int | Int[Array, ''] = -1,
  ) -> encoder.EncoderOutput:
    """Encodes whole utterances; see `ConformerEncoder.__call__`."""
    return self.encoder(
      features,
      feature_lengths,
      buffers,
      chunk_size=chunk_size,
      left_chunks=left_chunks,
    )

  def encode_chunk(
    self,
    features: Float[Array, 'B T_in F'],
    num_valid: Int[Array, 'B'],
    buffers: PyTree,
    cache: cache_lib.StreamingCache,
  ) -> tuple[encoder.EncoderOutput, cache_lib.StreamingCache]:
    """Encodes the next chunk; see `ConformerEncoder.encode_chunk`."""
    return self.encoder.encode_chunk(features, num_valid, buffers, cache)

  @typechecked
  def ctc_log_probs(
    self, frames: Float[Array, 'B T D'], *, blank_penalty: float = 0.0
  ) -> Float[Array, 'B T V']:
    """CTC log-probabilities, float32.

    Args:
      frames: encoder frames.
      blank_penalty: subtracted from the blank logit before the softmax.
    """
    logits = self.ctc(frames)
    # float32: sums over many frames lose small differences in bfloat16.
    logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
    # A number of Python, not of JAX: without a penalty nothing is compiled.
    if blank_penalty:
      logits = logits.at[..., self.config.blank_id].add(-blank_penalty)
    return jax.nn.log_softmax(logits)

  def decode_forward(
    self,
    inputs: DecoderInputs,
    memory: Float[Array, 'B T D'],
    memory_mask: Bool[Array, 'B T'],
  ) -> DecoderScores:
    """Scores left-to-right; raises AttributeError for a CTC-only model."""
    return _decode(self.forward_decoder, inputs, memory, memory_mask)

  def decode_backward(
    self,
    inputs: DecoderInputs,
    memory: Float[Array, 'B T D'],
    memory_mask: Bool[Array, 'B T'],
  ) -> DecoderScores:
    """Scores right-to-left; the inputs are of reversed labels."""
    return _decode(self.backward_decoder, inputs, memory, memory_mask)


def _decode(
  module: decoder.TransformerDecoder,
  inputs: DecoderInputs,
  memory: Float[Array, 'B T D'],
  memory_mask: Bool[Array, 'B T'],
) -> DecoderScores:
  logits, stats = module(
    inputs.tokens,
    inputs.mask,
    memory,
    memory_mask,
    positions=inputs.positions,
    attention_mask=inputs.attention_mask,
  )
  return DecoderScores(logits=logits, moe=stats)


def make_decoder(
  config: config_lib.ModelConfig,
  num_blocks: int,
  *,
  unrolled: bool = False,
  form: config_lib.Form = 'training',
) -> decoder.TransformerDecoder:
  """One of the decoders; unrolled, as a search steps through it."""
  return decoder.TransformerDecoder(
    config.decoder,
    num_blocks,
    config.vocab_size,
    config.encoder.model_dim,
    dtype=jnp.dtype(config.dtype),
    unrolled=unrolled,
    form=form,
  )


def init_buffers(config: config_lib.ModelConfig) -> PyTree:
  """Buffers before training: identity CMVN, unit batch-norm statistics.

  Buffers are a plain tree beside the parameters: never trained, never
  decayed, given to `apply` and returned in `EncoderOutput.buffers`.
  """
  bins = config.feature_dim
  buffers = {'cmvn': {'mean': jnp.zeros((bins,)), 'istd': jnp.ones((bins,))}}
  if config.encoder.conv_norm == 'batch_norm':
    # By block in order, also where parameters lie in groups of unlike blocks.
    shape = (config.encoder.num_blocks, config.encoder.model_dim)
    buffers['conv_norm'] = {
      'mean': jnp.zeros(shape),
      'variance': jnp.ones(shape),
    }
  return buffers


def init_params(model: U2MoeModel, key: Key[Array, '']) -> PyTree:
  """Initial parameters, boxed with their logical axes.

  Shapes do not depend on the input, so the smallest one is used. Call it
  under `jax.eval_shape`, or under `jax.jit` with shardings.
  """
  window = model.config.encoder
  frames = encoder.subsampling.geometry(window.subsampling).window(1)
  features = jnp.zeros((1, frames, model.config.feature_dim))
  inputs = DecoderInputs(
    tokens=jnp.zeros((1, 1), jnp.int32), mask=jnp.ones((1, 1), bool)
  )
  variables = model.init(
    {'params': key},
    features,
    jnp.full((1,), frames, jnp.int32),
    init_buffers(model.config),
    inputs,
    inputs,
  )
  return variables['params']


def count_params(config: config_lib.ModelConfig) -> tuple[int, int]:
  """Counts parameters without allocating them.

  Returns:
    (total, active): active counts top-k of the experts of each layer.
  """
  model = U2MoeModel(config)
  # The boxes of the logical axes come off, so that paths end in names.
  tree = nn.meta.unbox(
    jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
  )
  total, active = 0, 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    moe_config = (
      config.encoder.moe if path[0].key == 'encoder' else config.decoder.moe
    )
    # A dense layer has a kernel below these names.
    is_expert = path[-1].key in ('w_in', 'b_in', 'w_out', 'b_out')
    share = moe_config.top_k / moe_config.num_experts if is_expert else 1
    total += leaf.size
    active += round(leaf.size * share)
  return total, active
