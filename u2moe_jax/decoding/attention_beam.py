"""Beam search on a left-to-right decoder, whatever its cache is made of.

The cache is written at every step and never moved: what a step writes for
hypothesis `n` stays at place `n` of that position. When hypotheses change
places, only a table of small integers follows them, which says at which place
the ancestor of each stood at each position. (To move the keys and values of a
decoder instead costs many times the decoder itself.)
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
from jax import lax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.decoding import hypotheses
from u2moe_jax.models import decoder

_PADDING = -1
# The room for tokens grows by this factor. A step costs in proportion to the
# room, a program is compiled for each size.
_GROWTH = 4
_LEAST_ROOM = 16


@struct.dataclass
class StepOutputs:
  """What a decoder says.

  Attributes:
    log_probs: of the next token.
    cache: the cache with the newest tokens in it.
    margin: smallest gap a decision inside the decoder hung on; inf if there
      was none.
  """

  log_probs: Float[Array, 'B N V']
  cache: Any
  margin: Float[Array, 'B N']


StepFunction = Callable[[decoder.StepInputs, Any], StepOutputs]
# (cache, tokens to make room for) -> larger cache
GrowFunction = Callable[[Any, int], Any]


@struct.dataclass
class SearchState:
  """The live hypotheses, best first.

  Attributes:
    position: tokens tried so far.
    tokens: what was found, eos included, padded with -1.
    scores: sum of log-probs; -inf for an empty slot.
    finished: whether a hypothesis has ended.
    margin: smallest gap between the worst kept and the best dropped candidate,
      or inside the decoder.
    ancestry: see `decoder.StepInputs`.
    cache: of the decoder.
  """

  position: Int[Array, '']
  tokens: Int[Array, 'B N U']
  scores: Float[Array, 'B N']
  finished: Bool[Array, 'B N']
  margin: Float[Array, 'B']
  ancestry: Int[Array, 'B N U']
  cache: Any


@typechecked
def attention_beam_search(
  step_fn: StepFunction,
  grow_fn: GrowFunction,
  init_cache: Any,
  *,
  batch: int,
  beam: int,
  sos_id: int,
  eos_id: int,
  max_lengths: Int[Array, 'B'],
  max_steps: int,
  length_penalty: float | Float[Array, ''] = 0.0,
  counted_starts: int = 0,
  nbest: int | None = None,
) -> hypotheses.Hypotheses:
  """Finds the most probable token sequences under a decoder.

  At every step each hypothesis offers its `beam` best continuations, and the
  best `beam` of all are kept. A finished one only goes on as eos, at no cost.
  An utterance stops when all its hypotheses have ended, or at its own maximum
  length, so its result depends on nothing else in the batch. (The reference
  runs until the batch stops: give it the padded length for all.) Scores only
  fall, so without a length penalty it may stop as soon as the hypotheses that
  are wanted stand in front of all that have not ended.

  Args:
    step_fn: scores what may follow, and writes the cache.
    grow_fn: makes room in a cache; what is in it stays.
    init_cache: a cache with room for no token.
    batch: number of utterances.
    beam: hypotheses kept.
    sos_id: id every hypothesis starts from.
    eos_id: id that ends one; it may be `sos_id`.
    max_lengths: most tokens of each utterance. One that is cut there has no eos.
    max_steps: static limit on steps; at least the largest `max_lengths`.
    length_penalty: the final order is by score / length ** length_penalty,
      the length without eos. With a penalty above 0 an empty result is last.
    counted_starts: added to the length that penalises. (The reference counts
      its sos as a token, 1, unless that is the eos.)
    nbest: hypotheses that are wanted; None for all.

  Returns:
    Hypotheses with N = beam and no times; behind the first `nbest` there may
    be some that have not ended. The margin includes the final gap between
    first and second.
  """
  limits = jnp.minimum(max_lengths, max_steps)
  # A penalty can raise what is behind above what has ended, so then nobody may
  # stop early. It is traced, so this is a where and no branch.
  wanted = jnp.where(
    jnp.asarray(length_penalty) == 0, beam if nbest is None else nbest, beam
  )
  state = _init_state(init_cache, batch, beam=beam, max_steps=max_steps)

  # One loop for each size of the cache: texts are mostly much shorter than
  # their limit, and each step reads the whole cache.
  for room in _rooms(max_steps):

    def is_running(state: SearchState, room: int = room) -> Bool[Array, '']:
      running = _running(state, limits, wanted)
      return running.any() & (state.position < room)

    def body(state: SearchState, room: int = room) -> SearchState:
      running = _running(state, limits, wanted)
      return _step(
        step_fn, state, running, room=room, sos_id=sos_id, eos_id=eos_id
      )

    cache = grow_fn(state.cache, room)
    state = dataclasses.replace(state, cache=cache)
    state = lax.while_loop(is_running, body, state)
  return _finish(
    state,
    eos_id=eos_id,
    length_penalty=length_penalty,
    counted_starts=counted_starts,
  )


def _rooms(max_steps: int) -> list[int]:
  """Sizes of the cache, ascending; the last one is `max_steps`."""
  rooms = [max_steps] if max_steps else []
  while rooms and rooms[0] > _GROWTH * _LEAST_ROOM:
    rooms.insert(0, -(-rooms[0] // _GROWTH))
  return rooms


def _init_state(
  cache: Any, batch: int, *, beam: int, max_steps: int
) -> SearchState:
  """One empty hypothesis for each utterance."""
  # One live hypothesis: N equal ones would find the same N continuations each.
  scores = jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf)
  scores = scores.astype(jnp.float32)
  return SearchState(
    position=jnp.zeros((), jnp.int32),
    tokens=jnp.full((batch, beam, max_steps), _PADDING, jnp.int32),
    scores=jnp.tile(scores, (batch, 1)),  # [B, N]
    finished=jnp.zeros((batch, beam), bool),
    margin=jnp.full((batch,), jnp.inf, jnp.float32),
    ancestry=jnp.full((batch, beam, max_steps), -1, jnp.int32),
    cache=cache,
  )


def _open(state: SearchState) -> Bool[Array, 'B N']:
  return ~state.finished & (state.scores > -jnp.inf)


def _running(
  state: SearchState, limits: Int[Array, 'B'], wanted: Int[Array, '']
) -> Bool[Array, 'B']:
  """Which utterances still have something wanted to extend."""
  is_wanted = jnp.arange(state.scores.shape[1]) < wanted
  is_open = (_open(state) & is_wanted[None]).any(axis=1)
  return is_open & (state.position < limits)


def _step(
  step_fn: StepFunction,
  state: SearchState,
  running: Bool[Array, 'B'],
  *,
  room: int,
  sos_id: int,
  eos_id: int,
) -> SearchState:
  """Extends every hypothesis by one token and keeps the best."""
  batch, beam, _ = state.tokens.shape
  running = running[:, None]  # [B, 1]
  places = jnp.broadcast_to(jnp.arange(beam)[None], (batch, beam))  # [B, N]
  # What this step writes for a hypothesis goes to its own place; only then do
  # hypotheses change places.
  ancestry = lax.dynamic_update_index_in_dim(
    state.ancestry, places, state.position, axis=2
  )
  previous = lax.dynamic_index_in_dim(  # [B, N]
    state.tokens, jnp.maximum(state.position - 1, 0), axis=2, keepdims=False
  )
  previous = jnp.where(state.position == 0, sos_id, previous)
  # Any valid token does: the result is thrown away below.
  previous = jnp.where(previous == _PADDING, eos_id, previous)  # not running
  inputs = decoder.StepInputs(
    tokens=previous,
    position=state.position,
    ancestry=ancestry[..., :room],
    live=_open(state) & running,
  )
  said = step_fn(inputs, state.cache)

  scores, parents, tokens, gap = _choose(state, said.log_probs, eos_id=eos_id)
  # An utterance that has stopped keeps its hypotheses where they are.
  parents = jnp.where(running, parents, places)
  take = lambda field: jnp.take_along_axis(field, parents, axis=1)  # [B, N]
  follow = lambda field: jnp.take_along_axis(
    field, parents[..., None], axis=1
  )  # [B, N, U]
  history = lax.dynamic_update_index_in_dim(
    follow(state.tokens),
    jnp.where(running, tokens, _PADDING),
    state.position,
    axis=2,
  )
  # A router's choice for a dead hypothesis decides nothing.
  inside = jnp.where(inputs.live, said.margin, jnp.inf).min(axis=1)
  gap = jnp.minimum(gap, inside)
  ended = take(state.finished) | (running & (tokens == eos_id))
  return SearchState(
    position=state.position + 1,
    tokens=history,
    scores=jnp.where(running, scores, state.scores),
    finished=ended,
    margin=jnp.where(
      running[:, 0], jnp.minimum(state.margin, gap), state.margin
    ),
    ancestry=follow(ancestry),
    cache=said.cache,
  )


def _choose(
  state: SearchState, log_probs: Float[Array, 'B N V'], *, eos_id: int
) -> tuple[
  Float[Array, 'B N'], Int[Array, 'B N'], Int[Array, 'B N'], Float[Array, 'B']
]:
  """Best N of the candidates: scores, parents, tokens, gap to the next one.

  Each hypothesis offers N + 1 tokens where N would do, for the gap's sake.
  """
  batch, beam, vocabulary = log_probs.shape
  offers = min(beam + 1, vocabulary)
  values, tokens = lax.top_k(log_probs.astype(jnp.float32), offers)
  # A finished hypothesis offers itself once, at the price of nothing.
  closing = jnp.where(jnp.arange(offers) == 0, 0.0, -jnp.inf)[None, None]
  finished = state.finished[..., None]  # [B, N, 1]
  values = jnp.where(finished, closing, values)
  tokens = jnp.where(finished, eos_id, tokens)
  candidates = (state.scores[..., None] + values).reshape(
    batch, -1
  )  # [B, N * offers]
  missing = max(beam + 1 - beam * offers, 0)  # a vocabulary of one
  candidates = jnp.pad(
    candidates, ((0, 0), (0, missing)), constant_values=-jnp.inf
  )
  scores, places = lax.top_k(candidates, beam + 1)
  dropped = scores[:, beam]
  gap = jnp.where(dropped > -jnp.inf, scores[:, beam - 1] - dropped, jnp.inf)
  scores, places = scores[:, :beam], places[:, :beam]
  chosen = jnp.take_along_axis(tokens.reshape(batch, -1), places, axis=1)
  return scores, places // offers, chosen, gap


def _finish(
  state: SearchState,
  *,
  eos_id: int,
  length_penalty: float | Float[Array, ''],
  counted_starts: int,
) -> hypotheses.Hypotheses:
  """Applies the length penalty and puts the best first."""
  is_token = (state.tokens != eos_id) & (state.tokens != _PADDING)
  lengths = is_token.sum(axis=2)
  valid = state.scores > -jnp.inf
  counted = lengths + counted_starts
  power = jnp.asarray(length_penalty, jnp.float32)
  penalised = state.scores / jnp.maximum(counted, 1) ** power
  # The limits of dividing by 0 ** power; without a penalty the score stays.
  empty = jnp.where(power > 0, -jnp.inf, jnp.where(power < 0, 0.0, penalised))
  scores = jnp.where(counted > 0, penalised, empty)
  scores = jnp.where(valid, scores, -jnp.inf)
  order = jnp.argsort(scores, axis=1, descending=True, stable=True)
  take = lambda field: jnp.take_along_axis(field, order, axis=1)
  scores = take(scores)
  tokens = jnp.where(is_token & valid[..., None], state.tokens, _PADDING)
  tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)  # [B, N, U]
  # Slices, so that a beam of one has no gap and its min is inf.
  gap = jnp.where(
    scores[:, :1] > -jnp.inf, scores[:, :1] - scores[:, 1:2], jnp.inf
  )
  return hypotheses.Hypotheses(
    tokens=tokens,
    lengths=take(jnp.where(valid, lengths, 0)),
    scores=scores,
    times=jnp.full_like(tokens, _PADDING),
    margin=jnp.minimum(state.margin, gap.min(axis=1, initial=jnp.inf)),
  )
