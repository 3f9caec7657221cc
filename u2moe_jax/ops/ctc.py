"""CTC: the loss, which pairs it can align, and reading a frame-wise path."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked

_PADDING = -1


@typechecked
def collapse(
  ids: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  blank_id: int,
  time: Literal['last', 'first'] = 'last',
) -> tuple[Int[Array, 'B T'], Int[Array, 'B'], Int[Array, 'B T']]:
  """Merges repeats and drops blanks.

  Args:
    ids: one id for each frame.
    mask: which frames count; the others read as blank.
    blank_id: id of the blank.
    time: which frame of a token's run stands for it. The reference takes the
      last.

  Returns:
    Tokens, packed to the left and padded with -1; how many there are; and the
    frame of each, padded with -1.
  """
  ids = jnp.where(mask, ids, blank_id)
  num_frames = ids.shape[1]
  blank = jnp.full((ids.shape[0], 1), blank_id, ids.dtype)
  # Both have T frames; in front of the first and behind the last one is blank.
  before = jnp.concatenate([blank, ids], axis=1)[:, :num_frames]
  after = jnp.concatenate([ids, blank], axis=1)[:, 1:]
  neighbours = before if time == 'first' else after
  # Of a run of equal ids the frame at one end is kept. Equal tokens with a
  # blank between them are two runs, hence two tokens.
  kept = (ids != blank_id) & (ids != neighbours)  # [B, T]

  def pack(row_kept: Bool[Array, 'T'], row: Int[Array, 'T']) -> Array:
    # The shape is static: what is not kept goes to place T, which no row has,
    # and the scatter drops it there.
    places = jnp.where(row_kept, jnp.cumsum(row_kept) - 1, num_frames)
    packed = jnp.full((num_frames,), _PADDING, row.dtype)
    return packed.at[places].set(row, mode='drop')

  frames = jnp.broadcast_to(jnp.arange(num_frames)[None], ids.shape)
  pack_rows = jax.vmap(pack)
  return (
    pack_rows(kept, ids),
    kept.sum(axis=1),
    pack_rows(kept, frames),
  )


@typechecked
def is_feasible(
  labels: Int[Array, 'B U'],
  label_mask: Bool[Array, 'B U'],
  frame_lengths: Int[Array, 'B'],
) -> Bool[Array, 'B']:
  """Whether the labels fit: a frame each, and a blank between equal ones."""
  # Padding may hold the last label again; only a real one is a repeat.
  repeats = (labels[:, 1:] == labels[:, :-1]) & label_mask[:, 1:]
  needed = label_mask.sum(axis=1) + repeats.sum(axis=1)
  return needed <= frame_lengths


@typechecked
def ctc_loss(
  log_probs: Float[Array, 'B T V'],
  frame_mask: Bool[Array, 'B T'],
  labels: Int[Array, 'B U'],
  label_mask: Bool[Array, 'B U'],
  *,
  blank_id: int,
) -> Float[Array, 'B']:
  """Negative log probability of the labels, for each utterance.

  Args:
    log_probs: log-probs, or logits: they are normalised here, which changes
      nothing about log-probs. They must be finite where `frame_mask` is True.
    frame_mask: which frames count; valid ones first.
    labels: label ids, without blanks.
    label_mask: which labels count; valid ones first.
    blank_id: id of the blank.

  Returns:
    One loss of 0 or more for each utterance, in float32. Labels that cannot be
    aligned give exactly 0, and no gradient; so does an empty utterance.
  """
  batch, num_frames, _ = log_probs.shape
  # optax reads the state behind the last frame, and here there is none.
  if num_frames == 0:
    return jnp.zeros((batch,))
  feasible = is_feasible(labels, label_mask, frame_mask.sum(axis=1))
  if labels.shape[1] == 0:
    labels = jnp.zeros((batch, 1), labels.dtype)
    label_mask = jnp.zeros((batch, 1), bool)
  # Sums of thousands of terms: float32 whatever the model computes in. What is
  # masked must be finite too, because optax multiplies it by zero.
  logits = jnp.where(frame_mask[..., None], log_probs.astype(jnp.float32), 0.0)
  # optax marks padding with 1.0: the one place where a mask is turned round.
  losses = optax.ctc_loss(
    logits,
    1.0 - frame_mask.astype(jnp.float32),
    jnp.where(label_mask, labels, _PADDING),  # equal to no label beside it
    1.0 - label_mask.astype(jnp.float32),
    blank_id=blank_id,
  )
  # optax has e^-1e5 for probability 0, so labels that do not fit would cost
  # 1e5 and more. Rounding may take the loss of a certain model below 0.
  return jnp.where(feasible, jnp.maximum(losses, 0.0), 0.0)
