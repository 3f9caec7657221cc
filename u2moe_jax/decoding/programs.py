"""The jitted programs of decoding: encode, search, rescore.

Each is compiled once per padded shape; settings that only change numbers
(chunk size, left chunks) are traced, those that change the program are static.
"""

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
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import prefix_beam
from u2moe_jax.decoding import rescoring
from u2moe_jax.layers import moe
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
    margin = margin.reshape(rows, -1).astype(jnp.float32)
    result = jnp.minimum(result, jnp.min(margin, axis=1, initial=jnp.inf))
  return result


@functools.partial(jax.jit, static_argnames='blank_id')
def search_greedy(encoded: Encoded, *, blank_id: int) -> hypotheses.Hypotheses:
  """CTC best path."""
  found = greedy.ctc_greedy_search(
    encoded.log_probs, encoded.mask, blank_id=blank_id
  )
  return dataclasses.replace(
    found, margin=jnp.minimum(found.margin, encoded.margin)
  )


@functools.partial(jax.jit, static_argnames=('beam', 'blank_id'))
def search_prefixes(
  encoded: Encoded, *, beam: int, blank_id: int
) -> hypotheses.Hypotheses:
  """CTC prefix beam search."""
  found = prefix_beam.ctc_prefix_beam_search(
    encoded.log_probs, encoded.mask, beam=beam, blank_id=blank_id
  )
  return dataclasses.replace(
    found, margin=jnp.minimum(found.margin, encoded.margin)
  )


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=('beam', 'length_penalty')
)
def search_attention(
  model: u2.U2MoeModel,
  params: PyTree,
  encoded: Encoded,
  *,
  beam: int,
  length_penalty: float,
) -> hypotheses.Hypotheses:
  """Left-to-right beam search; at most one token per encoder frame."""
  frames, mask = encoded.frames, encoded.mask
  batch, num_frames = mask.shape
  variables = {'params': params}
  cache = model.apply(
    variables,
    frames,
    rows=batch * beam,
    capacity=num_frames,
    method='init_step_cache',
  )

  def step(tokens, position, rows_first):
    current = cache.replace(tokens=_swap_layers(rows_first))
    log_probs, new = model.apply(
      variables, tokens, position, current, mask, method='decode_step'
    )
    return log_probs, _swap_layers(new.tokens)

  found = attention_beam.attention_beam_search(
    step,
    _swap_layers(cache.tokens),
    batch=batch,
    beam=beam,
    sos_id=model.config.sos,
    eos_id=model.config.eos,
    max_lengths=jnp.sum(mask, axis=1),
    max_steps=num_frames,
    length_penalty=length_penalty,
  )
  return dataclasses.replace(
    found, margin=jnp.minimum(found.margin, encoded.margin)
  )


def _swap_layers(tree: PyTree) -> PyTree:
  """(L, R, ...) to (R, L, ...) and back: the search reorders rows."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=('ctc_weight', 'reverse_weight')
)
def search_rescoring(
  model: u2.U2MoeModel,
  params: PyTree,
  nbest: hypotheses.Hypotheses,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
  *,
  ctc_weight: float,
  reverse_weight: float,
) -> rescoring.Rescored:
  """Scores an n-best list by both decoders in one pass, and re-ranks it."""

  margins = [nbest.margin]

  def score(method: str, reverse: bool) -> jax.Array:
    inputs, targets = rescoring.decoder_inputs(
      nbest.tokens,
      nbest.lengths,
      sos_id=model.config.sos,
      eos_id=model.config.eos,
      reverse=reverse,
    )
    size = inputs.shape[-1]
    rows = u2.DecoderInputs(
      tokens=inputs.reshape(-1, size), mask=(targets >= 0).reshape(-1, size)
    )
    scores = model.apply({'params': params}, rows, frames, mask, method=method)
    margins.append(router_margin(scores.moe, rows=frames.shape[0]))
    log_probs = jax.nn.log_softmax(scores.logits)
    log_probs = log_probs.reshape(*inputs.shape, -1)  # [B, N, U1, V]
    return rescoring.token_scores(log_probs, targets)

  backward = None
  if reverse_weight > 0:
    backward = score('decode_backward', True)
  forward = score('decode_forward', False)
  return rescoring.combine(
    dataclasses.replace(nbest, margin=functools.reduce(jnp.minimum, margins)),
    forward,
    backward,
    ctc_weight=ctc_weight,
    reverse_weight=reverse_weight,
  )
