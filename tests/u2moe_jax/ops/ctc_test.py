import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import ctc as reference
from u2moe_jax.ops import ctc

_loss = jax.jit(ctc.ctc_loss, static_argnames='blank_id')
_collapse = jax.jit(ctc.collapse, static_argnames=('blank_id', 'time'))


def _random_log_probs(shape, seed=0):
  logits = np.random.default_rng(seed).normal(size=shape)
  return jax.nn.log_softmax(jnp.array(logits, jnp.float32))


def _mask(lengths, size):
  return jnp.arange(size)[None] < jnp.array(lengths)[:, None]


@settings(max_examples=60, deadline=None)
@given(
  paths=st.lists(
    st.lists(st.integers(0, 3), max_size=7), min_size=3, max_size=3
  ),
  blank_id=st.sampled_from([0, 2]),
)
def test_collapse_equals_grouping(paths, blank_id):
  ids = np.full((3, 7), 3)
  for row, path in enumerate(paths):
    ids[row, : len(path)] = path
  mask = _mask([len(path) for path in paths], 7)
  for time in ('first', 'last'):
    tokens, lengths, frames = _collapse(
      jnp.array(ids), mask, blank_id=blank_id, time=time
    )
    for row, path in enumerate(paths):
      expected, first, last = reference.collapse(path, blank_id=blank_id)
      padding = [-1] * (7 - len(expected))
      times = first if time == 'first' else last
      assert lengths[row] == len(expected)
      assert tokens[row].tolist() == expected + padding
      assert frames[row].tolist() == times + padding


def test_collapse_reads_a_gap_in_the_mask_as_blank():
  ids = jnp.array([[5, 5, 5]])
  split = _collapse(ids, jnp.array([[True, False, True]]), blank_id=0)
  whole = _collapse(ids, jnp.array([[True, True, True]]), blank_id=0)
  assert split[0].tolist() == [[5, 5, -1]]
  assert whole[0].tolist() == [[5, -1, -1]]


LABELS = [[], [1], [1, 1], [2, 1], [1, 2, 1], [2, 2, 2], [1, 1, 2, 2]]


def _pairs():
  """Labels padded with the last label: padding must not look like a repeat."""
  padded = np.zeros((len(LABELS), 4), np.int32)
  for row, labels in enumerate(LABELS):
    padded[row] = labels[-1] if labels else 1
    padded[row, : len(labels)] = labels
  return jnp.array(padded), _mask([len(labels) for labels in LABELS], 4)


@pytest.mark.parametrize('num_frames', [1, 5])
def test_loss_equals_the_sum_over_all_paths(num_frames):
  log_probs = _random_log_probs((len(LABELS), 5, 3))
  labels, label_mask = _pairs()
  frame_mask = _mask([num_frames] * len(LABELS), 5)
  losses = _loss(log_probs, frame_mask, labels, label_mask, blank_id=0)
  feasible = ctc.is_feasible(labels, label_mask, frame_mask.sum(axis=1))
  for row, expected in enumerate(LABELS):
    exact = np.asarray(log_probs[row, :num_frames], np.float64)
    sums = reference.prefixes(exact, blank_id=0)
    assert feasible[row] == (tuple(expected) in sums)
    if feasible[row]:
      np.testing.assert_allclose(
        losses[row], -sums[tuple(expected)][0], rtol=1e-5
      )
    else:
      assert losses[row] == 0.0


def test_loss_of_a_uniform_model_counts_paths():
  # 3 frames, one label: 6 paths of 27 read as it.
  log_probs = jnp.full((1, 3, 3), -jnp.log(3.0))
  losses = _loss(
    log_probs,
    jnp.ones((1, 3), bool),
    jnp.array([[2]]),
    jnp.ones((1, 1), bool),
    blank_id=0,
  )
  np.testing.assert_allclose(losses, [np.log(27 / 6)], rtol=1e-6)


def test_logits_are_as_good_as_log_probs():
  log_probs = _random_log_probs((len(LABELS), 5, 3))
  labels, label_mask = _pairs()
  run = functools.partial(
    _loss,
    frame_mask=jnp.ones((len(LABELS), 5), bool),
    labels=labels,
    label_mask=label_mask,
    blank_id=0,
  )
  np.testing.assert_allclose(run(log_probs + 3.0), run(log_probs), atol=1e-5)


def test_infeasible_and_empty_rows_give_zero_and_no_gradient():
  labels, label_mask = _pairs()
  lengths = [5, 0, 2, 1, 5, 4, 5]  # feasible: 0, 4; empty labels: 0
  frame_mask = _mask(lengths, 5)

  def total(logits):
    return ctc.ctc_loss(
      logits, frame_mask, labels, label_mask, blank_id=0
    ).sum()

  logits = _random_log_probs((len(LABELS), 5, 3))
  gradient = jax.jit(jax.grad(total))(logits)
  assert jnp.isfinite(gradient).all()
  size = jnp.abs(gradient).sum(axis=(1, 2))
  assert (size[jnp.array([1, 2, 3, 5, 6])] == 0.0).all()
  assert (size[jnp.array([0, 4])] > 0.1).all()


def test_nothing_at_all_is_not_a_number_problem():
  for num_frames, size in ((0, 2), (3, 0)):
    losses, gradient = jax.value_and_grad(
      lambda x, size=size: ctc.ctc_loss(
        x,
        jnp.zeros(x.shape[:2], bool),
        jnp.full((2, size), -1),
        jnp.zeros((2, size), bool),
        blank_id=0,
      ).sum()
    )(jnp.zeros((2, num_frames, 4)))
    assert losses == 0.0
    assert (gradient == 0.0).all()


def test_padding_changes_nothing_and_valid_frames_do():
  log_probs = _random_log_probs((len(LABELS), 5, 3))
  labels, label_mask = _pairs()

  def run(log_probs, num_frames):
    frame_mask = _mask([num_frames] * len(LABELS), 5)
    return _loss(log_probs, frame_mask, labels, label_mask, blank_id=0)

  before = run(log_probs, 4)
  after = run(log_probs.at[:, 4].set(jnp.nan), 4)
  np.testing.assert_array_equal(before, after)
  one_more = run(log_probs, 5)
  assert (jnp.abs(one_more - before)[:5] > 0.1).all()


def test_a_certain_model_has_no_negative_loss():
  logits = jnp.array([[[0.0, 90.0], [0.0, 90.0], [90.0, 0.0]]])
  loss = _loss(
    logits, jnp.ones((1, 3), bool), jnp.array([[1]]), jnp.ones((1, 1), bool),
    blank_id=0,
  )  # fmt: skip
  assert 0.0 <= loss[0] < 1e-6
