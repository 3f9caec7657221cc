"""The jitted programs of decoding: encode, search, rescore.

Each is compiled once per padded shape; settings that only change numbers
(chunk size, left chunks) are traced, those that change the program are static.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

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
from u2moe_jax.decoding import prefix_tree
from u2moe_jax.decoding import rescoring
from u2moe_jax.layers import moe
from u2moe_jax.models import decoder as decoder_lib
from u2moe_jax.models import u2
from u2moe_jax.ops import sequences


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
def silence(
  encoded: Encoded, *, blank_id: int
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
  """Probability of the blank, and frames where another token is the best."""
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
  max_lengths, counted_starts = jnp.sum(mask, axis=1), 0
  if reference_limits:
    max_lengths = jnp.full((batch,), num_frames, jnp.int32)
    counted_starts = int(model.config.sos != model.config.eos)
  decoder = u2.make_decoder(
    model.config, model.config.decoder.num_blocks, unrolled=True
  )
  variables = {'params': decoder_lib.unstack(params['forward_decoder'])}

  def step(inputs, cache):
    logits, cache, stats = decoder.apply(
      variables, inputs, cache, mask, method='step'
    )
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


def search_rescoring(
  model: u2.U2MoeModel,
  params: PyTree,
  nbest: hypotheses.Hypotheses,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
  *,
  ctc_weight: float,
  reverse_weight: float,
  rooms: Sequence[int] | None = None,
) -> rescoring.Rescored:
  """Scores an n-best list by both decoders, and re-ranks it.

  A decoder is asked once for what hypotheses have in common, so its cost goes
  with the nodes of their prefix tree. (Not jitted as a whole: the number of
  nodes, rounded up by `node_sizes`, is the shape of what is.)

  Args:
    model: the recogniser.
    params: its parameters.
    nbest: the list.
    frames: encoder frames.
    mask: real frames.
    ctc_weight: see `rescoring.combine`.
    reverse_weight: the same; with 0 the right-to-left decoder is not run.
    rooms: the rooms for nodes there may be, ascending, for callers that want
      few shapes whatever comes: a list that fits into none of them is scored
      hypothesis by hypothesis. None: those of `node_sizes`.
  """
  counts = np.asarray(_count_nodes(nbest)).max(axis=1)  # [2]
  scores: list[Float[Array, 'B N U1'] | None] = [None, None]
  margin = nbest.margin
  for reverse in (False, True)[: 1 + (reverse_weight > 0)]:
    size = node_size(int(counts[int(reverse)]), rooms)
    if size is None:
      found = score_rows(model, params, nbest, frames, mask, reverse=reverse)
    else:
      tree = _build_tree(
        nbest, sos_id=model.config.sos, reverse=reverse, num_nodes=size
      )
      scored = score_tree(model, params, tree, frames, mask, reverse=reverse)
      found = _read_tree(nbest, scored, reverse=reverse)
    scores[int(reverse)], margin = found[0], _least(margin, found[1])
  return _combine(
    dataclasses.replace(nbest, margin=margin),
    *scores,
    ctc_weight=ctc_weight,
    reverse_weight=reverse_weight,
  )


def node_sizes() -> Iterator[int]:
  """The rooms for nodes there are: multiples of 64, then two an octave."""
  size = 64
  while True:
    yield size
    size += max(64, 1 << (size.bit_length() - 2))


def node_size(count: int, rooms: Sequence[int] | None = None) -> int | None:
  """The least room for `count` nodes, of `node_sizes` or of some; or None."""
  sizes = node_sizes() if rooms is None else rooms
  return next((size for size in sizes if size >= count), None)


@struct.dataclass
class TreeScores:
  """What a decoder says of a prefix tree.

  Attributes:
    nodes: log-prob of each node's token after its parent.
    ends: log-prob of the end after each node.
    margin: smallest router margin of each utterance.
  """

  nodes: Float[Array, 'B nodes']
  ends: Float[Array, 'B nodes']
  margin: Float[Array, 'B']


def _in_order(
  nbest: hypotheses.Hypotheses, *, reverse: bool
) -> Int[Array, 'B N U']:
  """The tokens as a decoder reads them."""
  if not reverse:
    return nbest.tokens
  turn = jax.vmap(sequences.reverse_by_length)
  return turn(nbest.tokens, nbest.lengths)


@jax.jit
def _count_nodes(nbest: hypotheses.Hypotheses) -> Int[Array, '2 B']:
  """Nodes of the trees of both directions."""
  return jnp.stack(
    [
      prefix_tree.prefix_nodes(
        _in_order(nbest, reverse=reverse), nbest.lengths
      )[2]
      for reverse in (False, True)
    ]
  )


@functools.partial(jax.jit, static_argnames=('sos_id', 'reverse', 'num_nodes'))
def _build_tree(
  nbest: hypotheses.Hypotheses, *, sos_id: int, reverse: bool, num_nodes: int
) -> prefix_tree.PrefixTree:
  return prefix_tree.build(
    _in_order(nbest, reverse=reverse),
    nbest.lengths,
    sos_id=sos_id,
    num_nodes=num_nodes,
  )


@functools.partial(jax.jit, static_argnums=0, static_argnames='reverse')
def score_tree(
  model: u2.U2MoeModel,
  params: PyTree,
  tree: prefix_tree.PrefixTree,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
  *,
  reverse: bool,
) -> TreeScores:
  """Scores every node of a prefix tree by one decoder."""
  inputs = u2.DecoderInputs(
    tokens=tree.tokens,
    mask=tree.mask,
    positions=tree.positions,
    attention_mask=tree.precedes_mask,
  )
  method = 'decode_backward' if reverse else 'decode_forward'
  scores = model.apply({'params': params}, inputs, frames, mask, method=method)
  logits = scores.logits  # [B, nodes, V]
  total = jax.nn.logsumexp(logits, axis=-1)
  rows = jnp.arange(frames.shape[0])[:, None]
  of_parent = logits[rows, tree.parents, tree.tokens]
  return TreeScores(
    nodes=of_parent - jnp.take_along_axis(total, tree.parents, axis=1),
    ends=logits[..., model.config.eos] - total,
    margin=router_margin(scores.moe, rows=frames.shape[0]),
  )


_least = jax.jit(jnp.minimum)


@functools.partial(jax.jit, static_argnames='reverse')
def _read_tree(
  nbest: hypotheses.Hypotheses, scored: TreeScores, *, reverse: bool
) -> tuple[Float[Array, 'B N U1'], Float[Array, 'B']]:
  """What a tree says of the hypotheses, as `score_nbest` returns it."""
  tokens = _in_order(nbest, reverse=reverse)
  scores = prefix_tree.read(scored.nodes, scored.ends, tokens, nbest.lengths)
  return scores, scored.margin


@functools.partial(jax.jit, static_argnames=('ctc_weight', 'reverse_weight'))
def _combine(
  nbest: hypotheses.Hypotheses,
  forward: Float[Array, 'B N U1'],
  backward: Float[Array, 'B N U1'] | None,
  *,
  ctc_weight: float,
  reverse_weight: float,
) -> rescoring.Rescored:
  """Re-ranks by the scores of the tokens."""
  return rescoring.combine(
    nbest,
    forward,
    backward,
    ctc_weight=ctc_weight,
    reverse_weight=reverse_weight,
  )


@functools.partial(jax.jit, static_argnums=0, static_argnames='reverse')
def score_rows(
  model: u2.U2MoeModel,
  params: PyTree,
  nbest: hypotheses.Hypotheses,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
  *,
  reverse: bool,
) -> tuple[Float[Array, 'B N U1'], Float[Array, 'B']]:
  """`score_nbest`, one hypothesis after the other: little memory, any list."""

  def score(hypothesis):
    tokens, lengths = hypothesis  # [B, U], [B]
    one = dataclasses.replace(
      nbest, tokens=tokens[:, None], lengths=lengths[:, None]
    )
    scores, margin = score_nbest(
      model, params, one, frames, mask, reverse=reverse
    )
    return scores[:, 0], margin

  by_rank = jnp.swapaxes(nbest.tokens, 0, 1), jnp.swapaxes(nbest.lengths, 0, 1)
  scores, margins = jax.lax.map(score, by_rank)
  return jnp.swapaxes(scores, 0, 1), margins.min(axis=0)


def score_nbest(
  model: u2.U2MoeModel,
  params: PyTree,
  nbest: hypotheses.Hypotheses,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
  *,
  reverse: bool,
) -> tuple[Float[Array, 'B N U1'], Float[Array, 'B']]:
  """Scores every token of an n-best list by one decoder, a row for each.

  `search_rescoring` gets the same from the prefix tree; this is the form to
  check it against.

  Args:
    model: the recogniser.
    params: its parameters.
    nbest: the list.
    frames: encoder frames.
    mask: real frames.
    reverse: by the right-to-left decoder; the scores stand in its order.

  Returns:
    Log-probs of the tokens and the end, as `rescoring.token_scores` gives
    them, and the smallest router margin of each utterance.
  """
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
  method = 'decode_backward' if reverse else 'decode_forward'
  scores = model.apply({'params': params}, rows, frames, mask, method=method)
  log_probs = jax.nn.log_softmax(scores.logits)
  log_probs = log_probs.reshape(*inputs.shape, -1)  # [B, N, U1, V]
  margin = router_margin(scores.moe, rows=frames.shape[0])
  return rescoring.token_scores(log_probs, targets), margin
