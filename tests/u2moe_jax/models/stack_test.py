"""Experts in some layers only: where they lie, and what groups compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import stack
from u2moe_jax.models import u2
from u2moe_jax.training import upcycling

_M, _F = 'macaron', 'final'


@pytest.mark.parametrize(
  ('where', 'expected'),
  [
    ('all', [(_M, _F)] * 4),
    ('final', [(_F,)] * 4),
    ('every:2', [(), (_M, _F)] * 2),
    ('every:2.final', [(), (_F,)] * 2),
    ('every:3', [(), (), (_M, _F), ()]),
    ('0', [(_M, _F), (), (), ()]),
    ('2-9', [(), (), (_M, _F), (_M, _F)]),
    ('0.macaron, 2-3.final', [(_M,), (), (_F,), (_F,)]),
    ('macaron,final', [(_M, _F)] * 4),
  ],
)
def test_where_names_blocks_and_layers(where, expected):
  config = config_lib.MoeConfig(num_experts=4, where=where)
  assert config.placed(4, (_M, _F)) == tuple(expected)
  dense = dataclasses.replace(config, num_experts=0)
  assert not any(dense.placed(4, (_M, _F)))


@pytest.mark.parametrize(
  'where', ['', 'every', 'every:0', '-1', '1.', '.final', 'both', '1-2-3', 'a,']
)
def test_where_refuses_what_it_cannot_read(where):
  with pytest.raises(config_lib.ConfigError, match='moe.where.*cannot be read'):
    config_lib.MoeConfig(where=where)


@pytest.mark.parametrize('where', ['2', 'every:3', 'ffn'])
def test_where_must_choose_something(where):
  with pytest.raises(config_lib.ConfigError, match='encoder.moe.where'):
    tiny.model_config(tiny.moe(where=where), decoders=0)
  with pytest.raises(config_lib.ConfigError, match='decoder.moe.where'):
    config_lib.DecoderConfig(moe=tiny.moe(where='macaron'))


@pytest.mark.parametrize(
  ('kinds', 'period'),
  [('aaaa', 1), ('abab', 2), ('abba', 4), ('aabaab', 3), ('ababa', 5)],
)
def test_period_is_the_smallest_that_repeats(kinds, period):
  kinds = tuple((letter,) for letter in kinds)
  assert stack.period(kinds) == period
  places = [stack.place(kinds, block) for block in range(len(kinds))]
  assert len(set(places)) == len(kinds)
  for block, (group, entry) in enumerate(places):
    assert group == (f'block_{block % period}' if period > 1 else '')
    assert entry == block // period


def test_parameters_lie_where_the_layout_says():
  config = tiny.model_config(tiny.moe(), num_blocks=4)
  config = config_lib.replace(config, 'encoder.moe.where', 'every:2')
  shapes = contents.shapes(directory.abstract_variables(config)['params'])
  blocks = 'encoder/blocks'
  assert shapes[f'{blocks}/block_0/ffn_final/w_in/kernel'] == (2, 16, 24)
  assert shapes[f'{blocks}/block_1/ffn_final/w_in'] == (2, 4, 16, 24)
  assert shapes[f'{blocks}/block_1/ffn_macaron/router/kernel'] == (2, 16, 4)
  assert shapes['forward_decoder/layers/ffn/w_in'] == (1, 4, 16, 24)
  alike = tiny.model_config(tiny.moe(where='final'), decoders=0)
  shapes = contents.shapes(directory.abstract_variables(alike)['params'])
  assert shapes[f'{blocks}/ffn_final/w_in'] == (2, 4, 16, 24)
  assert shapes[f'{blocks}/ffn_macaron/w_in/kernel'] == (2, 16, 24)


def test_only_experts_count_as_partly_active():
  config = tiny.model_config(tiny.moe(where='final'), decoders=0)
  total, active = u2.count_params(config)
  expert = 2 * 16 * 24 + 24 + 16
  assert total - active == 2 * (4 - 2) * expert  # two blocks, 2 of 4 idle


class _Pair:
  """A dense model of four blocks, and one with copies of its experts."""

  def __init__(self):
    self.dense = tiny.model_config(decoders=0, num_blocks=4)
    self.config = upcycling.moe_config(
      self.dense, num_experts=4, top_k=2, where='encoder.every:2.final'
    )
    _, params, buffers = tiny.init(self.dense)
    self.variables = {'params': params, 'buffers': buffers}
    self.config = config_lib.replace(
      self.config, 'encoder.moe.executor', 'dense'
    )
    self.grouped = upcycling.upcycle(self.variables, self.dense, self.config)


@pytest.fixture(scope='module')
def pair():
  return _Pair()


def test_unstack_gives_the_blocks_in_order(pair):
  plain = stack.unstack(pair.variables['params']['encoder']['blocks'])
  grouped = stack.unstack(pair.grouped['params']['encoder']['blocks'])
  assert len(plain) == len(grouped) == 4
  for a, b in zip(plain, grouped, strict=True):
    assert 'router' not in a['ffn_final']
    np.testing.assert_array_equal(
      a['attention']['query']['kernel'], b['attention']['query']['kernel']
    )
  assert ['router' in b['ffn_final'] for b in grouped] == [False, True] * 2


@functools.partial(jax.jit, static_argnums=0)
def _chunk(config, variables, cache):
  rng = np.random.default_rng(2)
  features = jnp.asarray(rng.normal(size=(2, 23, tiny.BINS)), jnp.float32)
  return u2.U2MoeModel(config).apply(
    {'params': variables['params']},
    features,
    jnp.array([5, 5]),  # padding goes to no expert, so it may differ
    variables['buffers'],
    cache,
    method='encode_chunk',
  )


def test_groups_hand_states_and_statistics_to_the_right_block(pair):
  rng = np.random.default_rng(1)
  cache = cache_lib.init_cache(pair.dense.encoder, batch=2, capacity=4)
  cache = jax.tree.map(
    lambda a: (
      a + rng.normal(size=a.shape).astype(np.float32)
      if a.dtype == jnp.float32
      else a + 3
    ),
    cache,
  )
  # A router of zeros tells its statistics from others.
  router = pair.grouped['params']['encoder']['blocks']['block_1']['ffn_final'][
    'router'
  ]
  router['kernel'] = router['kernel'].at[1].set(0.0)
  expected, expected_cache = _chunk(pair.dense, pair.variables, cache)
  output, new_cache = _chunk(pair.config, pair.grouped, cache)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  close(output.block_outputs, expected.block_outputs)
  jax.tree.map(close, new_cache, expected_cache)
  logits = np.asarray(output.moe['final'].logits)
  assert logits.shape[0] == 2  # blocks 1 and 3
  assert logits[0].any()
  assert not logits[1].any()
  # Caches of other blocks would have shown.
  swapped = jax.tree.map(lambda a: a[::-1] if a.ndim > 1 else a, cache)
  other, _ = _chunk(pair.config, pair.grouped, swapped)
  assert np.abs(other.frames - expected.frames).max() > 1e-2
