"""Merged metrics are the metric of everything."""

import jax.numpy as jnp
import numpy as np

from u2moe_jax.training import metrics


def test_merging_weighs_by_count():
  rng = np.random.default_rng(0)
  values = [rng.normal(size=n) for n in (3, 1, 7)]
  merged = None
  for part in values:
    merged = metrics.merge(
      merged, {'x': metrics.Mean.of(jnp.sum(jnp.asarray(part)), len(part))}
    )
  computed = metrics.compute(merged)
  np.testing.assert_allclose(
    computed['x'], np.concatenate(values).mean(), rtol=1e-5
  )
  wrong = np.mean([part.mean() for part in values])
  assert abs(computed['x'] - wrong) > 1e-3


def test_arrays():
  load = metrics.Mean.of(jnp.array([1.0, 3.0]))
  merged = metrics.merge({'load': load}, {'load': load})
  np.testing.assert_allclose(metrics.compute(merged)['load'], [1.0, 3.0])


def test_what_was_never_counted_is_no_zero():
  found = metrics.compute(
    {'x': metrics.Mean.of(0.0, 0.0), 'y': metrics.Mean.of(0.0)}
  )
  assert found == {'y': 0.0}


def test_merging_leaves_its_arguments_alone():
  first = {'x': metrics.Mean.of(1.0, 2.0)}
  merged = metrics.merge(None, first)
  metrics.merge(merged, {'x': metrics.Mean.of(5.0, 1.0)})
  assert float(first['x'].total) == 1.0
