"""Shardings of a whole model, and of a batch."""

import jax
import numpy as np
import pytest

from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules


def _mesh(**sizes):
  return mesh_lib.make_mesh(config_lib.MeshConfig(**sizes))


def _shardings(config, mesh):
  model = u2.U2MoeModel(config)
  boxed = jax.eval_shape(
    lambda key: u2.init_params(model, key), jax.random.key(0)
  )
  return placement.shardings(boxed, mesh, rules.STANDARD)


def test_axes_go_where_the_table_says():
  config = config_lib.replace(tiny.model_config(tiny.moe()), 'vocab_size', 12)
  tree = _shardings(config, _mesh(data=1, fsdp=2, expert=2, tensor=2))
  block = tree['encoder']['blocks']
  spec = lambda sharding: tuple(sharding.spec)
  assert spec(block['ffn_final']['w_in']) == (None, 'expert', 'fsdp', 'tensor')
  assert spec(block['ffn_final']['w_out']) == (None, 'expert', 'tensor', 'fsdp')
  query = block['attention']['query']['kernel']
  assert spec(query) == (None, 'fsdp', 'tensor', None)
  assert spec(tree['ctc']['kernel']) == ('fsdp', 'tensor')
  assert not any(spec(block['norm_output']['scale']))


@pytest.mark.parametrize(
  ('sizes', 'named'),
  [
    ({'expert': 8}, r'expert=8.*4.*ffn_(final|macaron)|ffn'),
    ({'tensor': 8}, 'tensor=8'),
  ],
)
def test_an_axis_that_does_not_divide_is_named(sizes, named):
  with pytest.raises(mesh_lib.MeshError, match=named) as error:
    _shardings(tiny.model_config(tiny.moe()), _mesh(**sizes))
  assert 'does not divide' in str(error.value)
  assert "['" in str(error.value)  # the parameter


def test_ten_heads_do_not_go_to_four_devices():
  config = tiny.model_config(decoders=0, model_dim=40, num_heads=10)
  config = config_lib.replace(config, 'vocab_size', 12)
  with pytest.raises(mesh_lib.MeshError) as error:
    _shardings(config, _mesh(data=2, tensor=4))
  message = str(error.value)
  assert "tensor=4 does not divide the 10 of axis 'heads'" in message
  assert "['attention']" in message


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
  mesh = _mesh(data=2, expert=4)
  sharding = placement.batch_sharding(mesh, rules.STANDARD)
  with pytest.raises(mesh_lib.MeshError, match=r'=8 .* batch of 12 utter'):
    placement.shard_batch({'x': np.zeros((12, 2))}, sharding)


def test_a_batch_is_split_over_all_but_tensor():
  mesh = _mesh(data=2, expert=2, tensor=2)
  assert placement.batch_parts(mesh, rules.STANDARD) == 4
  sharding = placement.batch_sharding(mesh, rules.STANDARD)
  batch = {'x': np.arange(24.0).reshape(8, 3), 'n': np.arange(8)}
  placed = placement.shard_batch(batch, sharding)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert placed['x'].addressable_shards[0].data.shape == (2, 3)
  alone = placement.replicated(mesh)
  whole = jax.device_put(batch['x'], alone)
  assert whole.addressable_shards[0].data.shape == (8, 3)
