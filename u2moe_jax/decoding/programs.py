"""The jitted programs of decoding: encode and search.

Each is compiled once per padded shape; settings that only change numbers
(chunk size, left chunks) are traced, those that change the program are static.
"""

from collections.abc import Sequence
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import PyTree
from u2moe_jax.decoding import attention_beam
from u2moe_jax.decoding import greedy
from u2moe_jax.decoding import hotwords
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import prefix_beam
from u2moe_jax.layers import moe
from u2moe_jax.models import decoder as decoder_lib
from u2moe_jax.models import u2


@struct.dataclass
class Encoded:
  """An encoded batch.

  Attributes:
    frames: encoder frames.
    log_probs: CTC log-probabilities.
    mask: real frames.
    margin: smallest router margin of any frame in any layer.
  """

  frames: Float[Array, 'B T D']
  log_probs: Float[Array, 'B T V']
  mask: Bool[Array, 'B T']
  margin: Float[Array, 'B']


# The model is a frozen dataclass: equal ones share a compiled program, however
# often a recogniser is made. A blank penalty of 0 leaves its subtraction out of
# the program, hence static.
@functools.partial(jax.jit, static_argnums=0, static_argnames='blank_penalty')
def encode(
  model: u2.U2MoeModel,
  params: PyTree,
  buffers: PyTree,
  features: Float[Array, 'B T_in F'],
  lengths: Int[Array, 'B'],
  *,
  chunk_size: int,
  left_chunks: int,
  blank_penalty: float,
) -> Encoded:
  """Encodes a batch under the chunk mask."""
  variables = {'params': params}
  encoded = model.apply(
    variables,
    features,
    lengths,
    buffers,
    chunk_size=chunk_size,
    left_chunks=left_chunks,
    method='encode',
  )
  log_probs = model.apply(
    variables,
    encoded.frames,
    blank_penalty=blank_penalty,
    method='ctc_log_probs',
  )
  return Encoded(
    frames=encoded.frames,
    log_probs=log_probs,
    mask=encoded.mask,
    margin=router_margin(encoded.moe, rows=features.shape[0]),
  )


def router_margin(
  layers: dict[str, moe.MoeStats], *, rows: int
) -> Float[Array, 'B']:
  """Smallest router margin of each utterance; inf for a dense model.

  Args:
    layers: statistics of a pass; an utterance may have several rows.
    rows: utterances B.
  """
  result = jnp.full((rows,), jnp.inf, jnp.float32)
  for stats in layers.values():
    margin = jnp.moveaxis(stats.margin, 1, 0)  # [R, L, T]
    # Rows of one utterance stand together, so this is a row for each utterance
    # whatever the rows are: texts, nodes or frames.
    margin = margin.reshape(rows, -1).astype(jnp.float32)
    result = jnp.minimum(result, jnp.min(margin, axis=1, initial=jnp.inf))
  return result


@functools.partial(jax.jit, static_argnames='blank_id')
def silence(
  encoded: Encoded, *, blank_id: int
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
  """Probability of the blank, and frames where another token is the best."""
  # Reduced on the device: [B, T] goes to the host instead of [B, T, V].
  best = jnp.argmax(encoded.log_probs, axis=-1)
  return jnp.exp(encoded.log_probs[..., blank_id]), best != blank_id


@functools.partial(jax.jit, static_argnames='blank_id')
def search_greedy(encoded: Encoded, *, blank_id: int) -> hypotheses.Hypotheses:
  """CTC best path."""
  found = greedy.ctc_greedy_search(
    encoded.log_probs, encoded.mask, blank_id=blank_id
  )
  return dataclasses.replace(
    found, margin=jnp.minimum(found.margin, encoded.margin)
  )


@functools.partial(jax.jit, static_argnames=('beam', 'blank_id', 'alignment'))
def search_prefixes(
  encoded: Encoded,
  *,
  beam: int,
  blank_id: int,
  graph: hotwords.HotwordGraph | None = None,
  alignment: prefix_beam.Alignment = 'best',
) -> hypotheses.Hypotheses:
  """CTC prefix beam search, drawn to the hotwords of a graph."""
  found = prefix_beam.ctc_prefix_beam_search(
    encoded.log_probs,
    encoded.mask,
    beam=beam,
    blank_id=blank_id,
    graph=graph,
    alignment=alignment,
  )
  return dataclasses.replace(
    found, margin=jnp.minimum(found.margin, encoded.margin)
  )


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=('beam', 'nbest', 'reference_limits'),
)
def search_attention(
  model: u2.U2MoeModel,
  params: PyTree,
  encoded: Encoded,
  *,
  beam: int,
  length_penalty: float,
  nbest: int | None = None,
  reference_limits: bool = False,
) -> hypotheses.Hypotheses:
  """Left-to-right beam search; at most one token per encoder frame.

  Args:
    model: the recogniser, with a left-to-right decoder.
    params: its parameters.
    encoded: the batch.
    beam: hypotheses kept.
    length_penalty: as in `attention_beam_search`.
    nbest: hypotheses that are wanted; None for all.
    reference_limits: as in the reference, allow a token per frame of the
      padded batch, which makes a result depend on its batch, and count sos in
      the length where it is not eos.
  """
  frames, mask = encoded.frames, encoded.mask
  batch, num_frames = mask.shape
  # An utterance's own frames, not those of the padded batch: what it gets must
  # not depend on its batch mates.
  max_lengths, counted_starts = jnp.sum(mask, axis=1), 0
  if reference_limits:
    max_lengths = jnp.full((batch,), num_frames, jnp.int32)
    counted_starts = int(model.config.sos != model.config.eos)
  decoder = u2.make_decoder(
    model.config,
    model.config.decoder.num_blocks,
    unrolled=True,
    form=model.form,
  )
  variables = {'params': decoder_lib.unstack(params['forward_decoder'])}

  def step(
    inputs: decoder_lib.StepInputs, cache: decoder_lib.DecoderCache
  ) -> attention_beam.StepOutputs:
    logits, cache, stats = decoder.apply(
      variables, inputs, cache, mask, method='step'
    )
    # (The logits are float32 whatever the model computes in.)
    return attention_beam.StepOutputs(
      log_probs=jax.nn.log_softmax(logits),
      cache=cache,
      margin=_step_margin(stats, inputs.tokens),
    )

  found = attention_beam.attention_beam_search(
    step,
    functools.partial(decoder_lib.grow, hypotheses=beam),
    decoder.apply(
      variables, frames, hypotheses=beam, capacity=0, method='init_step_cache'
    ),
    batch=batch,
    beam=beam,
    sos_id=model.config.sos,
    eos_id=model.config.eos,
    max_lengths=max_lengths,
    max_steps=num_frames,
    length_penalty=length_penalty,
    counted_starts=counted_starts,
    nbest=nbest,
  )
  return dataclasses.replace(
    found, margin=jnp.minimum(found.margin, encoded.margin)
  )


def _step_margin(
  layers: Sequence[dict[str, moe.MoeStats]], tokens: Int[Array, 'B N']
) -> Float[Array, 'B N']:
  """Smallest router margin of each hypothesis at one step."""
  margin = jnp.full(tokens.shape, jnp.inf, jnp.float32)
  for layer in layers:
    for stats in layer.values():
      margin = jnp.minimum(margin, stats.margin.astype(jnp.float32))
  return margin
