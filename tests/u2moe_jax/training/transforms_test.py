"""Accumulation, moving average, and which parameters train: on numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.training import optimizer
from u2moe_jax.training import transforms

_PARAMS = {
  'a': {'kernel': jnp.ones((2, 2)), 'bias': jnp.zeros(2)},
  'b': {'kernel': jnp.full((2,), 3.0)},
}


def _gradients(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), _PARAMS
  )


def _assert_close(a, b, **options):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, **options), a, b
  )


def _run(chain, calls):
  """Applies (gradients, options) one after the other."""
  params, state = _PARAMS, chain.init(_PARAMS)
  for gradients, options in calls:
    updates, state = chain.update(gradients, state, params, **options)
    params = optax.apply_updates(params, updates)
  return params, state


def _optax_chain(clip, **options):
  return optax.chain(
    optax.clip_by_global_norm(clip), optax.scale_by_adam(**options)
  )


def _own_chain(clip, **options):
  return optax.chain(
    transforms.clip_by_global_norm(clip), transforms.scale_by_adam(**options)
  )


_ADAM = {'b1': 0.9, 'b2': 0.98, 'eps': 1e-3}


@pytest.mark.parametrize('clip', [0.5, 1e3])
def test_clipping_and_adam_are_those_of_optax(clip):
  calls = [(_gradients(i), {}) for i in range(5)]
  params, state = _run(_own_chain(clip, **_ADAM), calls)
  expected, expected_state = _run(_optax_chain(clip, **_ADAM), calls)
  _assert_close(params, expected)
  # A checkpoint of the one is a checkpoint of the other.
  assert jax.tree.structure(state) == jax.tree.structure(expected_state)
  _assert_close(state, expected_state, atol=1e-8)
  other, _ = _run(_own_chain(clip / 1e4, **_ADAM), calls)
  assert np.abs(other['b']['kernel'] - expected['b']['kernel']).max() > 0.01


def test_a_norm_that_is_known_is_not_computed_again():
  gradients = {'a': jnp.array([3.0, 4.0])}
  clip = transforms.clip_by_global_norm(1.0)
  scaled, _ = clip.update(gradients, clip.init(gradients))
  np.testing.assert_allclose(scaled['a'], [0.6, 0.8], rtol=1e-6)
  scaled, _ = clip.update(gradients, clip.init(gradients), norm=jnp.array(50.0))
  np.testing.assert_allclose(scaled['a'], [0.06, 0.08], rtol=1e-6)


def _skip_by_branch(finite, update, kept):
  return jax.lax.cond(finite, update, lambda: kept)


def _skip_by_choice(finite, update, kept):
  return jax.tree.map(lambda a, b: jnp.where(finite, a, b), update(), kept)


def test_no_copies_of_moments_are_made():
  """In a step that may skip its update, as the train step does."""
  params = {'a': jnp.ones((512, 512)), 'b': jnp.ones((512, 512))}
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

  def extra_memory(chain, skip):
    def step(params, state, gradients):
      def update():
        updates, new = chain.update(gradients, state, params)
        return optax.apply_updates(params, updates), new

      finite = jnp.isfinite(optax.tree.norm(gradients))
      return skip(finite, update, (params, state))

    args = params, chain.init(params), params
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # What is left is for the squares of which the norm is the sum.
  assert extra_memory(_own_chain(1.0, **_ADAM), _skip_by_branch) < 1.1 * size
  assert extra_memory(_optax_chain(1.0, **_ADAM), _skip_by_choice) > 1.4 * size


def test_parts_are_weighed_by_what_they_were_divided_by():
  parts, weights = [_gradients(i) for i in range(3)], [1.0, 5.0, 2.0]
  chain = transforms.accumulate(optax.sgd(1.0), 3)
  calls = [(g, {'weight': w}) for g, w in zip(parts, weights, strict=True)]
  mean = jax.tree.map(
    lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)) / 8, *parts
  )
  whole = jax.tree.map(lambda p, g: p - g, _PARAMS, mean)
  params, state = _run(chain, calls)
  _assert_close(params, whole, atol=1e-6)
  # All alike, as in optax.MultiSteps, is something else.
  alike, _ = _run(chain, [(g, {}) for g in parts])
  assert np.abs(alike['a']['kernel'] - whole['a']['kernel']).max() > 0.05
  # Nothing moves before the last part, and the next ones start afresh.
  early, _ = _run(chain, calls[:2])
  _assert_close(early, _PARAMS)
  assert float(state.weight) == 0.0
  twice, _ = _run(chain, calls + calls)
  _assert_close(
    twice, jax.tree.map(lambda p, g: p - 2 * g, _PARAMS, mean), atol=1e-5
  )


def test_parts_of_no_weight_are_left_out():
  chain = transforms.accumulate(optax.adam(0.1), 2)
  good, bad = _gradients(0), jax.tree.map(jnp.zeros_like, _PARAMS)
  one, _ = _run(chain, [(bad, {'weight': 0.0}), (good, {'weight': 3.0})])
  _assert_close(one, _run(optax.adam(0.1), [(good, {})])[0])
  none, state = _run(chain, [(bad, {'weight': 0.0})] * 2)
  _assert_close(none, _PARAMS)
  assert int(optax.tree.get(state.inner, 'count')) == 0


def test_the_moving_average_is_that_of_the_parameters():
  decay = 0.7
  chain = optax.chain(optax.sgd(0.1), transforms.average_parameters(decay))
  expected, params, calls = _PARAMS, _PARAMS, []
  for n in range(1, 40):
    calls.append((_gradients(n), {}))
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, calls[-1][0])
    d = min(decay, (1 + n) / (10 + n))
    expected = jax.tree.map(
      lambda e, p, d=d: d * e + (1 - d) * p, expected, params
    )
  assert d == 0.7  # long enough that the warm-up is over
  found, state = _run(chain, calls)
  _assert_close(state[-1].ema, expected, atol=1e-6)
  _assert_close(found, params, atol=1e-6)


@pytest.mark.parametrize('trainable', ['', 'a/*'])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_swapping_twice_changes_nothing(trainable, accumulate):
  config = config_lib.OptimizerConfig(
    warmup_steps=1, ema_decay=0.5, accumulate=accumulate
  )
  chain = optimizer.make_optimizer(config, num_steps=9, trainable=trainable)
  params, state = _run(chain, [(_gradients(i), {}) for i in range(4)])
  average, other = optimizer.swap_average(params, state)
  assert jax.tree.structure(other) == jax.tree.structure(state)
  assert np.abs(average['a']['kernel'] - params['a']['kernel']).max() > 1e-4
  moved = np.abs(average['b']['kernel'] - params['b']['kernel']).max()
  assert (moved > 1e-4) == (not trainable)
  again = optimizer.swap_average(average, other)
  jax.tree.map(np.testing.assert_array_equal, again, (params, state))
  plain = optimizer.make_optimizer(config_lib.OptimizerConfig(), num_steps=9)
  state = plain.init(params)
  assert optimizer.swap_average(params, state) == (params, state)


def _chain(trainable, freeze_steps=0, **options):
  config = config_lib.OptimizerConfig(
    warmup_steps=1, learning_rate=0.1, weight_decay=0.5, **options
  )
  return optimizer.make_optimizer(
    config, num_steps=9, trainable=trainable, freeze_steps=freeze_steps
  )


def test_the_others_never_move_and_have_no_moments():
  chain = _chain('b/*')
  params, state = _run(chain, [(_gradients(i), {}) for i in range(3)])
  _assert_close(params['a'], _PARAMS['a'])
  assert np.abs(params['b']['kernel'] - _PARAMS['b']['kernel']).min() > 0.05
  shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
  assert shapes == {(), (2,)}  # counters, and moments of b alone
  # As if there were only them.
  part = {'b': _PARAMS['b']}
  alone = _chain('')
  inside, state = part, alone.init(part)
  for i in range(3):
    updates, state = alone.update({'b': _gradients(i)['b']}, state, inside)
    inside = optax.apply_updates(inside, updates)
  _assert_close(params['b'], inside['b'])


@pytest.mark.parametrize('accumulate', [1, 2])
def test_the_others_join_after_some_steps(accumulate):
  chain = _chain('b/*', freeze_steps=4, accumulate=accumulate, ema_decay=0.9)
  calls = [(_gradients(i), {}) for i in range(4 + accumulate)]
  frozen, state = _run(chain, calls[:4])
  _assert_close(frozen['a'], _PARAMS['a'])  # decay does not move them either
  average, _ = optimizer.swap_average(frozen, state)
  _assert_close(average['a'], _PARAMS['a'])
  assert np.abs(frozen['b']['kernel'] - _PARAMS['b']['kernel']).mean() > 0.01
  opened, _ = _run(chain, calls)
  assert np.abs(opened['a']['kernel'] - _PARAMS['a']['kernel']).mean() > 0.01
