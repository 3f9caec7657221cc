"""One training step: pure, safe against bad batches.

That it is the same on any mesh: `any_mesh_test.py`.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.training import flops
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import parameters
from u2moe_jax.training import state as state_lib
from u2moe_jax.training import step as step_lib

# One decoder is enough, and compiles faster; 'tensor' must divide V.
_MODEL = config_lib.replace(
  config_lib.replace(
    tiny.model_config(tiny.moe(executor='dense')),
    'decoder.num_reverse_blocks',
    0,
  ),
  'vocab_size',
  12,
)
_CONFIG = config_lib.Config(
  model=_MODEL,
  # A large epsilon: Adam turns the rounding noise of gradients that are zero
  # (the bias of a key is one) into whole steps.
  optimizer=config_lib.OptimizerConfig(
    warmup_steps=4, learning_rate=3e-3, eps=1e-4
  ),
  train=config_lib.TrainConfig(num_steps=50, balance_loss_weight=0.01),
)
_BATCH = tiny.batch(
  (47, 39, 31, 23, 45, 33, 29, 0), (4, 3, 2, 1, 4, 3, 2, 0), seed=1
)


class _Run:
  """A model placed on a mesh, with its compiled step."""

  def __init__(self, config=_CONFIG, shape=(1, 1, 1, 1)):
    sizes = dict(zip(('data', 'fsdp', 'expert', 'tensor'), shape, strict=True))
    devices = jax.devices()[: int(np.prod(shape))]
    self.mesh = mesh_lib.make_mesh(config_lib.MeshConfig(**sizes), devices)
    self.model = u2.U2MoeModel(config.model)
    self.optimizer = optimizer_lib.optimizer_of(config)
    self.buffers = u2.init_buffers(config.model)
    with jax.set_mesh(self.mesh):
      self.shardings = state_lib.state_shardings(
        self.model, self.optimizer, self.buffers, mesh=self.mesh
      )
      self.step = step_lib.make_train_step(
        self.model,
        self.optimizer,
        config,
        shardings=self.shardings,
        mesh=self.mesh,
      )

  def state(self):
    """The same values on every mesh."""
    return self._state(_MODEL)

  def small_state(self):
    """That of `_SMALL`."""
    return self._state(_SMALL)

  def _state(self, model):
    _, params, _ = tiny.init(model)
    state = state_lib.TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=self.optimizer.init(params),
      buffers=self.buffers,
    )
    # A copy: the step donates its argument.
    return jax.device_put(jax.tree.map(np.array, state), self.shardings)

  def advance(self, state, *batches):
    metrics = []
    sharding = placement.batch_sharding(self.mesh, rules.STANDARD)
    with jax.set_mesh(self.mesh):
      for batch in batches:
        state, result = self.step(state, placement.shard_batch(batch, sharding))
        metrics.append(
          {k: np.asarray(m.total) / m.count for k, m in result.items()}
        )
    return state, metrics


@pytest.fixture(scope='module')
def single():
  return _Run()


@pytest.fixture(scope='module')
def two_steps(single):
  state, metrics = single.advance(single.state(), _BATCH, _BATCH)
  return jax.device_get(state), metrics


def _assert_close(a, b, tolerance):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b
  )


def test_the_state_is_born_sharded():
  config = dataclasses.replace(
    _CONFIG, model=tiny.model_config(tiny.moe(), decoders=0)
  )
  run = _Run(config, shape=(2, 1, 4, 1))
  with jax.set_mesh(run.mesh):
    state = state_lib.init_state(
      run.model,
      run.optimizer,
      run.buffers,
      jax.random.key(0),
      shardings=run.shardings,
    )
  abstract = state_lib.abstract_state(
    run.model, run.optimizer, run.buffers, shardings=run.shardings
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(
      (a.shape, a.dtype, a.sharding), (b.shape, b.dtype, b.sharding)
    ),
    state,
    abstract,
  )

  def check(path, leaf):
    names = jax.tree_util.keystr(path)
    shard = leaf.addressable_shards[0].data.shape
    is_expert = "'ffn" in names and 'w_' in names and leaf.ndim == 4
    expected = list(leaf.shape)
    if is_expert or ("'ffn" in names and 'b_' in names):
      expected[1] //= 4
    assert list(shard) == expected, names
    return is_expert

  experts = jax.tree_util.tree_map_with_path(check, state)
  # w_in and w_out of both feed-forward layers, each with two moments.
  assert sum(jax.tree.leaves(experts)) == 2 * 2 * 3


def test_a_nonfinite_batch_changes_nothing_and_is_counted(single, two_steps):
  state, _ = single.advance(single.state(), _BATCH)
  before = jax.device_get(state)
  features = _BATCH.features.copy()
  features[2, 5, 7] = np.inf
  state, (metrics,) = single.advance(state, _BATCH.replace(features=features))
  after = jax.device_get(state)
  assert metrics['skipped'] == 1
  assert after.step == 2
  jax.tree.map(
    np.testing.assert_array_equal,
    before.replace(step=0),
    after.replace(step=0),
  )
  _, (metrics,) = single.advance(state, _BATCH)
  assert metrics['skipped'] == 0
  assert np.isfinite(metrics['loss'])
  assert two_steps[1][0]['skipped'] == 0


def test_an_empty_row_changes_neither_loss_nor_update(single):
  """Row 7 is empty; whatever lies in it changes nothing."""
  rng = np.random.default_rng(0)
  features, labels = _BATCH.features.copy(), _BATCH.labels.copy()
  features[7] = rng.normal(size=features[7].shape)
  labels[7] = 3
  noisy = _BATCH.replace(features=features, labels=labels)
  state, (metrics,) = single.advance(single.state(), _BATCH)
  other, (other_metrics,) = single.advance(single.state(), noisy)
  _assert_close(metrics, other_metrics, 1e-5)
  _assert_close(state.params, other.params, 1e-6)
  weightless = _BATCH.replace(weights=np.eye(8, dtype=np.float32)[0])
  _, (one,) = single.advance(single.state(), weightless)
  assert abs(one['loss'] - metrics['loss']) > 1e-2


def test_an_all_empty_batch_is_harmless(single):
  empty = _BATCH.replace(
    weights=np.zeros(8, np.float32),
    feature_lengths=np.zeros(8, np.int32),
    label_lengths=np.zeros(8, np.int32),
  )
  state, (metrics,) = single.advance(single.state(), empty)
  assert metrics['loss_ctc'] == 0
  assert metrics['skipped'] == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_the_loss_falls_and_nothing_compiles_again(single):
  state = single.state()
  state, first = single.advance(state, _BATCH)
  compiled = single.step._cache_size()
  state, last = single.advance(state, *[_BATCH] * 25)
  assert single.step._cache_size() == compiled
  assert last[-1]['loss'] < 0.7 * first[0]['loss']
  assert int(state.step) == 26


def test_reported_rate_is_the_schedule(two_steps):
  rates = [metrics['learning_rate'] for metrics in two_steps[1]]
  np.testing.assert_allclose(rates, [3e-3 / 4, 3e-3 / 2], rtol=1e-6)


def test_chunk_sizes_are_drawn_by_step(single):
  _, metrics = single.advance(single.state(), *[_BATCH] * 12)
  sizes = {int(each['chunk_size']) for each in metrics}
  assert -1 in sizes
  assert len(sizes) > 2
  _, again = single.advance(single.state(), *[_BATCH] * 3)
  assert [m['chunk_size'] for m in again] == [
    m['chunk_size'] for m in metrics[:3]
  ]


# Short to compile: CTC alone, one dense block.
_SMALL = tiny.model_config(decoders=0, num_blocks=1, use_dynamic_chunk=False)


def _small_config(**changes):
  config = dataclasses.replace(_CONFIG, model=_SMALL)
  for path, value in changes.items():
    config = config_lib.replace(config, path.replace('__', '.'), value)
  return config


def _rows(batch, chosen):
  return jax.tree.map(lambda x: x[np.array(chosen)], batch)


@pytest.fixture(scope='module')
def whole():
  """One update on the batch of eight, of which seven are real."""
  run = _Run(_small_config())
  state, _ = run.advance(run.small_state(), _BATCH)
  return jax.device_get(state.params)


def test_accumulated_parts_are_the_large_batch(whole):
  """Parts of 3 and 4 real rows, with different tokens, and an empty row."""
  run = _Run(_small_config(optimizer__accumulate=2))
  parts = [_rows(_BATCH, [0, 1, 2, 7]), _rows(_BATCH, [3, 4, 5, 6])]
  state, _ = run.advance(run.small_state(), parts[0])
  before = jax.device_get(run.small_state().params)
  jax.tree.map(np.testing.assert_array_equal, state.params, before)
  state, _ = run.advance(state, parts[1])
  _assert_close(state.params, whole, 2e-6)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, whole)
  assert np.median(jax.tree.leaves(moved)) > 1e-4
  # Another division of the rows would be another update.
  state, _ = run.advance(run.small_state(), parts[0], parts[0])
  other = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, whole)
  assert max(jax.tree.leaves(other)) > 1e-4
  # A part that is not finite is left out of the update, the rest is not.
  features = parts[0].features.copy()
  features[0, 0, 0] = np.nan
  bad = parts[0].replace(features=features)
  state, metrics = run.advance(run.small_state(), bad, parts[1])
  assert [each['skipped'] for each in metrics] == [1, 0]
  good, _ = run.advance(
    run.small_state(), parts[1].replace(weights=0 * parts[1].weights), parts[1]
  )
  _assert_close(state.params, good.params, 1e-7)


def test_frozen_parameters_cost_nothing_and_stay():
  config = _small_config(train__trainable='ctc,norms')
  run = _Run(config)
  state, (metrics,) = run.advance(run.small_state(), _BATCH)
  before = parameters.paths(jax.device_get(run.small_state().params))
  chosen = parameters.selector('ctc,norms')
  sizes = {True: 0, False: 0}
  for path, leaf in parameters.paths(state.params).items():
    moved = not np.array_equal(leaf, before[path])
    assert moved == chosen(path), path
    sizes[chosen(path)] += leaf.size
  moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
  assert sum(size for size in moments if size > 1) == 2 * sizes[True]
  assert sizes[False] > 5 * sizes[True]
  # The norm is that of what trains, and the gradient of the rest is not made.
  counts = [_count_flops(_Run(c), _BATCH) for c in (config, _small_config())]
  assert counts[0] < 0.8 * counts[1]
  assert 0 < metrics['gradient_norm'] < np.inf


def test_frozen_parameters_join_when_they_should():
  config = _small_config(train__trainable='ctc,norms', train__freeze_steps=1)
  run = _Run(config)
  chosen = parameters.selector('ctc,norms')
  state = run.small_state()
  for expected in (chosen, lambda _: True):
    before = parameters.paths(jax.device_get(state.params))
    state, _ = run.advance(state, _BATCH)
    for path, leaf in parameters.paths(state.params).items():
      moved = not np.array_equal(leaf, before[path])
      assert moved == expected(path), path


def _count_flops(run, batch):
  with jax.set_mesh(run.mesh):
    return flops.count(run.step.trace(run.small_state(), batch).jaxpr)


def _dtypes(jaxpr):
  """Types of the floating results of each primitive, programs inside too."""
  found = collections.defaultdict(set)
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      if jnp.issubdtype(variable.aval.dtype, jnp.floating):
        found[equation.primitive.name].add(variable.aval.dtype.name)
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        for name, dtypes in _dtypes(inner).items():
          found[name] |= dtypes
  return found


def test_bfloat16_is_for_products_and_not_for_what_must_be_exact():
  run = _Run(config_lib.replace(_CONFIG, 'model.dtype', 'bfloat16'))
  state = run.state()
  with jax.set_mesh(run.mesh):
    traced = run.step.trace(state, _BATCH)
  found = _dtypes(traced.jaxpr.jaxpr)
  assert 'bfloat16' in found['dot_general']
  # Softmax, router and CTC; norms.
  for name in ('exp', 'log', 'rsqrt'):
    assert found[name] == {'float32'}, name
  half = jnp.ones(3, jnp.bfloat16)
  softmax = jax.make_jaxpr(jax.nn.softmax)(half)
  assert _dtypes(softmax.jaxpr)['exp'] == {'bfloat16'}
  # Masters, moments, metrics: all that leaves the step.
  after, metrics = traced.out_info
  kinds = {leaf.dtype.name for leaf in jax.tree.leaves((after, metrics))}
  assert kinds == {'float32', 'int32'}


def test_the_state_is_donated(single):
  state = single.state()
  single.advance(state, _BATCH)
  leaves = jax.tree.leaves((state.params, state.opt_state))
  assert all(leaf.is_deleted() for leaf in leaves)
