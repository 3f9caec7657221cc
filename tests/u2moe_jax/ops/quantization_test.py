"""Products in 8 bits: how far off, and what they must not depend on."""

import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.ops import quantization


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rounding_is_half_a_step():
  kernel = _draw(30, 7) * np.logspace(-3, 3, 7, dtype=np.float32)
  found = quantization.quantize(kernel, inputs=(0,))
  back = np.asarray(quantization.dequantize(found))
  step = np.abs(kernel).max(axis=0) / 127
  assert (np.abs(back - kernel) <= 0.501 * step).all()
  assert np.abs(back - kernel).max() > 0  # or nothing was rounded
  # One scale for all channels would lose the small ones.
  assert (np.abs(back).max(axis=0) > 0).all()


@pytest.mark.parametrize('contract', [1, 2])
def test_product_is_close(contract):
  x, kernel = _draw(3, 4, 6, 5), _draw(*(6, 5)[2 - contract :], 8, 2, seed=1)
  quantized = quantization.quantize(kernel, inputs=tuple(range(contract)))
  found = quantization.tensordot(jnp.asarray(x), quantized, contract=contract)
  expected = np.tensordot(x, kernel, axes=contract)
  assert found.shape == expected.shape
  error = np.abs(found - expected).max() / np.abs(expected).max()
  assert 1e-5 < error < 0.03


def test_on_the_left_is_on_the_right_transposed():
  x, kernel = _draw(6, 5), _draw(6, 8, seed=1)
  right = quantization.quantize(kernel, inputs=(0,))
  left = quantization.quantize(kernel.T, inputs=(1,))
  expected = quantization.tensordot(jnp.asarray(x.T), right)
  found = quantization.matmul(left, jnp.asarray(x))
  np.testing.assert_allclose(found, expected.T, rtol=1e-6)
  np.testing.assert_array_equal(left.values, right.T.values)
  # By its inputs' scales it would be another product.
  wrong = quantization.quantize(kernel.T, inputs=(0,))
  assert np.abs(wrong.scale - left.scale.T[:, :1]).max() > 1e-3


def test_a_row_does_not_depend_on_the_others():
  kernel = quantization.quantize(_draw(16, 4), inputs=(0,))
  rows = _draw(2, 16, seed=1)
  alone = quantization.tensordot(jnp.asarray(rows[:1]), kernel)
  loud = rows * np.array([[1.0], [1e4]], np.float32)
  together = quantization.tensordot(jnp.asarray(loud), kernel)
  np.testing.assert_array_equal(together[:1], alone)


def test_zeros_stay_zeros():
  kernel = quantization.quantize(np.zeros((4, 2), np.float32), inputs=(0,))
  assert not np.asarray(quantization.tensordot(jnp.ones((1, 4)), kernel)).any()
  kernel = quantization.quantize(_draw(4, 2), inputs=(0,))
  assert not np.asarray(quantization.tensordot(jnp.zeros((1, 4)), kernel)).any()


def test_floats_are_multiplied_as_ever():
  x, kernel = _draw(3, 4), _draw(4, 2, seed=1)
  found = quantization.tensordot(jnp.asarray(x), jnp.asarray(kernel))
  np.testing.assert_allclose(found, x @ kernel, rtol=1e-5)
