"""Experts on a mesh do what they do on one device, whatever its shape."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.layers import expert_parallel
from u2moe_jax.ops import dropout
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops import routing
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import rules

_EXPERTS, _KEPT, _WIDTH, _HIDDEN = 8, 2, 6, 8
_SHAPES = [(8, 1, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (1, 2, 2, 2), (2, 1, 4, 1)]


def _mesh(shape):
  sizes = dict(zip(('data', 'fsdp', 'expert', 'tensor'), shape, strict=True))
  return mesh_lib.make_mesh(config_lib.MeshConfig(**sizes))


@functools.cache
def _problem(num_tokens=24):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  mask = jnp.arange(num_tokens) % 5 != 3
  weights = grouped_matmul.ExpertWeights(
    w_in=normal(_EXPERTS, _WIDTH, _HIDDEN),
    b_in=normal(_EXPERTS, _HIDDEN),
    w_out=normal(_EXPERTS, _HIDDEN, _WIDTH),
    b_out=normal(_EXPERTS, _WIDTH),
  )
  # Uneven loads: most tokens like the first experts.
  logits = normal(num_tokens, _EXPERTS) + jnp.linspace(2, 0, _EXPERTS)[None]
  return normal(num_tokens, _WIDTH), logits, weights, mask


def _dropout(num_tokens, rate):
  if not rate:
    return None
  words = jnp.asarray([17, 4], jnp.uint32)
  return dropout.ExpertDropout.of_tokens(
    words, num_tokens=num_tokens, num_kept=_KEPT, rate=rate
  )


def _value_and_gradients(problem, shape=None, rate=0.0, **options):
  """(output, dropped, gradients by tokens, logits and weights)."""
  x, logits, weights, mask = problem
  target = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

  def loss(x, logits, weights):
    plan = routing.route(logits, mask, top_k=_KEPT, router_type='topk_softmax')
    executed = expert_parallel.expert_feed_forward(
      x,
      plan,
      weights,
      grouped_matmul.Options(jax.nn.silu, **options),
      _dropout(len(x), rate),
    )
    return jnp.sum(executed.output * target), executed

  function = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  if shape is None:
    (_, executed), gradients = function(x, logits, weights)
  else:
    with jax.set_mesh(_mesh(shape)), nn.logical_axis_rules(rules.STANDARD):
      (_, executed), gradients = function(x, logits, weights)
  return executed.output, float(executed.num_dropped), gradients


@functools.cache
def _expected(num_tokens=24, rate=0.0):
  output, _, gradients = _value_and_gradients(
    _problem(num_tokens), executor='dense', rate=rate
  )
  return jax.device_get((output, gradients))


def _assert_close(a, b, tolerance=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b
  )


@pytest.mark.parametrize('shape', _SHAPES, ids=str)
def test_a_mesh_computes_what_one_device_computes(shape):
  output, dropped, gradients = _value_and_gradients(
    _problem(), shape, executor='blocked'
  )
  _assert_close((output, gradients), _expected())
  assert dropped == 0


@pytest.mark.parametrize('executor', ['dense', 'capacity', 'ragged', 'auto'])
def test_every_executor_runs_what_it_receives(executor):
  output, dropped, gradients = _value_and_gradients(
    _problem(), (1, 2, 2, 2), executor=executor
  )
  _assert_close((output, gradients), _expected())
  assert dropped == 0


@pytest.mark.parametrize('executor', ['blocked', 'capacity'])
def test_dropout_is_the_same_on_a_mesh(executor):
  # Experts and hidden units are split, and tokens padded.
  output, _, gradients = _value_and_gradients(
    _problem(21), (1, 2, 2, 2), executor=executor, rate=0.4
  )
  _assert_close((output, gradients), _expected(21, rate=0.4))
  assert np.abs(output - _expected(21)[0]).max() > 0.1


def test_tokens_that_no_device_count_divides():
  output, _, gradients = _value_and_gradients(
    _problem(21), (2, 1, 4, 1), executor='blocked'
  )
  _assert_close((output, gradients), _expected(21))


def test_tokens_that_stay_at_home_are_noticed(monkeypatch):
  monkeypatch.setattr(jax.lax, 'all_to_all', lambda x, **_: x)
  output, _, _ = _value_and_gradients(
    _problem(), (1, 1, 8, 1), executor='blocked'
  )
  assert np.abs(output - _expected()[0]).max() > 0.1


def test_what_finds_no_slot_is_counted_over_all_devices():
  """Each of 8 devices has 3 tokens that all want experts 1 and 5."""
  x, _, weights, _ = _problem()
  wanted = jnp.zeros((24, _EXPERTS)).at[:, 1].set(9.0).at[:, 5].set(8.0)
  problem = (x, wanted, weights, jnp.ones(24, bool))
  # Even share 3 * 2 / 8, times 3: 2 slots, rounded down from 2.25.
  output, dropped, _ = _value_and_gradients(
    problem, (2, 1, 4, 1), executor='capacity', capacity_factor=3.0
  )
  assert dropped == 8 * 2 * (3 - 2)
  is_kept = np.arange(24) % 3 < 2
  whole, none_dropped, _ = _value_and_gradients(problem, executor='capacity')
  assert none_dropped == 0
  np.testing.assert_allclose(output[is_kept], whole[is_kept], atol=1e-5)
  assert not np.asarray(output)[~is_kept].any()


@pytest.mark.parametrize(
  ('shape', 'kinds'),
  [((1, 1, 8, 1), {'all-to-all'}), ((8, 1, 1, 1), set())],
  ids=str,
)
def test_tokens_travel_only_where_experts_are_split(shape, kinds):
  x, logits, weights, mask = _problem()
  mesh = _mesh(shape)
  place = lambda tree, *axes: jax.device_put(
    tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
  )
  tokens = ('data', 'fsdp', 'expert')

  def forward(x, logits, weights, mask):
    plan = routing.route(logits, mask, top_k=_KEPT, router_type='topk_softmax')
    return expert_parallel.expert_feed_forward(
      x, plan, weights, grouped_matmul.Options(jax.nn.silu, executor='blocked')
    ).output

  with jax.set_mesh(mesh), nn.logical_axis_rules(rules.STANDARD):
    text = (
      jax.jit(forward)
      .lower(
        place(x, tokens),
        place(logits, tokens),
        place(weights, 'expert'),
        place(mask, tokens),
      )
      .compile()
      .as_text()
    )
  found = {
    kind
    for kind in ('all-to-all', 'all-gather', 'all-reduce', 'collective-permute')
    if f' {kind}(' in text
  }
  assert found == kinds


def test_parts_are_those_of_the_mesh():
  assert expert_parallel.expert_parts() == 1
  with jax.set_mesh(_mesh((2, 1, 4, 1))):
    assert expert_parallel.expert_parts() == 1  # no rules
    with nn.logical_axis_rules(rules.STANDARD):
      assert expert_parallel.expert_parts() == 4
