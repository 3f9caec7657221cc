"""All executors carry out a plan as the dense oracle does."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.ops import dropout
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops import routing
from u2moe_jax.ops.executors import blocked

_TOKENS, _EXPERTS, _KEPT, _WIDTH, _HIDDEN = 26, 5, 2, 6, 9
_IDLE = 3  # an expert that no token visits
_EXECUTORS: dict[str, dict] = {
  'capacity': {'executor': 'capacity', 'capacity_factor': None},
  'blocked_1': {'executor': 'blocked', 'block_size': 1},
  'blocked_3': {'executor': 'blocked', 'block_size': 3},
  'blocked_8': {'executor': 'blocked', 'block_size': 8},
  'blocked_64': {'executor': 'blocked', 'block_size': 64},
  'blocked_auto': {'executor': 'blocked', 'block_size': 0},
  'separate_1': {'executor': 'blocked', 'block_size': 1, 'layout': 'separate'},
  'separate_8': {'executor': 'blocked', 'block_size': 8, 'layout': 'separate'},
  'separate_dense': {'executor': 'dense', 'layout': 'separate'},
  'ragged': {'executor': 'ragged'},
  'auto': {'executor': 'auto'},
}


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  logits = normal(_TOKENS, _EXPERTS).at[:, _IDLE].set(-50.0)
  # Padding in the middle and at the end.
  mask = jnp.arange(_TOKENS) % 7 != 3
  mask = mask.at[-3:].set(False)
  weights = grouped_matmul.ExpertWeights(
    w_in=normal(_EXPERTS, _WIDTH, _HIDDEN),
    b_in=normal(_EXPERTS, _HIDDEN),
    w_out=normal(_EXPERTS, _HIDDEN, _WIDTH),
    b_out=normal(_EXPERTS, _WIDTH),
  )
  return normal(_TOKENS, _WIDTH), logits, mask, weights


def _plan(logits, mask, top_k=_KEPT):
  return routing.route(logits, mask, top_k=top_k, router_type='topk_softmax')


def _dropout(top_k, rate):
  if not rate:
    return None
  words = jnp.asarray([17, 4], jnp.uint32)
  return dropout.ExpertDropout.of_tokens(
    words, num_tokens=_TOKENS, num_kept=top_k, rate=rate
  )


@functools.cache
def _value_and_gradients(name, top_k=_KEPT, rate=0.0):
  options = dict({'dense': {'executor': 'dense'}, **_EXECUTORS}[name])
  layout = options.pop('layout', 'stacked')

  def loss(x, logits, weights, mask, target):
    if layout == 'separate':
      weights = grouped_matmul.separate(weights)
    output = grouped_matmul.expert_feed_forward(
      x,
      _plan(logits, mask, top_k),
      weights,
      grouped_matmul.Options(jax.nn.silu, **options),
      _dropout(top_k, rate),
    ).output
    return jnp.sum(output * target), output

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def _run(name, problem, **changes):
  x, logits, mask, weights = problem
  target = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
  (_, output), gradients = _value_and_gradients(name, **changes)(
    x, logits, weights, mask, target
  )
  return output, gradients


def _assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def _numpy_oracle(problem):
  x, logits, mask, weights = jax.tree.map(np.asarray, problem)
  output = np.zeros_like(x)
  for s in np.flatnonzero(mask):
    kept = np.argsort(-logits[s])[:_KEPT]
    share = np.exp(logits[s, kept] - logits[s, kept].max())
    for e, w in zip(kept, share / share.sum(), strict=True):
      hidden = x[s] @ weights.w_in[e] + weights.b_in[e]
      hidden = hidden / (1 + np.exp(-hidden))
      output[s] += w * (hidden @ weights.w_out[e] + weights.b_out[e])
  return output


def test_dense_is_the_weighted_sum_of_experts(problem):
  output, _ = _run('dense', problem)
  np.testing.assert_allclose(output, _numpy_oracle(problem), atol=1e-5)


@pytest.mark.parametrize('name', _EXECUTORS)
def test_executor_agrees_with_dense(problem, name):
  output, gradients = _run(name, problem)
  expected, expected_gradients = _run('dense', problem)
  _assert_close(output, expected)
  _assert_close(gradients, expected_gradients)


@pytest.mark.parametrize(
  'name', ['blocked_3', 'blocked_auto', 'separate_8', 'capacity', 'ragged']
)
def test_executors_drop_the_same_units(problem, name):
  found = _run(name, problem, rate=0.4)
  expected = _run('dense', problem, rate=0.4)
  _assert_close(found, expected)
  whole, _ = _run('dense', problem)
  assert np.abs(expected[0] - whole).max() > 0.1


@pytest.mark.parametrize('name', ['blocked_3', 'capacity', 'ragged'])
def test_executor_agrees_with_dense_when_every_expert_is_kept(problem, name):
  _assert_close(
    _run(name, problem, top_k=_EXPERTS), _run('dense', problem, top_k=_EXPERTS)
  )


@pytest.mark.parametrize('large', [1, 2**18])
def test_blocks_cover_experts_of_any_size(monkeypatch, large):
  """By whole blocks, by a part of one, by both, or by none."""
  monkeypatch.setattr(blocked, '_LARGE', large)
  counts = np.array([130, 0, 1, 16, 17, 64, 65, 40])
  rng = np.random.default_rng(3)
  expert = rng.permutation(np.repeat(np.arange(len(counts)), counts))
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  weights = grouped_matmul.ExpertWeights(
    w_in=draw(len(counts), _WIDTH, _HIDDEN),
    b_in=draw(len(counts), _HIDDEN),
    w_out=draw(len(counts), _HIDDEN, _WIDTH),
    b_out=draw(len(counts), _WIDTH),
  )
  logits = 9.0 * jax.nn.one_hot(expert, len(counts))
  plan = _plan(logits, jnp.ones(len(expert), bool), top_k=1)

  @functools.partial(jax.jit, static_argnums=0)
  def run(executor, x, weights, target):
    options = grouped_matmul.Options(
      jax.nn.silu, executor=executor, block_size=64
    )

    def loss(x, weights):
      output = grouped_matmul.expert_feed_forward(
        x, plan, weights, options
      ).output
      return jnp.sum(output * target), output

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, weights)

  x, target = draw(len(expert), _WIDTH), draw(len(expert), _WIDTH)
  (_, output), gradients = run('blocked', x, weights, target)
  (_, expected), expected_gradients = run('dense', x, weights, target)
  _assert_close(output, expected)
  # Sums over up to 130 rows.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
  jax.tree.map(close, gradients, expected_gradients)


def test_a_swapped_expert_is_noticed(problem):
  x, logits, mask, weights = problem
  swapped = weights.replace(w_in=weights.w_in[jnp.array([1, 0, 2, 3, 4])])
  output, _ = _run('blocked_3', (x, logits, mask, swapped))
  expected, _ = _run('dense', problem)
  assert np.abs(output - expected).max() > 0.1


@pytest.mark.parametrize('name', ['dense', *_EXECUTORS])
def test_padding_and_idle_expert_have_no_part(problem, name):
  _x, _logits, mask, _ = problem
  output, (d_x, d_logits, d_weights) = _run(name, problem)
  padded = ~np.asarray(mask)
  for array in (output, d_x, d_logits):
    assert not np.asarray(array)[padded].any()
  for leaf in jax.tree.leaves(d_weights):
    assert not np.asarray(leaf)[_IDLE].any()
    assert np.asarray(leaf)[0].any()


@pytest.mark.parametrize('name', ['dense', *_EXECUTORS])
def test_padded_tokens_may_hold_anything(problem, name):
  x, logits, mask, weights = problem
  other = jnp.where(mask[:, None], x, 1e3)
  other_logits = jnp.where(mask[:, None], logits, 7.0 - logits)
  _assert_close(
    _run(name, problem)[0], _run(name, (other, other_logits, mask, weights))[0]
  )


@pytest.mark.parametrize('name', ['dense', *_EXECUTORS])
def test_a_token_does_not_see_its_batch_mates(problem, name):
  x, logits, mask, weights = problem
  first = jnp.arange(_TOKENS) < 6
  crowded = jnp.where(first[:, None], logits, jnp.eye(_EXPERTS)[1] * 9.0)
  other = jnp.where(first[:, None], x, -x)
  alone, _ = _run(name, problem)
  among, _ = _run(name, (other, crowded, mask, weights))
  np.testing.assert_allclose(alone[:6], among[:6], atol=1e-5)
  assert np.abs(alone[6:] - among[6:]).max() > 0.1


@pytest.mark.parametrize('name', ['dense', *_EXECUTORS])
def test_all_padding_gives_zeros(problem, name):
  x, logits, mask, weights = problem
  empty = (x, logits, jnp.zeros_like(mask), weights)
  for leaf in jax.tree.leaves(_run(name, empty)):
    assert not np.asarray(leaf).any()


def test_a_zero_weight_of_a_real_token_does_not_hide_its_gradient(problem):
  """A kept logit far below the best has a weight that underflows to 0."""
  x, logits, mask, weights = problem
  far = logits.at[:, 0].set(200.0)
  _assert_close(
    _run('blocked_3', (x, far, mask, weights)),
    _run('dense', (x, far, mask, weights)),
  )


def test_capacity_drops_the_latest_and_counts_them(problem):
  x, _, _, weights = problem
  mask = jnp.arange(_TOKENS) < 20
  logits = jnp.zeros((_TOKENS, _EXPERTS)).at[:, 2].set(9.0).at[:, 4].set(8.0)
  # Even share 26 * 2 / 5 = 10.4: 10 slots for 20 tokens each.
  result = grouped_matmul.expert_feed_forward(
    x,
    _plan(logits, mask),
    weights,
    grouped_matmul.Options(
      jax.nn.silu, executor='capacity', capacity_factor=1.0
    ),
  )
  assert float(result.num_dropped) == 2 * (20 - 10)
  expected, _ = _run('dense', (x, logits, mask, weights))
  np.testing.assert_allclose(result.output[:10], expected[:10], atol=1e-5)
  assert not np.asarray(result.output[10:]).any()


def test_padding_takes_no_capacity(problem):
  x, logits, _, weights = problem
  mask = jnp.arange(_TOKENS) >= 20  # 6 real tokens behind 20 padded ones
  result = grouped_matmul.expert_feed_forward(
    x,
    _plan(logits, mask),
    weights,
    grouped_matmul.Options(
      jax.nn.silu, executor='capacity', capacity_factor=0.6
    ),
  )
  assert float(result.num_dropped) == 0
  expected, _ = _run('dense', (x, logits, mask, weights))
  np.testing.assert_allclose(result.output, expected, atol=1e-5)


def test_every_file_of_executors_is_known_and_tried():
  tried = {options['executor'] for options in _EXECUTORS.values()}
  assert set(config_lib.executors()) == tried | {'dense', 'tokamax'}


def test_tokamax_is_optional(problem, monkeypatch):
  """Its function takes the arguments of `lax.ragged_dot`."""
  x, logits, mask, weights = problem

  def run():
    return grouped_matmul.expert_feed_forward(
      x,
      _plan(logits, mask),
      weights,
      grouped_matmul.Options(jax.nn.silu, executor='tokamax'),
    ).output

  monkeypatch.setitem(sys.modules, 'tokamax', None)  # not installed
  with pytest.raises(config_lib.ConfigError, match='requirements-tokamax'):
    run()
  stand_in = types.SimpleNamespace(ragged_dot=jax.lax.ragged_dot)
  monkeypatch.setitem(sys.modules, 'tokamax', stand_in)
  _assert_close(run(), _run('dense', problem)[0])


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu', 'something new'])
def test_auto_never_takes_ragged_off_a_tpu(platform):
  for num_tokens in (1, 16, 1000, 10**6):
    name = grouped_matmul.choose('auto', num_tokens, platform)
    assert name in config_lib.executors()
    assert platform == 'tpu' or name not in ('auto', 'ragged', 'dense')
  assert grouped_matmul.choose('ragged', 16, platform) == 'ragged'
