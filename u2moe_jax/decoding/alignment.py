"""Token times: CTC forced alignment, and the span a peak is given."""

from collections.abc import Sequence
import itertools

from flax import struct
from jax import lax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.ops import ctc

_NEVER = -jnp.inf  # log 0


@struct.dataclass
class Alignment:
  """The most probable way to read some labels off the frames.

  Attributes:
    starts: first frame of each label's run; -1 for padding, and everywhere if
      the labels cannot be aligned.
    ends: the frame behind its last one, likewise.
    peaks: its most probable frame, likewise.
    confidence: its probability there; 0 for padding.
    score: log-prob of the alignment; -inf if there is none.
    feasible: whether the frames suffice for the labels.
  """

  starts: Int[Array, 'B U']
  ends: Int[Array, 'B U']
  peaks: Int[Array, 'B U']
  confidence: Float[Array, 'B U']
  score: Float[Array, 'B']
  feasible: Bool[Array, 'B']


@typechecked
def align(
  log_probs: Float[Array, 'B T V'],
  mask: Bool[Array, 'B T'],
  labels: Int[Array, 'B U'],
  label_mask: Bool[Array, 'B U'],
  *,
  blank_id: int,
) -> Alignment:
  """Aligns labels with frames by the Viterbi algorithm.

  The states are those of CTC (Graves et al. 2006, section 4.1): the labels,
  and a blank before, between and behind them. Among equally probable ways the
  one that moved on first is taken.

  Args:
    log_probs: CTC log-probs.
    mask: which frames count; valid ones first.
    labels: label ids, without blanks; U is at least 1.
    label_mask: which labels count; valid ones first.
    blank_id: id of the blank.

  Returns:
    The alignment of every utterance; it hangs on no other.
  """
  states = _states(labels, label_mask, blank_id=blank_id)  # [B, S]
  can_skip = _can_skip(states, blank_id=blank_id)
  log_probs = log_probs.astype(jnp.float32)

  # Only the step is kept for each frame, an integer: the way is found backward.
  def forward(
    scores: Float[Array, 'B S'], frame: tuple[Array, Array]
  ) -> tuple[Float[Array, 'B S'], Int[Array, 'B S']]:
    values, valid = frame
    emission = jnp.take_along_axis(values, states, axis=1)  # [B, S]
    best, moves = _best_way(scores, can_skip)
    scores = jnp.where(valid[:, None], best + emission, scores)
    return scores, jnp.where(valid[:, None], moves, 0)

  # Before the first frame stands a state in front of all, from which the first
  # blank and the first label can be reached.
  first = jnp.where(jnp.arange(states.shape[1])[None] == 0, 0.0, _NEVER)
  first = jnp.broadcast_to(first, states.shape).astype(jnp.float32)
  frames = jnp.swapaxes(log_probs, 0, 1), mask.T  # [T, B, V], [T, B]
  scores, moves = lax.scan(forward, first, frames)  # moves [T, B, S]

  last = 2 * label_mask.sum(axis=1)  # the blank behind the last label
  ends = jnp.stack([last, jnp.maximum(last - 1, 0)], axis=1)  # [B, 2]
  values = jnp.take_along_axis(scores, ends, axis=1)  # [B, 2]
  # A path may end in the last label or in the blank behind it.
  state = jnp.where(values[:, 0] >= values[:, 1], ends[:, 0], ends[:, 1])

  def backward(
    state: Int[Array, 'B'], moves: Int[Array, 'B S']
  ) -> tuple[Int[Array, 'B'], Int[Array, 'B']]:
    moved = jnp.take_along_axis(moves, state[:, None], axis=1)[:, 0]  # [B]
    return state - moved, state

  _, path = lax.scan(backward, state, moves, reverse=True)  # [T, B]
  feasible = ctc.is_feasible(labels, label_mask, mask.sum(axis=1))
  score = jnp.where(feasible, values.max(axis=1), _NEVER)
  return _read(path.T, log_probs, mask, labels, label_mask, feasible, score)


def _states(
  labels: Int[Array, 'B U'], label_mask: Bool[Array, 'B U'], *, blank_id: int
) -> Int[Array, 'B S']:
  """Blank, label, blank, ..., label, blank."""
  # Padding becomes blanks behind the end; the path ends before them.
  labels = jnp.where(label_mask, labels, blank_id)
  blanks = jnp.full_like(labels, blank_id)
  pairs = jnp.stack([blanks, labels], axis=2).reshape(
    len(labels), -1
  )  # [B, 2 U]
  return jnp.pad(pairs, ((0, 0), (0, 1)), constant_values=blank_id)  # [B, S]


def _can_skip(
  states: Int[Array, 'B S'], *, blank_id: int
) -> Bool[Array, 'B S']:
  """Where the blank in front may be left out: between different labels."""
  # Two states back stands the label before; equal labels need their blank, or
  # they would read as one.
  before = jnp.pad(states, ((0, 0), (2, 0)), constant_values=-1)[:, :-2]
  return (states != blank_id) & (states != before)


def _best_way(
  scores: Float[Array, 'B S'], can_skip: Bool[Array, 'B S']
) -> tuple[Float[Array, 'B S'], Int[Array, 'B S']]:
  """The best state to come from: its score, and how many states back it is."""
  shift = lambda by: jnp.pad(scores, ((0, 0), (by, 0)), constant_values=_NEVER)[
    :, : scores.shape[1]
  ]
  ways = jnp.stack(
    [scores, shift(1), jnp.where(can_skip, shift(2), _NEVER)], axis=-1
  )
  # argmax takes the first of equals: to stay, that is to have moved on before.
  return ways.max(axis=-1), jnp.argmax(ways, axis=-1).astype(jnp.int32)


def _read(
  path: Int[Array, 'B T'],
  log_probs: Float[Array, 'B T V'],
  mask: Bool[Array, 'B T'],
  labels: Int[Array, 'B U'],
  label_mask: Bool[Array, 'B U'],
  feasible: Bool[Array, 'B'],
  score: Float[Array, 'B'],
) -> Alignment:
  """Turns a path of states into the spans of the labels."""
  batch, num_frames = mask.shape
  count = labels.shape[1]
  kept = label_mask & feasible[:, None]
  # Blanks, padding and what cannot be aligned fall off the end.
  place = jnp.where((path % 2 == 1) & mask, path // 2, count)  # [B, T]
  rows = jnp.arange(batch)[:, None]
  frames = jnp.broadcast_to(jnp.arange(num_frames)[None], place.shape)  # [B, T]
  gather = lambda start: jnp.full((batch, count), start, jnp.int32)
  # min and max over the run of each label; odd states are labels.
  starts = gather(num_frames).at[rows, place].min(frames, mode='drop')
  ends = gather(0).at[rows, place].max(frames + 1, mode='drop')

  # (Frames of blanks read some label here; their place drops the result.)
  ids = jnp.take_along_axis(
    labels, jnp.minimum(place, max(count - 1, 0)), axis=1, mode='clip'
  )
  values = jnp.take_along_axis(
    log_probs, jnp.maximum(ids, 0)[..., None], axis=2
  )[..., 0]  # [B, T]: of the label that the path reads there
  best = (
    jnp.full((batch, count), _NEVER).at[rows, place].max(values, mode='drop')
  )
  is_peak = values == jnp.take_along_axis(
    best, jnp.minimum(place, max(count - 1, 0)), axis=1, mode='clip'
  )
  # Of equally probable frames the first.
  peaks = (
    gather(num_frames)
    .at[rows, jnp.where(is_peak, place, count)]
    .min(frames, mode='drop')
  )
  keep = lambda field: jnp.where(kept, field, -1)
  return Alignment(
    starts=keep(starts),
    ends=keep(ends),
    peaks=keep(peaks),
    confidence=jnp.where(kept, jnp.exp(best), 0.0),
    score=score,
    feasible=feasible,
  )


def token_spans(
  peaks: Sequence[int],
  *,
  num_frames: int,
  frame_seconds: float,
  max_seconds: float = 1.0,
) -> list[tuple[float, float]]:
  """Gives each token the time around its peak.

  Neighbours meet in the middle between their peaks, the first starts at 0 and
  the last ends with the utterance; but none reaches further than half of
  `max_seconds` from its peak.

  Args:
    peaks: encoder frame of each token, ascending.
    num_frames: encoder frames of the utterance.
    frame_seconds: seconds per encoder frame.
    max_seconds: longest span.

  Returns:
    (start, end) of each token in seconds.
  """
  middles = [(a + b) / 2 for a, b in itertools.pairwise(peaks)]
  edges = [0, *middles, num_frames]
  reach = max_seconds / 2
  return [
    (
      max(left * frame_seconds, peak * frame_seconds - reach),
      min(right * frame_seconds, peak * frame_seconds + reach),
    )
    for peak, (left, right) in zip(peaks, itertools.pairwise(edges))
  ]
