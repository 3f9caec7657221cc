"""A grown model is the dense one; what is changed is changed as asked."""

import dataclasses
import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.wiring import receipt as receipt_lib
from experiments.wiring import upcycling as wiring
from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.layers import moe
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.training import upcycling

_DENSE = config_lib.replace(
  tiny.model_config(decoders=2), 'decoder.num_reverse_blocks', 0
)


_abstract = functools.cache(directory.abstract_variables)


@functools.cache
def _variables():
  _, params, buffers = tiny.init(_DENSE)
  return {'params': params, 'buffers': buffers}


def _flat(tree):
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {path: np.asarray(leaf) for path, leaf in flat.items()}


@functools.cache
def _grow(where='all', top_k=2, change=None):
  target = upcycling.moe_config(_DENSE, num_experts=4, top_k=top_k, where=where)
  read = _flat(_variables()).__getitem__
  abstract = _abstract(target)
  return target, upcycling.build(read, _DENSE, target, abstract, change)


@functools.cache
def _answer():
  """What the dense model says, and to what."""
  variables = _variables()
  probe = receipt_lib.synthetic_probe(
    _DENSE, variables['buffers'], num_utterances=3
  )
  return probe, receipt_lib.ask(_DENSE, **variables, probe=probe)


def _receipt(target, variables):
  probe, before = _answer()
  for part in ('encoder', 'decoder'):  # it compiles fastest
    target = config_lib.replace(target, f'{part}.moe.executor', 'dense')
  after = receipt_lib.ask(target, **variables, probe=probe)
  return receipt_lib.compare(before, after)


@pytest.mark.parametrize(
  ('where', 'top_k', 'experts'),
  [
    ('all', 4, 24),
    ('encoder', 2, 16),
    ('decoder', 3, 8),
    ('final_ffn', 2, 8),
    ('encoder.[01].macaron,decoder.0', 3, 12),
  ],
)
def test_a_receipt_for_every_where(where, top_k, experts):
  target, variables = _grow(where, top_k=top_k)
  receipt = _receipt(target, variables)
  assert receipt.is_within_bounds, receipt
  assert receipt.experts == experts
  assert receipt.text_tokens > 0


def test_the_grown_model_is_the_dense_one():
  target, variables = _grow('every:2', top_k=3)
  assert target.expert_blocks == {
    'encoder.macaron': (1,),
    'encoder.final': (1,),
    'forward_decoder.ffn': (1,),
  }
  assert upcycling.is_exact(target, upcycling.Change())
  receipt = _receipt(target, variables)
  assert receipt.is_within_bounds, receipt
  assert receipt.encoder_difference < 2e-6
  assert receipt.experts_visited == receipt.experts == 12
  # One expert of one layer that is no copy, and it is not.
  for place in (
    ('encoder', 'blocks', 'block_1', 'ffn_final'),
    ('forward_decoder', 'layers', 'block_1', 'ffn'),
  ):
    bad = jax.tree.map(lambda leaf: leaf, variables)
    layer = functools.reduce(dict.__getitem__, place, bad['params'])
    layer['w_out'] = layer['w_out'].at[0, 2].multiply(1.01)
    assert not _receipt(target, bad).is_within_bounds


@pytest.mark.parametrize(
  ('where', 'encoder', 'decoder'),
  [
    ('all', 'all', 'all'),
    ('encoder', 'all', None),
    ('decoder', None, 'all'),
    ('final_ffn', 'final', None),
    ('macaron,final', 'all', None),
    ('every:2', 'every:2', 'every:2'),
    ('encoder.every:2,decoder.ffn', 'every:2', 'ffn'),
    ('encoder.1.final_ffn', '1.final', None),
    ('encoder.[1-9].*', '1.macaron,1.final', None),
    ('*.0.f*', '0.final', '0.ffn'),
    ('*', 'all', '0.ffn,1.ffn'),
  ],
)
def test_where_is_split_by_part(where, encoder, decoder):
  target = upcycling.moe_config(_DENSE, num_experts=4, top_k=2, where=where)
  for part, expected in (('encoder', encoder), ('decoder', decoder)):
    config = getattr(target, part).moe
    assert (config.where if config.num_experts else None) == expected


def test_numbers_that_are_none_are_no_match():
  _, before = _answer()
  broken = dataclasses.replace(before, frames=before.frames * np.nan)
  assert receipt_lib.compare(before, before).is_within_bounds
  assert not receipt_lib.compare(before, broken).is_within_bounds


def test_another_text_is_no_match():
  """Even if all numbers are within their bounds."""
  _, before = _answer()
  first, *rest = before.texts
  other = dataclasses.replace(before, texts=((*first, 1), *rest))
  receipt = receipt_lib.compare(before, other)
  assert receipt.texts_equal == receipt.utterances - 1
  assert receipt.encoder_difference == receipt.log_prob_difference == 0.0
  assert not receipt.is_within_bounds


def test_in_float64_it_is_exact():
  """On the path that counts, without the receipt's own float32."""
  dense = dataclasses.replace(
    tiny.model_config(decoders=1, num_blocks=1), dtype='float64'
  )
  with jax.enable_x64(True):
    _, params, buffers = tiny.init(dense)
    widen = lambda leaf: jnp.asarray(leaf, jnp.float64)
    variables = jax.tree.map(widen, {'params': params, 'buffers': buffers})
    target = upcycling.moe_config(dense, num_experts=4, top_k=2)
    for part in ('encoder', 'decoder'):
      target = config_lib.replace(target, f'{part}.moe.executor', 'dense')
    grown = upcycling.upcycle(variables, dense, target)
    assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {
      np.dtype(np.float64)
    }
    probe = receipt_lib.synthetic_probe(dense, buffers, num_utterances=2)
    probe = dataclasses.replace(
      probe, features=probe.features.astype(np.float64)
    )
    before = receipt_lib.ask(dense, **variables, probe=probe)
    after = receipt_lib.ask(target, **grown, probe=probe)
  assert before.frames.dtype == np.float64
  assert set(before.log_probs) == {'ctc', 'forward', 'backward'}
  receipt = receipt_lib.compare(before, after)
  assert receipt.encoder_difference < 1e-12
  assert receipt.log_prob_difference < 1e-12
  # In float32 it is not, so the bound tells the two apart.
  in_float32 = jax.tree.map(lambda x: np.float32(x).astype(x.dtype), grown)
  with jax.enable_x64(True):
    rounded = receipt_lib.ask(target, **in_float32, probe=probe)
  assert receipt_lib.compare(before, rounded).encoder_difference > 1e-12


def test_top_1_scales_by_the_probability():
  """What `softmax_topk` does not preserve, and what it does."""
  rng = np.random.default_rng(0)
  dense = {
    'w_in': rng.normal(size=(6, 10)),
    'b_in': rng.normal(size=10),
    'w_out': rng.normal(size=(10, 6)),
    'b_out': rng.normal(size=6),
  }
  params = {k: np.stack([v] * 4).astype(np.float32) for k, v in dense.items()}
  router = rng.normal(size=(6, 4)).astype(np.float32)
  x = rng.normal(size=(1, 5, 6)).astype(np.float32)
  hidden = np.maximum(x @ dense['w_in'] + dense['b_in'], 0)
  expected = hidden @ dense['w_out'] + dense['b_out']
  logits = np.exp(x @ router)
  share = logits.max(-1, keepdims=True) / logits.sum(-1, keepdims=True)
  for top_k, scale in ((1, share), (4, 1.0)):
    config = tiny.moe(top_k=top_k, router_type='softmax_topk', executor='dense')
    output, _ = jax.jit(moe.MoeFeedForward(config, 10).apply)(
      {
        'params': jax.tree.map(jnp.asarray, params)
        | {'router': {'kernel': router}}
      },
      jnp.asarray(x),
      jnp.ones((1, 5), bool),
    )
    np.testing.assert_allclose(output, scale * expected, rtol=1e-4, atol=1e-4)
    target = config_lib.replace(
      _DENSE, 'encoder.moe', dataclasses.asdict(config)
    )
    assert upcycling.is_exact(target, upcycling.Change()) == (top_k == 4)


def test_everything_else_is_kept_and_routers_are_random():
  target, grown = _grow('every:2')
  old, new = _flat(_variables()), _flat(grown)
  np.testing.assert_array_equal(
    new['params/ctc/kernel'], old['params/ctc/kernel']
  )
  np.testing.assert_array_equal(
    new['buffers/cmvn/mean'], old['buffers/cmvn/mean']
  )
  block = 'params/encoder/blocks'
  np.testing.assert_array_equal(
    new[f'{block}/block_0/ffn_final/w_in/kernel'][0],
    old[f'{block}/ffn_final/w_in/kernel'][0],
  )
  for expert in range(4):
    np.testing.assert_array_equal(
      new[f'{block}/block_1/ffn_final/b_out'][0, expert],
      old[f'{block}/ffn_final/w_out/bias'][1],
    )
  _, whole = _grow('all')
  routers = [
    leaf[i]
    for path, leaf in _flat(whole).items()
    if path.endswith('router/kernel')
    for i in range(len(leaf))
  ]
  assert len(routers) == 6
  for i, router in enumerate(routers):
    assert 0.1 < np.abs(router).max() <= 16**-0.5
    assert len(np.unique(router)) == router.size
    assert all(np.abs(router - other).max() > 0.05 for other in routers[:i])
  assert target.encoder.moe.where == 'every:2'
  assert target.decoder.moe.where == 'every:2'


def test_there_and_back_is_the_same():
  for where in ('all', 'every:2'):
    target, grown = _grow(where)
    dense = upcycling.dense_config(target)
    assert dense == _DENSE
    back = upcycling.upcycle(grown, target, dense)
    jax.tree.map(np.testing.assert_array_equal, back, _variables())
  target, noisy = _grow(change=upcycling.Change(noise=0.1))
  back = _flat(upcycling.upcycle(noisy, target, _DENSE))
  name = 'params/encoder/blocks/ffn_final/w_in/kernel'
  mean = _flat(noisy)['params/encoder/blocks/ffn_final/w_in'].mean(axis=1)
  np.testing.assert_allclose(back[name], mean, rtol=1e-5, atol=1e-6)


def _experts(change, name='w_in'):
  """One layer's array of block 1: experts, and what they come from."""
  path = 'params/encoder/blocks/ffn_final'
  part = {'w': 'kernel', 'b': 'bias'}[name[0]]
  flat = _flat(_grow('final', change=change)[1])
  dense = _flat(_variables())[f'{path}/w_{name[2:]}/{part}']
  return flat[f'{path}/{name}'][1], dense[1]


@pytest.mark.parametrize('name', ['w_in', 'b_in', 'w_out', 'b_out'])
def test_noise_is_relative(name):
  experts, dense = _experts(upcycling.Change(noise=0.5), name)
  noise = (experts - dense[None]) / dense.std()
  assert np.abs(noise.std() - 0.5) < 0.2  # b_out has 64 numbers
  assert np.abs(noise[0] - noise[1]).max() > 0.1
  other, _ = _experts(upcycling.Change(noise=0.5, seed=1), name)
  assert np.abs(experts - other).max() > 0.1


def test_drop_draws_a_share_of_the_hidden_units_anew():
  change = upcycling.Change(drop=0.25)
  units = []
  for name, axis in (('w_in', 1), ('b_in', 0), ('w_out', 0)):
    experts, dense = _experts(change, name)
    differs = experts != dense[None]
    if differs.ndim == 3:  # a unit is dropped whole
      rest = tuple({1, 2} - {axis + 1})
      np.testing.assert_array_equal(differs.any(rest), differs.all(rest))
      differs = differs.any(rest)
    units.append(differs)
    assert np.abs(experts).max() < 3 * np.abs(dense).max()
  assert (units[0].sum(axis=1) == 6).all()  # of 24, in each expert
  np.testing.assert_array_equal(units[0], units[1])
  np.testing.assert_array_equal(units[0], units[2])
  assert (units[0][0] != units[0][1]).any()
  experts, dense = _experts(change, 'b_out')
  np.testing.assert_array_equal(experts, np.stack([dense] * 4))


def test_no_device_gets_more_than_its_share():
  """And what it gets does not depend on the mesh."""
  change = upcycling.Change(noise=0.1)
  target, expected = _grow(change=change)
  mesh = mesh_lib.make_mesh(wiring.parse_mesh('data=1,fsdp=2,expert=4'))
  source, asked = _flat(_variables()), []

  def read(path):
    asked.append(path)
    return source[path]

  abstract = wiring._abstract(target, mesh)
  made = upcycling.build(read, _DENSE, target, abstract, change)
  jax.tree.map(np.testing.assert_array_equal, made, expected)
  kernel = made['params']['encoder']['blocks']['ffn_final']['w_in']
  shards = {shard.data.shape for shard in kernel.addressable_shards}
  assert shards == {(2, 1, 8, 24)}  # of (2, 4, 16, 24)
  # Each array is read once for each that is made of it.
  name = 'params/encoder/blocks/ffn_final/w_in/kernel'
  assert asked.count(name) == 1


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_experts': 1}, 'num_experts=1 must be between'),
    ({'num_experts': 5000}, 'num_experts=5000 must be between'),
    ({'top_k': 1}, 'no gradient.*softmax_topk or top_k=2'),
    ({'top_k': 5}, 'moe.top_k is 5'),
    ({'where': 'encoder.7'}, 'chooses no feed-forward.*2 encoder blocks'),
    ({'where': 'decoder.final'}, 'chooses no feed-forward layer'),
    ({'where': 'nowhere'}, 'cannot be read'),
    ({'where': 'encoder.?.ffn'}, r'encoder\.0\.macaron to decoder\.1\.ffn'),
    ({'where': 'all,decoder.5'}, "where='decoder.5' chooses no"),
  ],
)
def test_what_cannot_be_is_refused(options, message):
  defaults = {'num_experts': 4, 'top_k': 2}
  with pytest.raises(ValueError, match=message):
    upcycling.moe_config(_DENSE, **{**defaults, **options})


def test_parts_that_are_missing_or_have_experts_are_refused():
  grow = functools.partial(upcycling.moe_config, num_experts=4, top_k=2)
  alone = tiny.model_config(decoders=0)
  with pytest.raises(upcycling.UpcyclingError, match='no decoder'):
    grow(alone, where='decoder')
  assert grow(alone).decoder.moe.num_experts == 0
  encoder = grow(_DENSE, where='encoder')
  with pytest.raises(upcycling.UpcyclingError, match='encoder has experts'):
    grow(encoder)
  both = grow(encoder, where='decoder')
  assert set(both.expert_blocks) == set(grow(_DENSE).expert_blocks)
  with pytest.raises(upcycling.UpcyclingError, match='dense already'):
    upcycling.dense_config(_DENSE)
  with pytest.raises(upcycling.UpcyclingError, match='exclude each other'):
    upcycling.Change(noise=0.1, drop=0.1)


@pytest.mark.parametrize('change', [{'noise': -1.0}, {'drop': 1.5}])
def test_a_change_out_of_range_is_refused(change):
  with pytest.raises(upcycling.UpcyclingError, match=next(iter(change))):
    upcycling.Change(**change)
