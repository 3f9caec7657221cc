"""The arithmetic mean of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.checkpoint import average


def _trees(count):
  rng = np.random.default_rng(0)
  return [
    {
      'w': jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
      'nested': {'b': jnp.asarray(rng.normal(size=2), jnp.float32)},
      'step': jnp.asarray(10 + i),
    }
    for i in range(count)
  ]


@pytest.mark.parametrize('count', [1, 2, 5])
def test_mean_of_floats_and_first_of_counters(count):
  trees = _trees(count)
  result = average.average(iter(trees))
  expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *trees)
  np.testing.assert_allclose(result['w'], expected['w'], rtol=1e-6)
  np.testing.assert_allclose(
    result['nested']['b'], expected['nested']['b'], rtol=1e-6
  )
  assert result['w'].dtype == jnp.float32
  assert result['step'] == 10
  assert result['step'].dtype == trees[0]['step'].dtype


def test_the_trees_are_left_alone():
  trees = [jax.tree.map(np.array, tree) for tree in _trees(3)]
  before = jax.tree.map(np.array, trees)
  average.average(trees)
  jax.tree.map(np.testing.assert_array_equal, trees, before)


def test_nothing_to_average_is_an_error():
  with pytest.raises(ValueError, match='nothing to average'):
    average.average([])
