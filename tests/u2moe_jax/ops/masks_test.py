"""Masks against literal tables, chunk draws against their enumeration."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from u2moe_jax.ops import masks


def _table(text):
  return np.array([[c == '1' for c in row] for row in text.split()])


def test_length_mask():
  mask = masks.length_mask(jnp.array([0, 1, 3, 4]), max_length=4)
  np.testing.assert_array_equal(mask, _table('0000 1000 1110 1111'))


def test_causal_mask():
  np.testing.assert_array_equal(masks.causal_mask(3), _table('100 110 111'))
  assert masks.causal_mask(0).shape == (0, 0)


@pytest.mark.parametrize(
  ('chunk', 'left', 'expected'),
  [
    (2, -1, '11000 11000 11110 11110 11111'),
    (2, 0, '11000 11000 00110 00110 00001'),
    (2, 1, '11000 11000 11110 11110 00111'),
    (1, 1, '10000 11000 01100 00110 00011'),
    (7, 0, '11111 11111 11111 11111 11111'),
    (-1, -1, '11111 11111 11111 11111 11111'),
    (-1, 0, '11111 11111 11111 11111 11111'),
  ],
)
def test_chunk_mask(chunk, left, expected):
  mask = masks.chunk_mask(5, chunk_size=chunk, left_chunks=left)
  np.testing.assert_array_equal(mask, _table(expected))
  traced = jax.jit(
    lambda c, n: masks.chunk_mask(5, chunk_size=c, left_chunks=n)
  )(jnp.asarray(chunk), jnp.asarray(left))
  np.testing.assert_array_equal(traced, mask)


@pytest.mark.parametrize('size', [0, 1])
def test_chunk_mask_of_almost_nothing(size):
  mask = masks.chunk_mask(size, chunk_size=4, left_chunks=1)
  np.testing.assert_array_equal(mask, np.ones((size, size), bool))


def test_chunk_masks_of_the_reference():
  arrays, _ = golden.units()
  found = [name for name in arrays if name.startswith('chunk_mask_')]
  assert len(found) == 7
  for name in found:
    size, chunk, left = (
      int(part.lstrip('abcdefghijklmnopqrstuvwxyz'))
      for part in name.split('_')[2:]
    )
    mask = masks.chunk_mask(size, chunk_size=chunk, left_chunks=left)
    np.testing.assert_array_equal(mask, arrays[name], err_msg=name)


def _exact(length, rate):
  """P(chunk) by enumerating r; -1 is full context."""
  counts = collections.Counter(
    -1 if r > length // 2 else r % (100 // rate) + 1 for r in range(1, length)
  )
  return {chunk: n / (length - 1) for chunk, n in counts.items()}


@functools.partial(jax.jit, static_argnames=('rate', 'with_left_chunks'))
def _draw(seeds, num_frames, rate, with_left_chunks=False):
  return jax.vmap(
    lambda seed: masks.draw_chunk(
      jax.random.key(seed),
      num_frames=num_frames,
      rate=rate,
      with_left_chunks=with_left_chunks,
    )
  )(seeds)


def _chi_square(counts, shares, total):
  assert set(counts) <= set(shares)
  return sum(
    (counts.get(k, 0) - total * p) ** 2 / (total * p) for k, p in shares.items()
  )


def _limit(num_classes):
  """Five standard deviations above the mean of chi-square."""
  free = max(num_classes - 1, 1)
  return free + 5 * np.sqrt(2 * free)


@pytest.mark.parametrize(
  ('length', 'rate'), [(100, 4), (40, 4), (40, 8), (90, 6), (3, 4)]
)
def test_chunks_are_distributed_as_enumerated(length, rate):
  total = 20000
  sizes, left = _draw(jnp.arange(total), jnp.asarray(length), rate)
  assert (np.asarray(left) == -1).all()
  counts = collections.Counter(np.asarray(sizes).tolist())
  shares = _exact(length, rate)
  assert _chi_square(counts, shares, total) < _limit(len(shares))
  # The test can tell another rate's distribution from this one.
  if length > 50:
    other = _exact(length, 8)
    assert set(counts) - set(other)


def test_the_reference_draws_from_the_same_distribution():
  _, results = golden.units()
  for name, histogram in results['dynamic_chunk_empirical_20000'].items():
    length, largest = (
      int(part.lstrip('abcdefghijklmnopqrstuvwxyz'))
      for part in name.split('_')[1::2]
    )
    counts = {
      -1 if int(k) == length else int(k): n for k, n in histogram.items()
    }
    shares = _exact(length, 100 // largest)
    assert _chi_square(counts, shares, 20000) < _limit(len(shares))


@pytest.mark.parametrize(('rate', 'largest'), [(4, 25), (6, 16), (8, 12)])
def test_the_largest_chunk_is_a_second(rate, largest):
  sizes, _ = _draw(jnp.arange(4000), jnp.asarray(200), rate)
  assert np.asarray(sizes).max() == largest


@pytest.mark.parametrize('length', [0, 1, 2, 3])
@pytest.mark.parametrize('with_left', [False, True])
def test_almost_nothing_can_be_drawn_for(length, with_left):
  sizes, left = _draw(
    jnp.arange(64), jnp.asarray(length), 4, with_left_chunks=with_left
  )
  assert np.isin(sizes, [-1, 2]).all()
  assert np.isin(left, [-1, 0]).all()


def test_left_chunks_are_uniform_given_the_chunk():
  length, total = 30, 20000
  sizes, left = map(
    np.asarray,
    _draw(jnp.arange(total), jnp.asarray(length), 4, with_left_chunks=True),
  )
  assert (left[sizes == -1] == -1).all()
  for chunk in (3, 8):
    drawn = left[sizes == chunk]
    top = (length - 1) // chunk
    counts = collections.Counter(drawn.tolist())
    shares = dict.fromkeys(range(top), 1 / top)
    assert _chi_square(counts, shares, len(drawn)) < _limit(top)
