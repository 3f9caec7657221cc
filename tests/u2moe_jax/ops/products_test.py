"""Products: gradients are JAX's own, without copies of what is wide."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.ops import products


def _draw(*shape, seed=0):
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


def _gradients(function, contract):
  def loss(x, kernel, target):
    return jnp.sum(jnp.sin(function(x, kernel, contract)) * target)

  return jax.jit(jax.grad(loss, (0, 1)))


@pytest.mark.parametrize(
  ('batch', 'inputs', 'outputs'),
  [
    ((3, 4), (5,), (7,)),  # wider behind
    ((3, 4), (7,), (5,)),  # wider in front
    ((3, 4), (2, 3), (7,)),
    ((3, 4), (7,), (2, 3)),
    ((5,), (4, 2), (3, 2)),
    ((), (4,), (3,)),
  ],
)
def test_gradients_are_those_of_jax(batch, inputs, outputs):
  x, kernel = _draw(*batch, *inputs), _draw(*inputs, *outputs, seed=1)
  target, contract = _draw(*batch, *outputs, seed=3), len(inputs)
  np.testing.assert_array_equal(
    products.tensordot(x, kernel, contract), jnp.tensordot(x, kernel, contract)
  )
  found = _gradients(products.tensordot, contract)(x, kernel, target)
  expected = _gradients(jnp.tensordot, contract)(x, kernel, target)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_computes_in_the_types_it_is_given():
  x, kernel = _draw(6, 5).astype(jnp.bfloat16), _draw(5, 4).astype(jnp.bfloat16)
  found = _gradients(products.tensordot, 1)(x, kernel, _draw(6, 4))
  assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.skipif(
  jax.default_backend() != 'cpu', reason='what is looked at is XLA:CPU'
)
def test_the_wide_factor_is_not_copied():
  batch, narrow, wide = (4, 80), 16, 96
  arrays = _draw(*batch, narrow), _draw(narrow, wide), _draw(*batch, wide)
  is_transposed = re.compile(r'= f32\[96,320\]\{1,0\} fusion')

  def text(function):
    return _gradients(function, 1).lower(*arrays).compile().as_text()

  assert not is_transposed.search(text(products.tensordot))
  assert is_transposed.search(text(jnp.tensordot))  # JAX's own gradient
