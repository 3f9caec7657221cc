"""Dropout: how many, which, the gradient, and every mesh alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.layers import dropout
from u2moe_jax.ops import dropout as dropout_ops

_SHAPE = (16, 64, 96)


def _mask(seed=0, rate=0.25, shape=_SHAPE):
  words = jax.random.bits(jax.random.key(seed), (2,), jnp.uint32)
  return np.asarray(dropout_ops.keep_mask(words, shape, rate))


def _weak(seed=0, rate=0.25, shape=_SHAPE):
  """A negative control: one multiplication of the place, and no more."""
  places = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape) + seed
  return places * np.uint32(0x9E3779B1) >= np.uint32(rate * 2**32)


def _correlation(first, second):
  """In standard deviations of independent draws."""
  first, second = (x.reshape(-1) - x.mean() for x in (first, second))
  return abs(
    (first * second).sum() / (first.std() * second.std() * first.size**0.5)
  )


def _worst_of_neighbours(mask):
  return max(
    _correlation(
      np.take(mask, range(lag, mask.shape[axis]), axis),
      np.take(mask, range(mask.shape[axis] - lag), axis),
    )
    for axis in range(mask.ndim)
    for lag in (1, 2, 3, 4, 8, 15)
  )


@pytest.mark.parametrize('rate', [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_stays(rate):
  mask = _mask(rate=rate)
  sigma = (rate * (1 - rate)) ** 0.5
  for axes in [(0, 1, 2), (1, 2), (0, 1), (0, 2)]:
    mean = mask.mean(axes)
    count = mask.size / mean.size
    worst = np.abs(mean - (1 - rate)).max() / (sigma / count**0.5)
    assert worst < 4.5, axes


def test_neighbours_are_independent():
  assert _worst_of_neighbours(_mask()) < 4.5
  assert _worst_of_neighbours(_weak()) > 20


def test_keys_are_independent():
  first = _mask(seed=0)
  shifted = [np.roll(first.reshape(-1), n) for n in (0, 1, 96, 96 * 64)]
  for seed in (1, 2, 3):
    second = _mask(seed=seed).reshape(-1)
    assert max(_correlation(x, second) for x in shifted) < 4.5
  weak = _weak(seed=1).reshape(-1)
  rolled = np.roll(_weak(seed=0).reshape(-1), -1)
  assert _correlation(rolled, weak) > 20


def test_the_gradient_is_that_of_the_mask():
  layer = dropout.Dropout(0.25)
  x = jax.random.normal(jax.random.key(1), _SHAPE)
  rngs = {'dropout': jax.random.key(2)}
  y, transpose = jax.vjp(lambda x: layer.apply({}, x, rngs=rngs), x)
  kept = np.asarray(y) != 0
  assert 0.7 < kept.mean() < 0.8
  np.testing.assert_allclose(y, np.where(kept, x / 0.75, 0), rtol=1e-6)
  (gradient,) = transpose(jnp.ones_like(y))
  np.testing.assert_allclose(gradient, kept / 0.75, rtol=1e-6)


def _row_masks(rate=0.25, first_unit=0, shape=(64, 16, 96), seed=0):
  """Of the pairs of 64 tokens with 16 slots each."""
  words = dropout.draw_words(jax.random.key(seed))
  tokens, kept, units = shape
  pairs = dropout_ops.ExpertDropout.of_tokens(
    words, num_tokens=tokens, num_kept=kept, rate=rate
  )
  pairs = pairs.replace(first_unit=jnp.uint32(first_unit))
  rows = pairs.of_rows(pairs.pairs)
  ones = jnp.ones((tokens, kept, units))
  return np.asarray(dropout_ops.drop_units(ones, rows) > 0)


def test_masks_of_rows_are_as_good_as_masks_of_places():
  mask = _row_masks()
  for axes in [(0, 1, 2), (1, 2), (0, 1), (0, 2)]:
    mean = mask.mean(axes)
    count = mask.size / mean.size
    assert np.abs(mean - 0.75).max() / (0.1875 / count) ** 0.5 < 4.5, axes
  assert _worst_of_neighbours(mask) < 4.5
  assert _correlation(mask, _row_masks(seed=1)) < 4.5


def test_a_part_of_the_units_has_its_part_of_the_mask():
  whole = _row_masks(shape=(8, 2, 96))
  part = _row_masks(shape=(8, 2, 32), first_unit=64)
  np.testing.assert_array_equal(part, whole[..., 64:])
  assert (_row_masks(shape=(8, 2, 32)) != part).any()


def test_without_a_key_nothing_is_dropped():
  x = jnp.ones((2, 3))
  assert dropout.Dropout(0.5).apply({}, x) is x
  rngs = {'dropout': jax.random.key(0)}
  assert dropout.Dropout(0.0).apply({}, x, rngs=rngs) is x


@pytest.mark.parametrize('rate', [-0.1, 1.0])
def test_a_rate_that_is_none(rate):
  with pytest.raises(ValueError, match=r'not in \[0, 1\)'):
    dropout.Dropout(rate).apply({}, jnp.ones(2))


def _library_mask(words, shape, rate):
  key = jax.random.wrap_key_data(jnp.tile(words, 2), impl='rbg')
  return jax.random.bernoulli(key, 1 - rate, shape)


@pytest.mark.parametrize(
  ('draw', 'whole'), [(dropout_ops.keep_mask, False), (_library_mask, True)]
)
def test_a_device_draws_its_own_part(draw, whole):
  """And the same mask as one device; `rbg` makes the whole batch on each."""
  mesh = jax.make_mesh((8,), ('data',))
  sharding = jax.NamedSharding(mesh, jax.P('data'))
  words = jax.random.bits(jax.random.key(0), (2,), jnp.uint32)
  x = jnp.ones(_SHAPE)

  def drop(x, words):
    return jnp.where(draw(words, x.shape, 0.25), x, 0)

  program = (
    jax.jit(drop, in_shardings=(sharding, None), out_shardings=sharding)
    .lower(x, words)
    .compile()
  )
  text = program.as_text()
  assert ('[16,64,96]' in text or '[24576,4]' in text) == whole
  dropped = program(jax.device_put(x, sharding), words)
  if not whole:
    np.testing.assert_array_equal(dropped, _mask(shape=_SHAPE))
