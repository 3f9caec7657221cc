"""Positions against NumPy and the reference's tables; no length limit."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from u2moe_jax.layers import positional


def _sinusoids(positions, width):
  table = np.zeros((len(positions), width))
  for i in range(0, width, 2):
    angles = np.asarray(positions, np.float64) * 10000.0 ** (-i / width)
    table[:, i] = np.sin(angles)
    table[:, i + 1] = np.cos(angles)
  return table


@pytest.mark.parametrize('width', [2, 16, 64])
def test_sinusoids(width):
  positions = np.array([0, 1, 2, 17, 300])
  ours = positional.sinusoids(jnp.asarray(positions)[None], width=width)[0]
  np.testing.assert_allclose(ours, _sinusoids(positions, width), atol=1e-4)


def test_sinusoids_know_no_limit():
  """The reference stops at 5,000 frames; float32 angles are what is left."""
  positions = np.array([5000, 6000, 20000, 100000])
  ours = positional.sinusoids(jnp.asarray(positions)[None], width=32)[0]
  np.testing.assert_allclose(ours, _sinusoids(positions, 32), atol=2e-2)
  assert np.abs(np.diff(np.asarray(ours), axis=0)).max(axis=1).min() > 0.1


def test_reference_tables():
  arrays, _ = golden.units()
  first = positional.sinusoids(jnp.arange(40)[None], width=16)[0]
  expected = arrays['sinusoid_pe_d16_first40']
  np.testing.assert_allclose(first, expected, atol=1e-5)
  some = positional.sinusoids(jnp.array([[0, 1, 100, 4999]]), width=64)[0]
  expected = arrays['sinusoid_pe_d64_pos_0_1_100_4999']
  np.testing.assert_allclose(some, expected, atol=1e-3)
  rotation = positional.rotation(jnp.arange(20)[None], head_dim=16)
  ours = np.stack([rotation.cos[0], rotation.sin[0]], axis=-1)
  expected = arrays['rope_cos_sin_headdim16_first20']
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_rotation_turns_pairs_and_keeps_lengths():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 5, 2, 6)).astype(np.float32)
  positions = jnp.arange(5)[None] + 3
  by = positional.rotation(positions, head_dim=6)
  rotated = np.asarray(positional.rotate(jnp.asarray(x), by))
  for t, h, m in np.ndindex(5, 2, 3):
    angle = (t + 3) * 10000.0 ** (-2 * m / 6)
    pair = (x[0, t, h, m] + 1j * x[0, t, h, m + 3]) * np.exp(1j * angle)
    assert rotated[0, t, h, m] == pytest.approx(pair.real, abs=1e-5)
    assert rotated[0, t, h, m + 3] == pytest.approx(pair.imag, abs=1e-5)


def test_rotated_products_depend_on_the_distance_alone():
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

  def product(i, j):
    turned = [
      positional.rotate(
        jnp.asarray(x), positional.rotation(jnp.array([[p]]), head_dim=8)
      )
      for x, p in ((query, i), (key, j))
    ]
    return float(jnp.sum(turned[0] * turned[1]))

  assert product(9, 4) == pytest.approx(product(6, 1), abs=1e-5)
  assert product(9, 4) != pytest.approx(product(9, 3), abs=1e-2)
