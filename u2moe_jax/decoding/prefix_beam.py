"""CTC prefix beam search: batched, fixed shapes, the same step in streaming.

A beam is a prefix: what an alignment reads after repeats are merged and blanks
dropped. For each prefix the search sums over its alignments, in two parts: those
that end in blank and those that end in the prefix's last token (Graves 2012;
Hannun et al., https://arxiv.org/abs/1408.2873). Beside the two sums go two
Viterbi scores, whose alignments give the token times.

Invariants:

  1. The live beams hold different prefixes, best first. Two extensions of
     different prefixes differ, so only one thing can coincide: the extension of
     a beam by one token, and a live beam. Then the extension's mass goes to that
     beam, and the extension is no candidate.
  2. Beam i is the parent of beam j if the hash of i equals the hash that j keeps
     of its prefix without the last token (64 bits in two uint32, and the lengths
     must fit). A prefix that was dropped and found again is recognised, which
     parent pointers cannot do. N * N pairs are compared at each frame: with 10
     beams and 500 frames one false match in about 4e14 utterances.
  3. Scores are kept relative to the best beam, which has 0; the sum of what was
     taken off is compensated. So the resolution of a comparison does not depend
     on the length of the utterance.
  4. Nothing in the state grows with the number of frames.
  5. With hotwords the beams are ordered by log-prob and bonus together. The
     bonus hangs on the prefix alone, so merging does not touch it, and the
     scores above stay pure log-probs (now relative to those of the first beam).
"""

import dataclasses
import functools
from typing import Literal

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import Shaped
from u2moe_jax.array_types import typechecked
from u2moe_jax.decoding import hotwords
from u2moe_jax.decoding import hypotheses

Alignment = Literal['reference', 'best']
Finalize = Literal['add', 'replace']

_NEVER = -jnp.inf  # log 0
# The two lanes of the prefix hash: a first value, and two odd multipliers.
# Digits of pi, and the primes of xxHash: multiplying by an odd number modulo
# 2^32 loses nothing.
_HASH_SEEDS = (0x243F6A88, 0x85A308D3)
_HASH_FACTORS = (0x9E3779B1, 0x85EBCA77)
_HASH_FINISHERS = (0xC2B2AE3D, 0x27D4EB2F)
# Rows a large vocabulary is folded into to find its best tokens quickly.
_ROWS = 8
# XLA:CPU runs a top-k on one core, and several side by side only where many are
# ready at once: 16 utterances take 25 ms in one, 33 in two, 15 in 16 parts.
_CPU_PARTS = 16
_CPU_PART_ROWS = 8


@struct.dataclass
class Beams:
  """What one frame reads and writes. A dead slot has both sums at -inf.

  Attributes:
    blank: log probability of the prefix, alignments that end in blank; like all
      scores here relative to the best beam.
    nonblank: the same for alignments that end in the last token.
    viterbi_blank: score of the best alignment that ends in blank.
    viterbi_nonblank: score of the best one that ends in the last token.
    last: last token, -1 for the empty prefix.
    lengths: tokens in the prefix.
    hashes: hash of the prefix, two lanes.
    parent_hashes: hash of the prefix without its last token.
    frames: frames seen so far.
    offset: log probability of the best beam.
    offset_error: what rounding has taken off `offset` (Kahan).
    margin: smallest gap, over frames, between the worst beam kept and the best
      candidate dropped; inf while nothing was dropped. (Which tokens of a frame
      are tried at all is not in it.)
    words: where the prefixes stand in the hotwords; None without any.
  """

  blank: Float[Array, 'B N']
  nonblank: Float[Array, 'B N']
  viterbi_blank: Float[Array, 'B N']
  viterbi_nonblank: Float[Array, 'B N']
  last: Int[Array, 'B N']
  lengths: Int[Array, 'B N']
  hashes: Shaped[Array, 'B N 2']
  parent_hashes: Shaped[Array, 'B N 2']
  frames: Int[Array, 'B']
  offset: Float[Array, 'B']
  offset_error: Float[Array, 'B']
  margin: Float[Array, 'B']
  words: hotwords.HotwordState | None = None


@struct.dataclass
class BeamState:
  """Everything the search knows; the same size whatever has been heard.

  Attributes:
    beams: the live beams, changed at every frame.
    tokens: the prefix behind each beam, padded with -1, brought up to date at
      the end of every `advance`. Twice: along the alignment that ends in blank
      and along the one that ends in the last token. A beam that has only one of
      the two has anything in the other's row.
    times: the encoder frames that go with `tokens`.
  """

  beams: Beams
  tokens: Int[Array, 'B N 2 U']
  times: Int[Array, 'B N 2 U']


@struct.dataclass
class _Events:
  """What one frame did, for the way back. Node 2 * n + k: beam n, ending k.

  Attributes:
    sources: the node each node came from.
    last: last token of each beam.
    lengths: length of each beam.
    valid: whether the frame counts.
  """

  sources: Int[Array, '*T nodes']
  last: Int[Array, '*T N']
  lengths: Int[Array, '*T N']
  valid: Bool[Array, '*T']


@struct.dataclass
class _Moves:
  """The ways out of N beams with the K tokens of one frame.

  Attributes:
    stay_blank: `Beams.blank` of a beam that keeps its prefix.
    stay_nonblank: `Beams.nonblank` of the same.
    stay_viterbi_blank: `Beams.viterbi_blank` of the same.
    stay_viterbi_nonblank: `Beams.viterbi_nonblank` of the same.
    stay_sources: where its two Viterbi alignments come from.
    extension: `Beams.nonblank` of beam n extended by token k.
    extension_viterbi: `Beams.viterbi_nonblank` of the same.
    extension_sources: where that Viterbi alignment comes from.
    words: where the extensions stand in the hotwords; None without any.
  """

  stay_blank: Float[Array, 'N']
  stay_nonblank: Float[Array, 'N']
  stay_viterbi_blank: Float[Array, 'N']
  stay_viterbi_nonblank: Float[Array, 'N']
  stay_sources: Int[Array, 'N 2']
  extension: Float[Array, 'N K']
  extension_viterbi: Float[Array, 'N K']
  extension_sources: Int[Array, 'N K']
  words: hotwords.HotwordState | None = None


def init_state(
  batch: int, *, beam: int, max_tokens: int, with_hotwords: bool = False
) -> BeamState:
  """Returns the state before the first frame: one beam, the empty prefix.

  Args:
    batch: number of utterances.
    beam: hypotheses kept; also the tokens tried at each frame.
    max_tokens: longest prefix. A beam that long is not extended any more.
    with_hotwords: whether `advance` will be given a graph.
  """
  # Types are given in full: a weak type would be another type to a caller's
  # jit than that of the state after the first chunk.
  full = lambda shape, value, dtype: jnp.full((batch, *shape), value, dtype)
  # The other slots are dead: N live copies of the empty prefix would all be
  # extended alike, against invariant 1.
  first = jnp.where(jnp.arange(beam) == 0, 0.0, _NEVER).astype(jnp.float32)
  scores = jnp.tile(first, (batch, 1))  # [B, N]
  beams = Beams(
    blank=scores,
    nonblank=full((beam,), _NEVER, jnp.float32),
    viterbi_blank=scores,
    viterbi_nonblank=scores,
    last=full((beam,), -1, jnp.int32),
    lengths=full((beam,), 0, jnp.int32),
    hashes=jnp.tile(jnp.array(_HASH_SEEDS, jnp.uint32), (batch, beam, 1)),
    parent_hashes=full((beam, 2), 0, jnp.uint32),
    frames=full((), 0, jnp.int32),
    offset=full((), 0.0, jnp.float32),
    offset_error=full((), 0.0, jnp.float32),
    margin=full((), jnp.inf, jnp.float32),
    words=hotwords.init_state(batch, beam) if with_hotwords else None,
  )
  empty = full((beam, 2, max_tokens), -1, jnp.int32)
  return BeamState(beams=beams, tokens=empty, times=empty)


@typechecked
def step(
  state: BeamState,
  log_probs: Float[Array, 'B V'],
  valid: Bool[Array, 'B'],
  *,
  blank_id: int,
  alignment: Alignment = 'best',
  graph: hotwords.HotwordGraph | None = None,
) -> BeamState:
  """Takes one frame; a row with `valid` False stays as it is."""
  return advance(
    state,
    log_probs[:, None],
    valid[:, None],
    blank_id=blank_id,
    alignment=alignment,
    graph=graph,
  )  # [B, 1, V]


@typechecked
def advance(
  state: BeamState,
  log_probs: Float[Array, 'B T V'],
  mask: Bool[Array, 'B T'],
  *,
  blank_id: int,
  alignment: Alignment = 'best',
  graph: hotwords.HotwordGraph | None = None,
) -> BeamState:
  """Takes some frames: a whole utterance, or the next chunk of a stream.

  Cutting an utterance into chunks changes nothing. Each frame is pruned to its
  `beam` best tokens, blank included; a blank outside of them is not expanded.

  Args:
    state: the state so far.
    log_probs: CTC log-probs of the new frames.
    mask: which of them count; the others change nothing.
    blank_id: id of the blank.
    alignment: whose times are kept: those of the best alignment, or those the
      reference reports, which now and then belong to a slightly worse one.
    graph: hotwords, if the state was made with them.

  Returns:
    The state after the frames.
  """
  if (graph is None) != (state.beams.words is None):
    raise ValueError('a state made with hotwords needs them at every step')
  if log_probs.shape[1] == 0:
    return state
  beam = state.tokens.shape[1]
  # Pruned here, for all frames at once: inside the scan it would be one small
  # top-k after the other. Float32, since a beam adds up hundreds of frames.
  values, ids = _top_tokens(log_probs.astype(jnp.float32), beam)
  run = lambda *row: _advance_row(
    *row, blank_id=blank_id, alignment=alignment, graph=graph
  )
  # The search is written for one utterance, so it cannot mix up the rows.
  return jax.vmap(run)(state, values, ids, mask)


@typechecked
def finish(
  state: BeamState,
  *,
  graph: hotwords.HotwordGraph | None = None,
  finalize: Finalize = 'add',
) -> hypotheses.Hypotheses:
  """Reads the n-best list off a state, which can still go on.

  Scores are log-probs of the prefixes, summed over their alignments. With
  hotwords, a score includes the bonus of the completed ones; what is on loan
  for one under way is given back first, and the list is sorted by the result.
  So attention rescoring weighs the bonus as it weighs CTC (`ctc_weight`).
  Times are the last frame of each token's run in the best alignment. The margin
  includes the gap between the first and the second hypothesis.

  Args:
    state: the search so far.
    graph: its hotwords.
    finalize: `replace` reproduces the reference, where giving back replaces
      the whole bonus instead of being added to it, and the order stays.
  """
  beams = state.beams
  relative = jnp.logaddexp(beams.blank, beams.nonblank)
  # Two alignments are kept for each prefix; the better one tells the times.
  ends_in_blank = beams.viterbi_blank > beams.viterbi_nonblank
  choose = lambda history: jnp.where(
    ends_in_blank[..., None], history[:, :, 0], history[:, :, 1]
  )
  tokens, times, lengths = (
    choose(state.tokens),
    choose(state.times),
    beams.lengths,
  )
  if graph is not None:
    relative = relative + _final_bonus(beams, graph, finalize)
  if graph is not None and finalize == 'add':
    # Stable: equals keep their order, as everywhere in the search.
    order = jnp.argsort(relative, axis=1, descending=True, stable=True)
    relative, lengths = _take_last(relative, order), _take_last(lengths, order)
    tokens, times = (
      jnp.take_along_axis(history, order[..., None], axis=1)
      for history in (tokens, times)
    )
  alive = relative > _NEVER
  # Slices and not indices: of one beam the gap has no column, and its min is
  # the initial inf. The where keeps -inf - -inf, a NaN, out.
  gap = jnp.where(alive[:, :1], relative[:, :1] - relative[:, 1:2], jnp.inf)
  return hypotheses.Hypotheses(
    tokens=jnp.where(alive[..., None], tokens, -1),
    lengths=jnp.where(alive, lengths, 0),
    scores=relative + (beams.offset - beams.offset_error)[:, None],
    times=jnp.where(alive[..., None], times, -1),
    margin=jnp.minimum(beams.margin, gap.min(axis=1, initial=jnp.inf)),
  )


def _final_bonus(
  beams: Beams, graph: hotwords.HotwordGraph, finalize: Finalize
) -> Float[Array, 'B N']:
  """What the hotwords add to the log-probs of a search that ends."""
  assert beams.words is not None
  kept = beams.words.bonus if finalize == 'add' else 0.0
  return kept - hotwords.on_loan(graph, beams.words)


@typechecked
def ctc_prefix_beam_search(
  log_probs: Float[Array, 'B T V'],
  mask: Bool[Array, 'B T'],
  *,
  beam: int,
  blank_id: int,
  max_tokens: int | None = None,
  alignment: Alignment = 'best',
  graph: hotwords.HotwordGraph | None = None,
  finalize: Finalize = 'add',
) -> hypotheses.Hypotheses:
  """Finds the most probable prefixes of whole utterances.

  Args:
    log_probs: CTC log-probs.
    mask: which frames count.
    beam: hypotheses kept; also the tokens tried at each frame. It may be larger
      than the vocabulary.
    blank_id: id of the blank.
    max_tokens: longest result; None for no limit.
    alignment: as in `advance`.
    graph: hotwords; None for none.
    finalize: as in `finish`.

  Returns:
    Hypotheses with N = beam, as `finish` describes them.
  """
  batch, num_frames, _ = log_probs.shape
  limit = num_frames if max_tokens is None else max_tokens
  state = init_state(
    batch, beam=beam, max_tokens=limit, with_hotwords=graph is not None
  )
  state = advance(
    state,
    log_probs,
    mask,
    blank_id=blank_id,
    alignment=alignment,
    graph=graph,
  )
  return finish(state, graph=graph, finalize=finalize)


def _top_tokens(
  log_probs: Float[Array, 'B T V'], count: int
) -> tuple[Float[Array, 'B T K'], Int[Array, 'B T K']]:
  """The best tokens of each frame, descending, the lower id first in a tie.

  A large vocabulary is cut into R strided columns of `_ROWS` tokens. The best
  `count` tokens lie in the `count` columns with the largest maxima, so only
  those are looked at closely. (Tokens that tie for the last place in different
  columns: either may get it.)
  """
  vocabulary = log_probs.shape[-1]
  count = min(count, vocabulary)
  # The cheap maxima have to spare most of the top-k to be worth their gathers.
  columns = vocabulary // _ROWS
  if columns < 8 * count:
    return _top_k(log_probs, count)
  rows = [
    log_probs[..., row * columns : (row + 1) * columns] for row in range(_ROWS)
  ]
  maxima = lax.optimization_barrier(
    functools.reduce(jnp.maximum, rows)
  )  # [B, T, R]
  best = jnp.sort(_top_k(maxima, count)[1])  # [B, T, K], so ids ascend below
  starts = columns * jnp.arange(_ROWS)[None, None, :, None]
  inside = (starts + best[:, :, None]).reshape(
    *best.shape[:2], -1
  )  # [B, T, _ROWS * K]
  rest = jnp.arange(_ROWS * columns, vocabulary)  # what no column holds
  rest = jnp.broadcast_to(rest[None, None], (*best.shape[:2], rest.size))
  ids = jnp.concatenate([inside, rest], axis=-1)  # [B, T, ids]
  values, places = _top_k(_take_last(log_probs, ids), count)
  return values, _take_last(ids, places)


def _top_k(
  array: Float[Array, 'B T size'], count: int
) -> tuple[Float[Array, 'B T K'], Int[Array, 'B T K']]:
  """`lax.top_k`, on all cores where it has many rows."""
  rows = array.reshape(-1, array.shape[-1])  # [B * T, size]
  size = -(-len(rows) // _CPU_PARTS)
  if jax.default_backend() != 'cpu' or size < _CPU_PART_ROWS:
    return lax.top_k(array, count)
  parts = [
    lax.top_k(rows[start : start + size], count)
    for start in range(0, len(rows), size)
  ]
  # The barrier keeps what follows out of them, as in `_choose`.
  values, ids = zip(*lax.optimization_barrier(parts), strict=True)
  shape = (*array.shape[:-1], count)
  return (
    jnp.concatenate(values).reshape(shape),
    jnp.concatenate(ids).reshape(shape),
  )


def _take_last(
  array: Shaped[Array, '*batch size'], places: Int[Array, '*batch count']
) -> Shaped[Array, '*batch count']:
  """Reads the last axis at given places, which must exist."""
  return jnp.take_along_axis(array, places, axis=-1, mode='promise_in_bounds')


def _advance_row(
  state: BeamState,
  values: Float[Array, 'T K'],
  ids: Int[Array, 'T K'],
  mask: Bool[Array, 'T'],
  *,
  blank_id: int,
  alignment: Alignment,
  graph: hotwords.HotwordGraph | None,
) -> BeamState:
  """`advance` for one utterance and pruned frames."""
  max_tokens = state.tokens.shape[-1]
  # They depend on the tokens alone, so they are looked up outside of the scan.
  columns = None if graph is None else graph.columns[ids]  # [T, K]

  def body(
    beams: Beams, frame: tuple[Array, Array, Array | None, Array]
  ) -> tuple[Beams, _Events]:
    return _step_row(
      beams,
      *frame,
      blank_id=blank_id,
      max_tokens=max_tokens,
      alignment=alignment,
      graph=graph,
    )

  beams, events = lax.scan(body, state.beams, (values, ids, columns, mask))
  tokens, times = _trace(state, events)
  return BeamState(beams=beams, tokens=tokens, times=times)


def _step_row(
  beams: Beams,
  values: Float[Array, 'K'],
  ids: Int[Array, 'K'],
  columns: Int[Array, 'K'] | None,
  valid: Bool[Array, ''],
  *,
  blank_id: int,
  max_tokens: int,
  alignment: Alignment,
  graph: hotwords.HotwordGraph | None,
) -> tuple[Beams, _Events]:
  """One frame of one utterance: expand, choose, keep if the frame counts."""
  moves = _expand(
    beams,
    values,
    ids,
    blank_id=blank_id,
    max_tokens=max_tokens,
    alignment=alignment,
  )
  if graph is not None:
    assert beams.words is not None
    assert columns is not None
    words = hotwords.extend(graph, beams.words, columns)
    moves = dataclasses.replace(moves, words=words)
  chosen, sources = _choose(beams, moves, ids)
  # Padding is computed and thrown away: a branch would be computed both ways
  # under vmap anyway.
  kept = jax.tree.map(
    lambda new, old: jnp.where(valid, new, old), chosen, beams
  )
  events = _Events(
    sources=jnp.where(valid, sources, jnp.arange(sources.size)),  # from itself
    last=kept.last,
    lengths=kept.lengths,
    valid=valid,
  )
  return kept, events


def _expand(
  beams: Beams,
  values: Float[Array, 'K'],
  ids: Int[Array, 'K'],
  *,
  blank_id: int,
  max_tokens: int,
  alignment: Alignment,
) -> _Moves:
  """Scores all ways to go on, with what coincides merged."""
  count = beams.last.size
  total = jnp.logaddexp(beams.blank, beams.nonblank)
  viterbi = jnp.maximum(beams.viterbi_blank, beams.viterbi_nonblank)
  ends_in_blank = beams.viterbi_blank > beams.viterbi_nonblank
  # Ends in blank: even node; ends in its last token: odd node.
  nodes = 2 * jnp.arange(count)
  best_nodes = jnp.where(ends_in_blank, nodes, nodes + 1)

  is_last = beams.last[:, None] == ids[None]  # [N, K]
  is_blank = ids == blank_id  # [K]
  # -inf where the frame's best tokens lack the blank, or the last token.
  blank_value = jnp.where(is_blank, values, _NEVER).max()
  repeat_value = jnp.where(is_last, values[None], _NEVER).max(axis=1)  # [N]

  # A token that repeats the last one extends only what ended in blank.
  extension = values[None] + jnp.where(
    is_last, beams.blank[:, None], total[:, None]
  )
  extension_viterbi = values[None] + jnp.where(
    is_last, beams.viterbi_blank[:, None], viterbi[:, None]
  )

  # What a beam's parent, if it is a beam too, hands to it.
  parent = _parents(beams)
  has_parent = parent >= 0
  # Without a parent these read some other beam; `has_parent` masks it.
  of_parent = lambda field: field.at[parent].get(mode='clip')
  # Prefix `aa` comes from `a` only through a blank, `ab` from any end of `a`.
  repeats_parent = of_parent(beams.last) == beams.last
  hand = lambda repeat, other: jnp.where(
    repeats_parent, of_parent(repeat), of_parent(other)
  )
  handed = jnp.where(has_parent, hand(beams.blank, total), _NEVER)
  handed_viterbi = jnp.where(
    has_parent, hand(beams.viterbi_blank, viterbi), _NEVER
  )

  # A merged extension has handed its mass to a beam (invariant 1): as a
  # candidate too it would be counted twice.
  is_open = (~is_blank)[None] & (beams.lengths < max_tokens)[:, None]
  is_open &= ~_is_merged(parent, is_last)
  # The better way into the last token: another frame of it, or from the parent.
  repeats = beams.viterbi_nonblank > handed_viterbi
  if alignment == 'reference':
    # It visits the beams in order. Once the parent has set the times, a repeat
    # that is better still raises the score but leaves the times alone.
    repeats &= (parent > jnp.arange(count)) | (handed_viterbi == _NEVER)
  return _Moves(
    stay_blank=total + blank_value,
    stay_nonblank=jnp.logaddexp(beams.nonblank, handed) + repeat_value,
    stay_viterbi_blank=viterbi + blank_value,
    stay_viterbi_nonblank=jnp.maximum(beams.viterbi_nonblank, handed_viterbi)
    + repeat_value,
    stay_sources=jnp.stack(
      [best_nodes, jnp.where(repeats, nodes + 1, hand(nodes, best_nodes))],
      axis=1,
    ),
    extension=jnp.where(is_open, extension, _NEVER),
    extension_viterbi=extension_viterbi,
    extension_sources=jnp.where(is_last, nodes[:, None], best_nodes[:, None]),
  )


def _parents(beams: Beams) -> Int[Array, 'N']:
  """For each beam the beam that is its prefix without the last token, or -1."""
  count = beams.last.size
  matches = beams.lengths[:, None] + 1 == beams.lengths[None]  # [parent, child]
  # Dead slots keep their old hashes.
  alive = jnp.maximum(beams.blank, beams.nonblank) > _NEVER
  matches &= alive[:, None] & alive[None]
  for lane in range(2):
    hashes, parents = beams.hashes[:, lane], beams.parent_hashes[:, lane]
    matches &= hashes[:, None] == parents[None]
  # Live prefixes differ, so there is one match at most, which max picks out.
  return jnp.where(matches, jnp.arange(count)[:, None], -1).max(axis=0)


def _is_merged(
  parent: Int[Array, 'N'], is_last: Bool[Array, 'N K']
) -> Bool[Array, 'N K']:
  """Marks the extensions [beam, token] that are themselves beams."""
  count, num_tokens = is_last.shape
  slot = jnp.argmax(is_last, axis=1)
  found = (parent >= 0) & is_last.any(axis=1)
  # Cell (parent, token) of a flat [N, K]; the first cell behind it is dropped.
  cells = jnp.where(found, parent * num_tokens + slot, count * num_tokens)
  merged = (
    jnp.zeros((count * num_tokens,), bool).at[cells].set(True, mode='drop')
  )
  return merged.reshape(count, num_tokens)  # [N, K]


def _choose(
  beams: Beams, moves: _Moves, ids: Int[Array, 'K']
) -> tuple[Beams, Int[Array, 'nodes']]:
  """Keeps the best candidates, and says which node each new node came from.

  In a tie staying goes before extending, then the better token, then the better
  beam.
  """
  count = beams.last.size
  staying = jnp.logaddexp(moves.stay_blank, moves.stay_nonblank)
  extension = moves.extension
  if beams.words is not None and moves.words is not None:
    staying = staying + beams.words.bonus
    extension = extension + moves.words.bonus
  # [N + K * N], extensions token by token: `top_k` takes the first of equals,
  # which gives the order of the docstring. `_gather` undoes this layout.
  candidates = jnp.concatenate([staying, extension.T.reshape(-1)])
  # Without the barrier XLA moves the slices below into the top-k, no longer
  # recognises it on CPU, and sorts everything: six times the whole step.
  scores, places = lax.optimization_barrier(lax.top_k(candidates, count + 1))
  # One more than fits was asked for: the gap to it tells how near the cut was.
  gap = jnp.where(scores[-1] > _NEVER, scores[-2] - scores[-1], jnp.inf)

  chosen, sources = _gather(beams, moves, ids, scores[:-1], places[:-1])
  best = scores[0]
  if chosen.words is not None:
    best = best - chosen.words.bonus[0]
  # Without a live beam there is nothing to take off; -inf - -inf would be NaN.
  shift = jnp.where(best > _NEVER, best, 0.0)
  # Viterbi scores are only compared with each other, so what is taken off them
  # is not added up in `offset`.
  viterbi_best = jnp.maximum(
    chosen.viterbi_blank[0], chosen.viterbi_nonblank[0]
  )
  viterbi_shift = jnp.where(viterbi_best > _NEVER, viterbi_best, 0.0)
  offset, offset_error = _add(beams.offset, beams.offset_error, shift)
  chosen = dataclasses.replace(
    chosen,
    blank=chosen.blank - shift,
    nonblank=chosen.nonblank - shift,
    viterbi_blank=chosen.viterbi_blank - viterbi_shift,
    viterbi_nonblank=chosen.viterbi_nonblank - viterbi_shift,
    frames=beams.frames + 1,
    offset=offset,
    offset_error=offset_error,
    margin=jnp.minimum(beams.margin, gap),
  )
  return chosen, sources


def _gather(
  beams: Beams,
  moves: _Moves,
  ids: Int[Array, 'K'],
  scores: Float[Array, 'N'],
  places: Int[Array, 'N'],
) -> tuple[Beams, Int[Array, 'nodes']]:
  """Makes the new beams from their places in `_choose`'s list of candidates."""
  count = beams.last.size
  # Place n < N: beam n stays. Place N + k * N + n: beam n and token k.
  stays = places < count
  beam = places % count  # of the old beams
  slot = jnp.maximum(places // count - 1, 0)  # of the frame's tokens
  cell = beam * ids.size + slot  # in a flat [N, K]
  words = beams.words
  old = lambda field: field.at[beam].get(mode='promise_in_bounds')
  new = lambda field: field.reshape(-1).at[cell].get(mode='promise_in_bounds')
  # (For a beam that stays, slot and cell are some valid place, not used.)
  last = jnp.where(
    stays, old(beams.last), ids.at[slot].get(mode='promise_in_bounds')
  )
  hashes = old(beams.hashes)
  extended = _extend_hash(hashes, last)
  blank_sources, nonblank_sources = old(moves.stay_sources).T  # [N], [N]
  nonblank_sources = jnp.where(
    stays, nonblank_sources, new(moves.extension_sources)
  )
  # Without hotwords the score of a candidate is its log-prob, at hand already.
  extended_score = scores
  if words is not None:  # the scores have the bonus in them
    extended_score = new(moves.extension)
    words = jax.tree.map(
      lambda old_field, new_field: jnp.where(
        stays, old(old_field), new(new_field)
      ),
      words,
      moves.words,
    )
  chosen = dataclasses.replace(
    beams,
    # A new token was read in this very frame: no alignment ends in blank yet.
    blank=jnp.where(stays, old(moves.stay_blank), _NEVER),
    nonblank=jnp.where(stays, old(moves.stay_nonblank), extended_score),
    words=words,
    viterbi_blank=jnp.where(stays, old(moves.stay_viterbi_blank), _NEVER),
    viterbi_nonblank=jnp.where(
      stays, old(moves.stay_viterbi_nonblank), new(moves.extension_viterbi)
    ),
    last=last,
    lengths=old(beams.lengths) + jnp.where(stays, 0, 1),
    hashes=jnp.where(stays[:, None], hashes, extended),
    # The hash that was extended is by definition that of the parent.
    parent_hashes=jnp.where(stays[:, None], old(beams.parent_hashes), hashes),
  )
  return chosen, jnp.stack([blank_sources, nonblank_sources], axis=1).reshape(
    -1
  )


def _extend_hash(
  hashes: Shaped[Array, 'N 2'], tokens: Int[Array, 'N']
) -> Shaped[Array, 'N 2']:
  """Hashes of the prefixes with one token more; each lane mixes by itself."""
  # Multiply, then fold the high bits down, as hash finishers do: a product
  # alone never carries a difference to lower bits.
  factors = jnp.array([_HASH_FACTORS], jnp.uint32)
  finishers = jnp.array([_HASH_FINISHERS], jnp.uint32)
  mixed = (hashes + tokens[:, None].astype(jnp.uint32) + 1) * factors
  mixed = (mixed ^ (mixed >> 15)) * finishers
  return mixed ^ (mixed >> 13)


def _add(
  total: Float[Array, ''], error: Float[Array, ''], value: Float[Array, '']
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Adds with Kahan's compensation: thousands of terms, no loss of digits."""
  corrected = value - error
  new_total = total + corrected
  return new_total, (new_total - total) - corrected


def _trace(
  state: BeamState, events: _Events
) -> tuple[Int[Array, 'N 2 U'], Int[Array, 'N 2 U']]:
  """Follows every node back to the start of the chunk, and writes its history.

  A node that ends in its token writes that token and the frame at the place the
  token has in the prefix. Later frames overwrite earlier ones, which makes the
  time of a token the last frame of its run.
  """
  beam, _, max_tokens = state.tokens.shape

  def back(
    nodes: Int[Array, 'nodes'], sources: Int[Array, 'nodes']
  ) -> tuple[Int[Array, 'nodes'], Int[Array, 'nodes']]:
    return sources.at[nodes].get(mode='promise_in_bounds'), nodes

  # From the last frame to the first: path[t] are the nodes after frame t, and
  # start those before the chunk, whose rows hold what was read earlier.
  start, path = lax.scan(
    back, jnp.arange(2 * beam), events.sources, reverse=True
  )  # [nodes], [T, nodes]
  read = lambda field: _take_last(field, path // 2)
  writes = (path % 2 == 1) & events.valid[:, None]
  place = read(events.lengths) - 1
  # Frames that write nothing go to a place behind the row.
  place = jnp.where(writes & (place >= 0), place, max_tokens)  # dropped
  frame = state.beams.frames + jnp.cumsum(events.valid) - 1  # [T]
  frame = jnp.broadcast_to(frame[:, None], path.shape)  # [T, nodes]
  nodes = jnp.broadcast_to(jnp.arange(2 * beam)[None], path.shape)  # [T, nodes]

  def write(
    history: Int[Array, 'N 2 U'], news: Int[Array, 'T nodes']
  ) -> Int[Array, 'N 2 U']:
    rows = history.reshape(2 * beam, max_tokens).at[start].get()
    # A place is written by every frame of its run, and a scatter sets its
    # duplicates in no known order; max does not care. (The token is the same
    # each time, and frames ascend.)
    rows = rows.at[nodes, place].max(news, mode='drop')
    return rows.reshape(history.shape)

  return write(state.tokens, read(events.last)), write(state.times, frame)
