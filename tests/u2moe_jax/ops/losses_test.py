"""Label smoothing in closed form, and as the reference has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from u2moe_jax.ops import losses

_RNG = np.random.default_rng(0)
_LOG_PROBS = jax.nn.log_softmax(
  jnp.asarray(_RNG.normal(size=(3, 4, 6)), jnp.float32)
)
_TARGETS = jnp.asarray(_RNG.integers(0, 6, (3, 4)))
_MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.5])
def test_closed_form(smoothing):
  expected = np.zeros(3)
  for b, u in zip(*np.nonzero(np.asarray(_MASK)), strict=True):
    q = np.full(6, smoothing / 5)
    q[_TARGETS[b, u]] = 1 - smoothing
    log_q = np.log(np.where(q > 0, q, 1.0))
    expected[b] += np.sum(q * (log_q - np.asarray(_LOG_PROBS[b, u])))
  actual = losses.label_smoothed_kl(
    _LOG_PROBS, _TARGETS, _MASK, smoothing=smoothing
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_without_smoothing_it_is_the_cross_entropy():
  actual = losses.label_smoothed_kl(
    _LOG_PROBS, _TARGETS, jnp.ones_like(_MASK), smoothing=0.0
  )
  picked = np.take_along_axis(
    np.asarray(_LOG_PROBS), np.asarray(_TARGETS)[..., None], -1
  )
  np.testing.assert_allclose(actual, -picked.sum(axis=(1, 2)), rtol=1e-5)


def test_it_vanishes_at_the_smoothed_target_and_nowhere_else():
  q = jnp.full((1, 1, 6), 0.02).at[0, 0, 2].set(0.9)
  arguments = {'smoothing': 0.1}
  target, mask = jnp.array([[2]]), jnp.ones((1, 1), bool)
  loss = losses.label_smoothed_kl(jnp.log(q), target, mask, **arguments)
  np.testing.assert_allclose(loss, 0.0, atol=1e-6)
  other = losses.label_smoothed_kl(
    jnp.log(jnp.roll(q, 1, -1)), target, mask, **arguments
  )
  assert float(other[0]) > 1.0


def test_masked_targets_have_no_part():
  wild = jnp.where(_MASK, _TARGETS, -1)
  for smoothing in (0.0, 0.1):
    np.testing.assert_array_equal(
      *(
        losses.label_smoothed_kl(
          _LOG_PROBS, targets, _MASK, smoothing=smoothing
        )
        for targets in (_TARGETS, wild)
      )
    )
  gradient = jax.grad(
    lambda x: jnp.sum(losses.label_smoothed_kl(x, wild, _MASK, smoothing=0.1))
  )(_LOG_PROBS)
  assert not np.asarray(gradient)[~np.asarray(_MASK)].any()


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_reference_values(smoothing):
  arrays, results = golden.units()
  targets = jnp.asarray(arrays['ls_target'])
  mask = targets >= 0
  log_probs = jax.nn.log_softmax(jnp.asarray(arrays['ls_logits']))
  total = jnp.sum(
    losses.label_smoothed_kl(log_probs, targets, mask, smoothing=smoothing)
  )
  expected = results['label_smoothing']
  per_utterance = expected[f'smooth{smoothing}_normlenFalse']
  assert float(total) / len(targets) == pytest.approx(per_utterance, rel=1e-5)
  per_token = expected[f'smooth{smoothing}_normlenTrue']
  assert float(total / jnp.sum(mask)) == pytest.approx(per_token, rel=1e-5)


def test_correct_labels_are_counted_where_they_are_real():
  best = jnp.argmax(_LOG_PROBS, axis=-1)
  wrong = best.at[0, 0].add(1)
  assert losses.count_correct(_LOG_PROBS, best, _MASK) == 6
  assert losses.count_correct(_LOG_PROBS, wrong, _MASK) == 5
