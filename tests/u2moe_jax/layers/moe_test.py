"""The MoE layer is the weighted sum of its experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from tests.reference import tiny
from u2moe_jax.layers import moe

_WIDTH, _HIDDEN, _EXPERTS = 6, 10, 4


def _params(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    'w_in': (_EXPERTS, _WIDTH, _HIDDEN),
    'b_in': (_EXPERTS, _HIDDEN),
    'w_out': (_EXPERTS, _HIDDEN, _WIDTH),
    'b_out': (_EXPERTS, _WIDTH),
  }
  params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  router = rng.normal(size=(_WIDTH, _EXPERTS)).astype(np.float32)
  return params | {'router': {'kernel': router}}


_X = np.random.default_rng(1).normal(size=(2, 5, _WIDTH)).astype(np.float32)
_MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)


def _run(config, params=None, rngs=None, **options):
  layer = moe.MoeFeedForward(config, _HIDDEN, **options)
  params = params or _params()
  params = jax.tree.map(jnp.asarray, params)
  x, mask = jnp.asarray(_X), jnp.asarray(_MASK)
  return layer.apply({'params': params}, x, mask, rngs=rngs)


def _oracle(top_k, kind):
  params = _params()
  expected = np.zeros_like(_X)
  for b, t in zip(*np.nonzero(_MASK), strict=True):
    logits = _X[b, t] @ params['router']['kernel']
    shares = np.exp(logits)
    kept = np.argsort(-logits)[:top_k]
    total = shares[kept].sum() if kind == 'topk_softmax' else shares.sum()
    for e in kept:
      hidden = _X[b, t] @ params['w_in'][e] + params['b_in'][e]
      out = np.maximum(hidden, 0) @ params['w_out'][e] + params['b_out'][e]
      expected[b, t] += shares[e] / total * out
  return expected


@pytest.mark.parametrize('kind', ['topk_softmax', 'softmax_topk'])
@pytest.mark.parametrize('top_k', [1, 2, _EXPERTS])
def test_numpy_oracle(top_k, kind):
  config = tiny.moe(top_k=top_k, router_type=kind, executor='blocked')
  output, stats = _run(config)
  np.testing.assert_allclose(output, _oracle(top_k, kind), atol=1e-4)
  assert not np.asarray(output)[~_MASK].any()
  assert (np.asarray(stats.expert_index)[~_MASK] == _EXPERTS).all()
  assert np.isinf(stats.margin[~_MASK]).all()
  assert np.isfinite(np.asarray(stats.margin)[_MASK]).all() == (
    top_k < _EXPERTS
  )


def test_equal_experts_are_one_dense_layer():
  params = _params()
  equal = jax.tree.map(
    lambda x: np.stack([x[0]] * _EXPERTS),
    {k: v for k, v in params.items() if k != 'router'},
  )
  output, _ = _run(tiny.moe(), equal | {'router': params['router']})
  hidden = np.maximum(_X @ params['w_in'][0] + params['b_in'][0], 0)
  expected = hidden @ params['w_out'][0] + params['b_out'][0]
  np.testing.assert_allclose(
    np.asarray(output)[_MASK], expected[_MASK], atol=1e-5
  )


def test_the_reference_layer():
  arrays, _ = golden.units()

  def stacked(part, transpose=False):
    weights = [arrays[f'moe_w.experts.{e}.{part}'] for e in range(4)]
    return np.stack([w.T if transpose else w for w in weights])

  params = {
    'router': {'kernel': arrays['moe_w.gate.weight'].T},
    'w_in': stacked('w_1.weight', True),
    'b_in': stacked('w_1.bias'),
    'w_out': stacked('w_2.weight', True),
    'b_out': stacked('w_2.bias'),
  }
  params = jax.tree.map(jnp.asarray, params)
  layer = moe.MoeFeedForward(tiny.moe(), 24, 'swish')
  x = jnp.asarray(arrays['moe_x'])
  output, _ = layer.apply({'params': params}, x, jnp.ones(x.shape[:2], bool))
  np.testing.assert_allclose(output, arrays['moe_y'], atol=2e-5)


def test_capacity_drops_in_training_only():
  params = _params()
  params['router'] = {'kernel': np.zeros((_WIDTH, _EXPERTS), np.float32)}
  config = tiny.moe(top_k=1, executor='capacity', capacity_factor=0.5)
  # Equal logits: everything goes to expert 0, which has one slot.
  _, evaluated = _run(config, params)
  trained, stats = _run(config, params, rngs={'dropout': jax.random.key(0)})
  assert float(evaluated.summary.dropped) == 0.0
  assert float(stats.summary.dropped) == pytest.approx(6 / 7)
  assert np.asarray(trained[0, 0]).any()
  assert not np.asarray(trained[0, 1:]).any()


def test_hidden_units_are_dropped_in_training_only():
  config = tiny.moe(executor='blocked')
  whole, _ = _run(config)
  asleep, _ = _run(config, dropout=0.5)
  np.testing.assert_array_equal(asleep, whole)
  rngs = {'dropout': jax.random.key(0)}
  np.testing.assert_allclose(_run(config, rngs=rngs)[0], whole, atol=1e-6)
  first, _ = _run(config, rngs=rngs, dropout=0.5)
  again, _ = _run(config, rngs=rngs, dropout=0.5)
  other, _ = _run(config, rngs={'dropout': jax.random.key(1)}, dropout=0.5)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - whole).max() > 0.05
  assert np.abs(first - other).max() > 0.05


def test_the_router_is_float32_in_bfloat16():
  x16 = jnp.asarray(_X, jnp.bfloat16)
  layer = moe.MoeFeedForward(tiny.moe(), _HIDDEN, dtype=jnp.bfloat16)
  params = jax.tree.map(jnp.asarray, _params())
  output, stats = layer.apply({'params': params}, x16, jnp.asarray(_MASK))
  assert output.dtype == jnp.bfloat16
  assert stats.logits.dtype == jnp.float32
  exact = np.asarray(x16, np.float32) @ _params()['router']['kernel']
  np.testing.assert_allclose(stats.logits, exact, atol=1e-5)
