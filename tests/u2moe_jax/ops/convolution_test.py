"""The shifted-product forms equal XLA's convolution, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.ops import convolution


def _normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _assert_same(ours, theirs, *arguments):
  def loss(function):
    return lambda *args: jnp.sum(jnp.sin(function(*args)))

  np.testing.assert_allclose(ours(*arguments), theirs(*arguments), atol=2e-5)
  gradients = jax.grad(loss(ours), (0, 1))(*arguments)
  expected = jax.grad(loss(theirs), (0, 1))(*arguments)
  for a, b in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize('width', [1, 4, 9])
def test_depthwise(width):
  def xla(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel[:, None],
      (1,),
      'VALID',
      dimension_numbers=('NWC', 'WIO', 'NWC'),
      feature_group_count=x.shape[-1],
    )

  _assert_same(
    convolution.depthwise_conv, xla, _normal(2, 9, 5), _normal(width, 5)
  )


@pytest.mark.parametrize(
  ('width', 'stride', 'shape'),
  [(3, 2, (2, 8, 9, 2)), (5, 3, (1, 11, 12, 3)), (3, 2, (1, 3, 3, 1))],
)
def test_strided_conv2d(width, stride, shape):
  def ours(x, kernel):
    return convolution.conv2d(x, kernel, stride=stride)

  def xla(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  _assert_same(ours, xla, _normal(*shape), _normal(width, width, shape[-1], 4))
