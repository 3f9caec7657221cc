"""Losses as weighted sums; the division happens once, in the objective."""

import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked


@typechecked
def label_smoothed_kl(
  log_probs: Float[Array, 'B U1 V'],
  targets: Int[Array, 'B U1'],
  target_mask: Bool[Array, 'B U1'],
  *,
  smoothing: float,
) -> Float[Array, 'B']:
  """KL divergence from smoothed targets, summed per utterance.

  The target distribution q has 1 - smoothing on the label and
  smoothing / (V - 1) on every other token (Szegedy et al., arXiv 1512.00567);
  the loss is sum q (log q - log p), which is smaller than the cross-entropy
  by the entropy of q.

  Args:
    log_probs: log-probabilities, float32.
    targets: labels; values at masked positions are ignored.
    target_mask: True at real labels.
    smoothing: mass moved off the label, in [0, 1).

  Returns:
    One loss per utterance.
  """
  vocab_size = log_probs.shape[-1]
  off = smoothing / (vocab_size - 1)
  on = 1.0 - smoothing
  # q has only two values, so the label's and all tokens' log-probs are enough:
  # no target of the size [B, U1, V] is made. Padding may be -1, no index.
  safe_targets = jnp.where(target_mask, targets, 0)
  label = jnp.take_along_axis(log_probs, safe_targets[..., None], axis=-1)
  label = label[..., 0]  # [B, U1]
  others = jnp.sum(log_probs, axis=-1) - label
  cross_entropy = -(on * label + off * others)
  # A constant without a gradient: with it the best possible loss is 0.
  entropy = -(_xlogx(on) + (vocab_size - 1) * _xlogx(off))
  return jnp.sum(jnp.where(target_mask, cross_entropy - entropy, 0.0), axis=-1)


def _xlogx(x: float) -> Array:
  # 0 at 0, which is what a smoothing of 0 needs.
  return jax.scipy.special.xlogy(x, x)


@typechecked
def count_correct(
  log_probs: Float[Array, 'B U1 V'],
  targets: Int[Array, 'B U1'],
  target_mask: Bool[Array, 'B U1'],
) -> Int[Array, '']:
  """Counts the real labels that are their position's arg-max."""
  correct = jnp.argmax(log_probs, axis=-1) == targets
  return jnp.sum(correct & target_mask)
