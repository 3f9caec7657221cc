"""Attention against NumPy; masks hold for values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from u2moe_jax.ops import dot_product

_RNG = np.random.default_rng(0)
_QUERY, _KEY, _VALUE = (
  jnp.asarray(_RNG.normal(size=(2, n, 3, 4)), jnp.float32) for n in (5, 6, 6)
)
_SCORE = jnp.asarray(_RNG.normal(size=(2, 6, 3)), jnp.float32)
_MASK = jnp.asarray(_RNG.random((2, 5, 6)) < 0.6).at[1, 2].set(False)


def _attend(query, key, value, mask, score=None):
  weights = dot_product.attention_weights(query, key, mask, key_score=score)
  return dot_product.weighted_values(weights, value)


def test_numpy_oracle():
  weights = dot_product.attention_weights(_QUERY, _KEY, _MASK, key_score=_SCORE)
  for b, t, h in np.ndindex(2, 5, 3):
    scores = np.array(
      [_QUERY[b, t, h] @ _KEY[b, p, h] + _SCORE[b, p, h] for p in range(6)]
    )
    shares = np.where(_MASK[b, t], np.exp(scores / 2), 0.0)
    expected = shares / max(shares.sum(), 1e-9)
    np.testing.assert_allclose(weights[b, h, t], expected, atol=1e-6)


def test_a_query_that_may_see_nothing_gets_zeros_and_finite_gradients():
  output = _attend(_QUERY, _KEY, _VALUE, _MASK, _SCORE)
  assert not np.asarray(output[1, 2]).any()
  assert np.asarray(output[1, 1]).any()
  gradients = jax.grad(
    lambda *args: jnp.sum(_attend(*args, _MASK, _SCORE) ** 2), (0, 1, 2)
  )(_QUERY, _KEY, _VALUE)
  for gradient in gradients:
    assert np.isfinite(gradient).all()
  assert not np.asarray(gradients[0][1, 2]).any()


def test_causality_by_gradient():
  mask = jnp.tril(jnp.ones((1, 5, 5), bool))
  key, value = _KEY[:, :5], _VALUE[:, :5]

  def reach(mask):
    gradients = jax.grad(
      lambda k, v: jnp.sum(_attend(_QUERY, k, v, mask)[:, 2]), (0, 1)
    )(key, value)
    return [np.abs(g).sum(axis=(0, 2, 3)) for g in gradients]

  for seen in reach(mask):
    assert (seen[:3] > 0).all()
    assert not seen[3:].any()
  for seen in reach(jnp.ones_like(mask)):
    assert (seen > 0).all()


def test_softmax_is_float32_in_bfloat16():
  weights = dot_product.attention_weights(
    _QUERY.astype(jnp.bfloat16), _KEY.astype(jnp.bfloat16), _MASK
  )
  assert weights.dtype == jnp.float32
  exact = dot_product.attention_weights(_QUERY, _KEY, _MASK)
  np.testing.assert_allclose(weights, exact, atol=0.05)
