"""CTC best path: the most probable token of each frame."""

import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked
from u2moe_jax.decoding import hypotheses
from u2moe_jax.ops import ctc


@typechecked
def ctc_greedy_search(
  log_probs: Float[Array, 'B T V'],
  mask: Bool[Array, 'B T'],
  *,
  blank_id: int,
) -> hypotheses.Hypotheses:
  """Reads the most probable alignment of each utterance.

  Args:
    log_probs: CTC log-probs.
    mask: which frames count.
    blank_id: id of the blank.

  Returns:
    One hypothesis for each utterance (N = 1). Its score is the log probability
    of the best alignment, its times are the last frame of each token's run, and
    the margin is the smallest gap between first and second token of a frame.
  """
  ids = jnp.argmax(log_probs, axis=-1)  # [B, T]
  best = log_probs.max(axis=-1)
  # By place and not by value: two equal tokens have a gap of 0.
  is_best = jnp.arange(log_probs.shape[-1])[None, None] == ids[..., None]
  second = jnp.where(is_best, -jnp.inf, log_probs).max(axis=-1)  # [B, T]
  gaps = jnp.where(mask, best - second, jnp.inf)
  tokens, lengths, frames = ctc.collapse(ids, mask, blank_id=blank_id)
  return hypotheses.Hypotheses(
    tokens=tokens[:, None],
    lengths=lengths[:, None],
    scores=jnp.where(mask, best, 0.0).sum(axis=1)[:, None],
    times=frames[:, None],
    margin=gaps.min(axis=1, initial=jnp.inf),
  )
