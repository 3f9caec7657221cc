"""Attention rescoring: an n-best list re-ranked by the attention decoders.

The score of a hypothesis is

  S = (1 - g) * L2R + g * R2L + a * CTC                                   (1)

with L2R and R2L the log-probs that the two decoders give to its tokens and the
end, CTC its score in the n-best list, g = `reverse_weight`, a = `ctc_weight`.
After a search with hotwords CTC is log-prob and bonus together: the list is
ordered by that, and a bonus stands for evidence as the log-prob does. (The
reference takes the bonus off before rescoring.)
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.decoding import hypotheses
from u2moe_jax.ops import sequences


@struct.dataclass
class Rescored:
  """A re-ranked n-best list; everything stands in the new order.

  Attributes:
    hypotheses: the list; scores are S of (1). Its margin is the smaller of the
      old one and `margin`.
    confidence: exp of the mean log-prob per token, end included, without CTC.
    token_confidence: probability of each token, the mean of both decoders if the
      right-to-left one has weight; padded with 0.
    l2r: log-prob of the left-to-right decoder.
    r2l: log-prob of the right-to-left decoder, 0 if it has no weight.
    ctc: score in the n-best list.
    margin: S of the first less S of the second; inf with only one.
  """

  hypotheses: hypotheses.Hypotheses
  confidence: Float[Array, 'B N']
  token_confidence: Float[Array, 'B N U']
  l2r: Float[Array, 'B N']
  r2l: Float[Array, 'B N']
  ctc: Float[Array, 'B N']
  margin: Float[Array, 'B']


@typechecked
def decoder_inputs(
  tokens: Int[Array, 'B N U'],
  lengths: Int[Array, 'B N'],
  *,
  sos_id: int,
  eos_id: int,
  reverse: bool = False,
) -> tuple[Int[Array, 'B N U1'], Int[Array, 'B N U1']]:
  """Makes what a decoder is fed, and asked, to score an n-best list.

  Args:
    tokens: token ids, padded with -1.
    lengths: tokens of each hypothesis.
    sos_id: id that starts the inputs.
    eos_id: id that ends the targets, and pads the inputs.
    reverse: for the right-to-left decoder.

  Returns:
    Inputs, padded with eos, and targets, padded with -1.
  """
  batch, nbest, size = tokens.shape
  # To rows of one text each, and back.
  rows, row_lengths = tokens.reshape(-1, size), lengths.reshape(-1)
  if reverse:
    rows = sequences.reverse_by_length(rows, row_lengths)
  pair = sequences.add_sos_eos(rows, row_lengths, sos=sos_id, eos=eos_id)
  inputs, targets = (part.reshape(batch, nbest, size + 1) for part in pair)
  return inputs, targets


@typechecked
def token_scores(
  log_probs: Float[Array, 'B N U1 V'], targets: Int[Array, 'B N U1']
) -> Float[Array, 'B N U1']:
  """Picks the log-prob of each target; 0 where the target is padding."""
  # Padding is -1, which would read the last token; it is set to 0 below.
  places = jnp.maximum(targets, 0)[..., None]  # [B, N, U1, 1]
  picked = jnp.take_along_axis(log_probs, places, axis=-1)[..., 0]  # [B, N, U1]
  return jnp.where(targets >= 0, picked, 0.0).astype(jnp.float32)


@typechecked
def attention_rescoring(
  nbest: hypotheses.Hypotheses,
  l2r_log_probs: Float[Array, 'B N U1 V'],
  r2l_log_probs: Float[Array, 'B N U1 V'] | None,
  *,
  eos_id: int,
  ctc_weight: float,
  reverse_weight: float,
) -> Rescored:
  """Re-ranks an n-best list by the log-probs of the attention decoders.

  Args:
    nbest: hypotheses with CTC scores.
    l2r_log_probs: left-to-right decoder, fed with `decoder_inputs`.
    r2l_log_probs: right-to-left decoder, fed with `decoder_inputs(...,
      reverse=True)`; None if `reverse_weight` is 0.
    eos_id: id of the end.
    ctc_weight: a of (1).
    reverse_weight: g of (1).

  Returns:
    The new order, its scores and confidences.
  """
  score = lambda log_probs, reverse: token_scores(
    log_probs,
    decoder_inputs(
      nbest.tokens,
      nbest.lengths,
      sos_id=eos_id,  # stands in the inputs only, which are not used here
      eos_id=eos_id,
      reverse=reverse,
    )[1],
  )
  return combine(
    nbest,
    score(l2r_log_probs, False),
    None if r2l_log_probs is None else score(r2l_log_probs, True),
    ctc_weight=ctc_weight,
    reverse_weight=reverse_weight,
  )


@typechecked
def combine(
  nbest: hypotheses.Hypotheses,
  l2r_token_scores: Float[Array, 'B N U1'],
  r2l_token_scores: Float[Array, 'B N U1'] | None,
  *,
  ctc_weight: float,
  reverse_weight: float,
) -> Rescored:
  """`attention_rescoring` from the scores of the tokens alone.

  Args:
    nbest: hypotheses with CTC scores.
    l2r_token_scores: as `token_scores` gives them: tokens, end, then 0.
    r2l_token_scores: the same for the reversed tokens; None if
      `reverse_weight` is 0.
    ctc_weight: a of (1).
    reverse_weight: g of (1).

  Returns:
    The new order, its scores and confidences. The first of equals stays first.
  """
  if reverse_weight == 0:
    r2l_token_scores = None
  elif r2l_token_scores is None:
    raise ValueError(
      f'reverse_weight is {reverse_weight}, but there are no scores of a '
      'right-to-left decoder; a model without one needs reverse_weight 0'
    )
  valid = nbest.scores > -jnp.inf
  l2r = l2r_token_scores.sum(axis=-1)
  probabilities = jnp.exp(l2r_token_scores[..., :-1])
  if r2l_token_scores is None:
    r2l = jnp.zeros_like(l2r)
  else:
    r2l = r2l_token_scores.sum(axis=-1)
    # Back to the order of the text; the end, the last column of each, has been
    # left out, as it is no token of the text.
    backward = _turn(jnp.exp(r2l_token_scores[..., :-1]), nbest.lengths)
    probabilities = (probabilities + backward) / 2
  attention = (1 - reverse_weight) * l2r + reverse_weight * r2l
  # 0 * -inf is NaN: an empty slot must not reach a product.
  ctc_part = ctc_weight * jnp.where(valid, nbest.scores, 0.0)
  scores = jnp.where(valid, attention + ctc_part, -jnp.inf)
  rescored = Rescored(
    hypotheses=dataclasses.replace(nbest, scores=scores),
    # The end counts as a token.
    confidence=jnp.exp(attention / (nbest.lengths + 1)),
    token_confidence=jnp.where(nbest.tokens >= 0, probabilities, 0.0),
    l2r=l2r,
    r2l=r2l,
    ctc=nbest.scores,
    margin=nbest.margin,
  )
  return _sort(rescored)


def _turn(
  values: Float[Array, 'B N U'], lengths: Int[Array, 'B N']
) -> Float[Array, 'B N U']:
  """Reverses each row within its own length."""
  # Behind the length anything may stand; it is masked by the tokens.
  size = values.shape[-1]
  places = lengths[..., None] - 1 - jnp.arange(size)[None, None]
  places = jnp.clip(places, 0, max(size - 1, 0))  # [B, N, U]
  return jnp.take_along_axis(values, places, axis=-1)


def _sort(rescored: Rescored) -> Rescored:
  """Puts the best first, and works out the margins."""
  nbest = rescored.hypotheses
  order = jnp.argsort(nbest.scores, axis=1, descending=True, stable=True)

  def reorder(field: Array) -> Array:
    if field.ndim == 1:  # one value for each utterance
      return field
    # Fields are [B, N] or [B, N, U]: axes of size 1 make the order fit.
    places = order.reshape(*order.shape, *(1,) * (field.ndim - 2))
    return jnp.take_along_axis(field, places, axis=1)

  rescored = jax.tree.map(reorder, rescored)
  # Slices, so that a list of one has no gap and its min is inf.
  scores = rescored.hypotheses.scores
  gap = jnp.where(
    scores[:, :1] > -jnp.inf, scores[:, :1] - scores[:, 1:2], jnp.inf
  ).min(axis=1, initial=jnp.inf)
  sorted_nbest = dataclasses.replace(
    rescored.hypotheses, margin=jnp.minimum(nbest.margin, gap)
  )
  return dataclasses.replace(rescored, hypotheses=sorted_nbest, margin=gap)
