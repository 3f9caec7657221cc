"""Forced alignment against every path there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.decoding import alignment

BLANK, FRAMES, TOKENS = 0, 5, 3

_align = jax.jit(alignment.align, static_argnames='blank_id')


def _log_probs(seed, batch=1, frames=FRAMES):
  logits = np.random.default_rng(seed).normal(size=(batch, frames, TOKENS))
  return jax.nn.log_softmax(jnp.asarray(2 * logits, jnp.float32))


def _run(log_probs, labels, length=FRAMES, size=3):
  padded = jnp.array([[*labels, *[-1] * (size - len(labels))]])
  mask = jnp.arange(log_probs.shape[1])[None] < length
  return _align(log_probs, mask, padded, padded >= 0, blank_id=BLANK)


def _collapse(path):
  return [k for k, _ in itertools.groupby(path) if k != BLANK]


def _best_path(log_probs, labels, length):
  """The best (score, path) of all paths that read as the labels."""
  values = np.asarray(log_probs[0])
  return max(
    (
      (sum(values[t, k] for t, k in enumerate(path)), path)
      for path in itertools.product(range(TOKENS), repeat=length)
      if _collapse(path) == labels
    ),
    default=(-np.inf, ()),
  )


@pytest.mark.parametrize('length', [0, 1, 4, FRAMES])
@pytest.mark.parametrize(
  'labels', [[], [1], [2, 1], [1, 1], [2, 2, 2], [1, 2, 1]]
)
def test_equals_the_best_of_all_paths(labels, length):
  for seed in range(5):
    log_probs = _log_probs(seed)
    found = _run(log_probs, labels, length)
    score, path = _best_path(log_probs, labels, length)
    assert bool(found.feasible[0]) == (score > -np.inf)
    if not path and length:
      assert found.score[0] == -np.inf
      assert (found.starts == -1).all()
      assert (found.peaks == -1).all()
      assert (found.confidence == 0).all()
      continue
    np.testing.assert_allclose(found.score[0], score, atol=1e-5)
    runs = [list(run) for k, run in _runs(path) if k != BLANK]
    for u, frames in enumerate(runs):
      values = np.asarray(log_probs[0, frames, labels[u]])
      assert found.starts[0, u] == frames[0]
      assert found.ends[0, u] == frames[-1] + 1
      assert found.peaks[0, u] == frames[int(values.argmax())]
      np.testing.assert_allclose(
        found.confidence[0, u], np.exp(values.max()), atol=1e-6
      )
    assert (found.starts[0, len(labels) :] == -1).all()


def _runs(path):
  """(token, its frames) of each run."""
  grouped = itertools.groupby(enumerate(path), key=lambda item: item[1])
  return [(token, [t for t, _ in items]) for token, items in grouped]


def test_padding_and_batch_mates_change_nothing():
  log_probs = _log_probs(7, batch=2)
  labels = jnp.array([[1, 2, -1, -1], [2, 1, 1, -1]])
  mask = jnp.arange(FRAMES)[None] < jnp.array([3, 5])[:, None]
  together = _align(log_probs, mask, labels, labels >= 0, blank_id=BLANK)
  wide = jnp.pad(log_probs, ((0, 0), (0, 4), (0, 0)), constant_values=5.0)
  padded = _align(
    wide, jnp.pad(mask, ((0, 0), (0, 4))), labels, labels >= 0, blank_id=BLANK
  )
  jax.tree.map(np.testing.assert_array_equal, together, padded)
  alone = _run(log_probs[:1, :3], [1, 2], 3, size=4)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[0], b[0]), together, alone
  )
  # A frame more is another utterance.
  longer = _align(
    log_probs, mask.at[0, 3].set(True), labels, labels >= 0, blank_id=BLANK
  )
  assert longer.score[0] != together.score[0]


def test_spans_meet_in_the_middle_and_end_within_reach():
  spans = alignment.token_spans(
    [1, 3, 40], num_frames=60, frame_seconds=0.04, max_seconds=0.8
  )
  expected = [(0.0, 0.08), (0.08, 0.52), (1.2, 2.0)]
  np.testing.assert_allclose(spans, expected, atol=1e-9)
  assert alignment.token_spans([], num_frames=5, frame_seconds=0.04) == []
