from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp

from u2moe_jax.ops import sequences

_add = jax.jit(sequences.add_sos_eos, static_argnames=('sos', 'eos'))
_reverse = jax.jit(sequences.reverse_by_length)

ROWS = st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=3, max_size=3)


def _pad(rows, size=5, padding=-1):
  return jnp.array([[*row, *[padding] * (size - len(row))] for row in rows])


def _lengths(rows):
  return jnp.array([len(row) for row in rows])


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, padding=st.sampled_from([-1, 4]))
def test_inputs_and_targets_equal_lists(rows, padding):
  inputs, targets = _add(
    _pad(rows, padding=padding), _lengths(rows), sos=10, eos=11
  )
  assert (inputs == _pad([[10, *row] for row in rows], 6, 11)).all()
  assert (targets == _pad([[*row, 11] for row in rows], 6)).all()


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, padding=st.sampled_from([-1, 4]))
def test_reversal_stays_within_the_length(rows, padding):
  turned = _reverse(_pad(rows, padding=padding), _lengths(rows))
  assert (turned == _pad([row[::-1] for row in rows])).all()
  assert (_reverse(turned, _lengths(rows)) == _pad(rows)).all()


def test_equals_the_reference():
  # Labels, decoder inputs and targets of the WeNet golden case `u2pp_dense`.
  labels = [[5, 5, 7, 9, 12, 30, 3], [3, 8, 8, 21], [4, 6, 10, 33, 17]]
  padded, lengths = _pad(labels, 7), _lengths(labels)
  inputs, targets = _add(padded, lengths, sos=2, eos=2)
  assert inputs.tolist() == [
    [2, 5, 5, 7, 9, 12, 30, 3],
    [2, 3, 8, 8, 21, 2, 2, 2],
    [2, 4, 6, 10, 33, 17, 2, 2],
  ]
  assert targets.tolist() == [
    [5, 5, 7, 9, 12, 30, 3, 2],
    [3, 8, 8, 21, 2, -1, -1, -1],
    [4, 6, 10, 33, 17, 2, -1, -1],
  ]
  inputs, targets = _add(_reverse(padded, lengths), lengths, sos=2, eos=2)
  assert inputs.tolist() == [
    [2, 3, 30, 12, 9, 7, 5, 5],
    [2, 21, 8, 8, 3, 2, 2, 2],
    [2, 17, 33, 10, 6, 4, 2, 2],
  ]
  assert targets.tolist() == [
    [3, 30, 12, 9, 7, 5, 5, 2],
    [21, 8, 8, 3, 2, -1, -1, -1],
    [17, 33, 10, 6, 4, 2, -1, -1],
  ]


def test_no_labels_at_all():
  empty, lengths = jnp.zeros((2, 0), jnp.int32), jnp.zeros((2,), jnp.int32)
  inputs, targets = sequences.add_sos_eos(empty, lengths, sos=7, eos=8)
  assert inputs.tolist() == [[7], [7]]
  assert targets.tolist() == [[8], [8]]
  assert sequences.reverse_by_length(empty, lengths).shape == (2, 0)
