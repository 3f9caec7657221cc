"""Schedules in closed form, the decay mask, accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.reference import golden
from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.training import optimizer


def _schedule(num_steps=100, **options):
  config = config_lib.OptimizerConfig(**options)
  return optimizer.make_schedule(config, num_steps=num_steps)


def _rates(schedule, steps):
  return np.array([float(schedule(jnp.asarray(step))) for step in steps])


@pytest.mark.parametrize('warmup', [1, 4, 25000])
def test_inverse_sqrt_is_the_law_of_the_reference(warmup):
  schedule = _schedule(learning_rate=2e-3, warmup_steps=warmup)
  t = np.array([1, 2, 3, 4, 5, 9, 100, 24999, 25000, 25001, 100000])
  law = 2e-3 * warmup**0.5 * np.minimum(t**-0.5, t * warmup**-1.5)
  np.testing.assert_allclose(_rates(schedule, t - 1), law, rtol=1e-5)


def test_reference_rates():
  """The reference uses t=1 twice; from its second update on t = n - 1."""
  _, results = golden.units()
  compared = 0
  for case in results['warmuplr_used']:
    schedule = _schedule(
      learning_rate=case['lr'], warmup_steps=case['warmup_steps']
    )
    used = case['used_at_update_1_to_N'][1:]
    np.testing.assert_allclose(
      _rates(schedule, range(len(used))), used, rtol=1e-5
    )
    compared += 1
  assert compared == 3


def test_cosine_and_constant():
  options = {'learning_rate': 1.0, 'warmup_steps': 10}
  cosine = _schedule(110, schedule='cosine', final_rate_share=0.1, **options)
  expected = [0.1, 1.0, 0.1 + 0.9 * 0.5, 0.1, 0.1]
  np.testing.assert_allclose(
    _rates(cosine, [0, 10, 60, 110, 500]), expected, rtol=1e-5
  )
  constant = _schedule(schedule='constant', **options)
  np.testing.assert_allclose(
    _rates(constant, [0, 4, 9, 10, 999]), [0.1, 0.5, 1, 1, 1], rtol=1e-6
  )


@pytest.mark.parametrize('experts', [None, tiny.moe()])
def test_only_matrices_decay(experts):
  _, params, _ = tiny.init(tiny.model_config(experts))
  leaves = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
  assert any(decays for _, decays in leaves)
  for path, decays in leaves:
    # The parameter's own name: `w_in/bias` is a bias, not a matrix.
    name = path[-1].key
    matrix = name in ('kernel', 'w_in', 'w_out', 'embedding')
    matrix = matrix or name.startswith('kernel_')
    assert decays == matrix, jax.tree_util.keystr(path)


def _update(config, params, gradients):
  chain = optimizer.make_optimizer(config, num_steps=10)
  updates, _ = chain.update(gradients, chain.init(params), params)
  return updates


def test_decay_pulls_matrices_only_and_only_in_adamw():
  params = {'a': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}
  zeros = jax.tree.map(jnp.zeros_like, params)
  options = {'learning_rate': 0.1, 'warmup_steps': 1, 'weight_decay': 0.5}
  updates = _update(config_lib.OptimizerConfig(**options), params, zeros)
  np.testing.assert_allclose(updates['a']['kernel'], -0.05, rtol=1e-6)
  assert not np.asarray(updates['a']['bias']).any()
  adam = config_lib.OptimizerConfig(name='adam', **options)
  for leaf in jax.tree.leaves(_update(adam, params, zeros)):
    assert not np.asarray(leaf).any()


def test_gradients_are_clipped_by_global_norm():
  """With a huge epsilon Adam's first step is linear in the gradient."""
  params = {'a': {'bias': jnp.zeros(2)}}
  gradients = {'a': {'bias': jnp.array([30.0, 40.0])}}
  options = {'learning_rate': 1.0, 'warmup_steps': 1, 'eps': 1e6}
  clipped, free = (
    _update(
      config_lib.OptimizerConfig(clip_norm=norm, **options), params, gradients
    )['a']['bias']
    for norm in (5.0, 0.0)
  )
  np.testing.assert_allclose(clipped, free / 10, rtol=1e-3)


def test_accumulated_batches_are_one_update_by_the_mean():
  params = {'a': {'kernel': jnp.ones((2, 2))}}
  options = {'learning_rate': 0.1, 'warmup_steps': 1, 'eps': 1e3}
  config = config_lib.OptimizerConfig(accumulate=2, **options)
  chain = optimizer.make_optimizer(config, num_steps=10)
  state = chain.init(params)
  gradients = [{'a': {'kernel': jnp.full((2, 2), g)}} for g in (1.0, 3.0)]
  first, state = chain.update(gradients[0], state, params)
  assert not np.asarray(first['a']['kernel']).any()
  second, _ = chain.update(gradients[1], state, params)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
  expected = _update(config_lib.OptimizerConfig(**options), params, mean)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), second, expected
  )
  assert float(optax.tree.norm(second)) > 0
