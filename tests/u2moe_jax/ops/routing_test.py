"""Routing plans: weights, padding, gradients, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.ops import routing

_RNG = np.random.default_rng(0)
_LOGITS = jnp.asarray(_RNG.normal(size=(9, 4)), jnp.float32)
_MASK = jnp.arange(9) < 6
_TYPES = ['topk_softmax', 'softmax_topk']


def _route(logits=_LOGITS, mask=_MASK, *, top_k=2, kind='topk_softmax'):
  return routing.route(logits, mask, top_k=top_k, router_type=kind)


@pytest.mark.parametrize('kind', _TYPES)
@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_numpy_oracle(kind, top_k):
  plan = _route(top_k=top_k, kind=kind)
  for s in range(6):
    logits = np.asarray(_LOGITS[s], np.float64)
    order = np.argsort(-logits)[:top_k]
    kept = np.exp(logits[order])
    total = kept.sum() if kind == 'topk_softmax' else np.exp(logits).sum()
    np.testing.assert_array_equal(plan.expert_index[s], order)
    np.testing.assert_allclose(plan.weight[s], kept / total, rtol=1e-5)


def test_of_equal_logits_the_first_are_kept():
  logits = jnp.array([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
  plan = _route(logits, jnp.ones(2, bool), top_k=3)
  np.testing.assert_array_equal(plan.expert_index, [[1, 2, 3], [0, 1, 2]])


def test_weights_sum_to_one_only_over_the_kept():
  sums = [
    np.asarray(_route(kind=kind).weight[:6]).sum(axis=1) for kind in _TYPES
  ]
  np.testing.assert_allclose(sums[0], 1.0, rtol=1e-6)
  assert (sums[1] < 0.99).all()
  whole = _route(top_k=4, kind='softmax_topk').weight[:6]
  np.testing.assert_allclose(jnp.sum(whole, axis=1), 1.0, rtol=1e-6)
  np.testing.assert_allclose(whole, _route(top_k=4).weight[:6], rtol=1e-5)


@pytest.mark.parametrize('kind', _TYPES)
def test_padded_tokens_visit_nothing(kind):
  plan = _route(kind=kind)
  assert (np.asarray(plan.expert_index[6:]) == 4).all()
  assert not np.asarray(plan.weight[6:]).any()
  assert (np.asarray(plan.expert_index[:6]) < 4).all()


@pytest.mark.parametrize('kind', _TYPES)
def test_padded_tokens_change_no_statistic(kind):
  wild = jnp.where(_MASK[:, None], _LOGITS, jnp.eye(4)[0] * 90.0)
  alone = _LOGITS[:6]
  expected = routing.routing_stats(alone, _route(alone, _MASK[:6], kind=kind))
  for logits in (_LOGITS, wild):
    stats = routing.routing_stats(logits, _route(logits, kind=kind))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
      stats,
      expected,
    )
  gradient = jax.grad(
    lambda x: routing.routing_stats(x, _route(x, kind=kind)).z_loss
  )(wild)
  assert not np.asarray(gradient[6:]).any()
  assert np.asarray(gradient[:6]).all()


def test_top_1_trains_the_router_only_with_softmax_first():
  def gradient(kind, top_k):
    return jax.grad(
      lambda x: jnp.sum(_route(x, top_k=top_k, kind=kind).weight[:, 0])
    )(_LOGITS)

  assert not np.asarray(gradient('topk_softmax', 1)).any()
  assert np.asarray(gradient('softmax_topk', 1))[:6].all()
  assert np.asarray(gradient('topk_softmax', 2))[:6].any()


def test_a_uniform_router_is_balanced():
  logits = 5.0 * jnp.eye(4)[jnp.arange(8) % 4]
  mask = jnp.ones(8, bool)
  stats = routing.routing_stats(logits, _route(logits, mask, top_k=1))
  np.testing.assert_allclose(stats.load, 0.25)
  assert float(stats.balance_loss) == pytest.approx(1.0)
  crowd = jnp.broadcast_to(5.0 * jnp.eye(4)[1], (8, 4))
  stats = routing.routing_stats(crowd, _route(crowd, mask, top_k=1))
  np.testing.assert_array_equal(stats.load, [0, 1, 0, 0])
  assert float(stats.balance_loss) > 3.0


def test_statistics_in_closed_form():
  zeros = jnp.zeros((9, 4))
  # 3 of 6 tokens x 2 experts.
  stats = routing.routing_stats(zeros, _route(zeros), num_dropped=3.0)
  assert float(stats.entropy) == pytest.approx(np.log(4), rel=1e-6)
  assert float(stats.z_loss) == pytest.approx(np.log(4) ** 2, rel=1e-6)
  assert float(jnp.sum(stats.load)) == pytest.approx(1.0)
  assert float(stats.dropped) == 0.25


def test_no_token_at_all_is_finite():
  nothing = jnp.zeros(9, bool)
  stats = routing.routing_stats(_LOGITS, _route(mask=nothing))
  for leaf in jax.tree.leaves(stats):
    assert not np.asarray(leaf).any()


def test_the_most_loaded_device_is_told_where_experts_are_split():
  # All to expert 1 and 0: the first of two devices has everything.
  logits = jnp.broadcast_to(jnp.array([2.0, 3.0, 0.0, 1.0]), (9, 4))
  plan = _route(logits)
  loads = [
    float(routing.routing_stats(logits, plan, expert_parts=n).most_loaded)
    for n in (1, 2, 4)
  ]
  np.testing.assert_allclose(loads, [1.0, 2.0, 2.0], rtol=1e-6)


def test_margins():
  logits = jnp.array([[3.0, 1.0, 2.5, 0.0]])
  for top_k, margin in ((1, 0.5), (2, 1.5), (3, 1.0), (4, np.inf)):
    assert routing.margins(logits, top_k=top_k)[0] == margin
