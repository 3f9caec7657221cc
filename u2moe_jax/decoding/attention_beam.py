"""Beam search on a left-to-right decoder, whatever its cache is made of."""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.decoding import hypotheses

# (tokens (B * N,), position, cache) -> (log-probs (B * N, V), cache)
StepFunction = Callable[[Array, Array, Any], tuple[Array, Any]]

_PADDING = -1


@struct.dataclass
class SearchState:
  """The live hypotheses, best first.

  Attributes:
    position: tokens tried so far.
    tokens: what was found, eos included, padded with -1.
    scores: sum of log-probs; -inf for an empty slot.
    finished: whether a hypothesis has ended.
    margin: smallest gap between the worst kept and the best dropped candidate.
    cache: of the decoder; leading axis B * N.
  """

  position: Int[Array, '']
  tokens: Int[Array, 'B N U']
  scores: Float[Array, 'B N']
  finished: Bool[Array, 'B N']
  margin: Float[Array, 'B']
  cache: Any


@typechecked
def attention_beam_search(
  step_fn: StepFunction,
  init_cache: Any,
  *,
  batch: int,
  beam: int,
  sos_id: int,
  eos_id: int,
  max_lengths: Int[Array, 'B'],
  max_steps: int,
  length_penalty: float = 0.0,
) -> hypotheses.Hypotheses:
  """Finds the most probable token sequences under a decoder.

  At every step each hypothesis offers its `beam` best continuations, and the
  best `beam` of all are kept. A finished one only goes on as eos, at no cost.
  An utterance stops when all its hypotheses have ended, or at its own maximum
  length, so its result depends on nothing else in the batch. (The reference
  runs until the batch stops: give it the padded length for all.)

  Args:
    step_fn: takes the last token of each hypothesis (B * N,), its position and
      a cache; returns log-probs (B * N, V) and the new cache.
    init_cache: a tree whose leaves have a leading axis B * N, utterance major.
    batch: number of utterances.
    beam: hypotheses kept.
    sos_id: id every hypothesis starts from.
    eos_id: id that ends one; it may be `sos_id`.
    max_lengths: most tokens of each utterance. One that is cut there has no eos.
    max_steps: static limit on steps; at least the largest `max_lengths`.
    length_penalty: the final order is by score / length ** length_penalty,
      the length without eos. With a penalty above 0 an empty result is last.

  Returns:
    Hypotheses with N = beam and no times. The margin includes the final gap
    between first and second.
  """
  limits = jnp.minimum(max_lengths, max_steps)
  state = _init_state(init_cache, batch, beam=beam, max_steps=max_steps)

  def is_running(state):
    return _running(state, limits).any()

  def body(state):
    return _step(step_fn, state, limits, sos_id=sos_id, eos_id=eos_id)

  state = lax.while_loop(is_running, body, state)
  return _finish(state, eos_id=eos_id, length_penalty=length_penalty)


def _init_state(
  cache: Any, batch: int, *, beam: int, max_steps: int
) -> SearchState:
  """One empty hypothesis for each utterance."""
  scores = jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf)
  scores = scores.astype(jnp.float32)
  return SearchState(
    position=jnp.zeros((), jnp.int32),
    tokens=jnp.full((batch, beam, max_steps), _PADDING, jnp.int32),
    scores=jnp.tile(scores, (batch, 1)),
    finished=jnp.zeros((batch, beam), bool),
    margin=jnp.full((batch,), jnp.inf, jnp.float32),
    cache=cache,
  )


def _running(state: SearchState, limits: Int[Array, 'B']) -> Bool[Array, 'B']:
  """Which utterances still have something to extend."""
  is_open = ~state.finished & (state.scores > -jnp.inf)
  return is_open.any(axis=1) & (state.position < limits)


def _step(
  step_fn: StepFunction,
  state: SearchState,
  limits: Int[Array, 'B'],
  *,
  sos_id: int,
  eos_id: int,
) -> SearchState:
  """Extends every hypothesis by one token and keeps the best."""
  batch, beam, _ = state.tokens.shape
  running = _running(state, limits)[:, None]  # [B, 1]
  previous = lax.dynamic_index_in_dim(
    state.tokens, jnp.maximum(state.position - 1, 0), axis=2, keepdims=False
  )
  previous = jnp.where(state.position == 0, sos_id, previous)
  previous = jnp.where(previous == _PADDING, eos_id, previous)  # not running
  log_probs, cache = step_fn(previous.reshape(-1), state.position, state.cache)
  log_probs = log_probs.reshape(batch, beam, -1)  # [B, N, V]

  scores, parents, tokens, gap = _choose(state, log_probs, eos_id=eos_id)
  parents = jnp.where(running, parents, jnp.arange(beam)[None])
  take = lambda field: jnp.take_along_axis(field, parents, axis=1)
  history = jnp.take_along_axis(state.tokens, parents[..., None], axis=1)
  history = lax.dynamic_update_index_in_dim(
    history, jnp.where(running, tokens, _PADDING), state.position, axis=2
  )
  rows = (beam * jnp.arange(batch)[:, None] + parents).reshape(-1)
  ended = take(state.finished) | (running & (tokens == eos_id))
  return SearchState(
    position=state.position + 1,
    tokens=history,
    scores=jnp.where(running, scores, state.scores),
    finished=ended,
    margin=jnp.where(
      running[:, 0], jnp.minimum(state.margin, gap), state.margin
    ),
    cache=jax.tree.map(lambda leaf: leaf[rows], cache),
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
  closing = jnp.where(jnp.arange(offers) == 0, 0.0, -jnp.inf)[None, None]
  finished = state.finished[..., None]
  values = jnp.where(finished, closing, values)
  tokens = jnp.where(finished, eos_id, tokens)
  candidates = (state.scores[..., None] + values).reshape(batch, -1)
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
  state: SearchState, *, eos_id: int, length_penalty: float
) -> hypotheses.Hypotheses:
  """Applies the length penalty and puts the best first."""
  is_token = (state.tokens != eos_id) & (state.tokens != _PADDING)
  lengths = is_token.sum(axis=2)
  valid = state.scores > -jnp.inf
  scores = state.scores
  if length_penalty != 0.0:
    penalised = scores / jnp.maximum(lengths, 1) ** length_penalty
    empty_score = -jnp.inf if length_penalty > 0.0 else 0.0
    scores = jnp.where(lengths > 0, penalised, empty_score)
  scores = jnp.where(valid, scores, -jnp.inf)
  order = jnp.argsort(scores, axis=1, descending=True, stable=True)
  take = lambda field: jnp.take_along_axis(field, order, axis=1)
  scores = take(scores)
  tokens = jnp.where(is_token & valid[..., None], state.tokens, _PADDING)
  tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
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
