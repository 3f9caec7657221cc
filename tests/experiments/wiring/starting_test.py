"""Starting from another model: what is kept, what is fresh."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.wiring import starting
from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import parameters
from u2moe_jax.training import state as state_lib

_OLD = tokenizer_lib.build_char_tokenizer(['ABCDEFG'])
_LARGER = tokenizer_lib.build_char_tokenizer(['ABCDEFGH'])
_AS_LARGE = tokenizer_lib.build_char_tokenizer(['ABCDEFX'])


def _model(tokenizer, **encoder):
  model = tiny.model_config(tiny.moe(), **encoder)
  return config_lib.replace(model, 'vocab_size', tokenizer.vocab_size)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """A model directory, and its parameters and buffers."""
  folder = tmp_path_factory.mktemp('pretrained')
  _OLD.save(folder / 'tokens')
  _, params, buffers = tiny.init(_model(_OLD), seed=1)
  directory.write(
    folder / 'model',
    directory.Description(_model(_OLD), config_lib.FeatureConfig()),
    params,
    buffers,
    tokens=folder / 'tokens',
  )
  return folder / 'model', params, buffers


def _source(folder, tokenizer, **encoder):
  config = config_lib.Config(
    model=_model(tokenizer, **encoder),
    train=config_lib.TrainConfig(init_from=str(folder)),
  )
  return starting.find_source(config, tokenizer)


def _started(source, tokenizer, **options):
  """A fresh state, and the same one started from the source."""
  model = _model(tokenizer)
  optimizer = optimizer_lib.make_optimizer(
    config_lib.OptimizerConfig(ema_decay=0.9), num_steps=9, **options
  )
  mesh = mesh_lib.make_mesh(config_lib.MeshConfig(data=4, expert=2))
  target = state_lib.abstract_state_on(
    mesh, u2.U2MoeModel(model), optimizer, u2.init_buffers(model)
  )
  _, params, buffers = tiny.init(model, seed=2)
  fresh = dataclasses.replace(
    target, params=params, buffers=buffers, opt_state=None, step=0
  )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
  fresh = jax.device_put(fresh, dataclasses.replace(shardings, opt_state=None))
  state = source.apply(fresh, optimizer.init)
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(a.sharding, b.sharding),
    state.params,
    target.params,
  )
  return fresh, state


def test_with_the_same_table_all_is_kept(pretrained):
  folder, params, buffers = pretrained
  source = _source(folder, _OLD)
  assert source.fresh == []
  assert 'fresh: none' in source.describe()
  _, state = _started(source, _OLD)
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
  jax.tree.map(np.testing.assert_array_equal, state.buffers, buffers)
  # The moving average starts there too, not at the random parameters.
  average, _ = optimizer_lib.swap_average(state.params, state.opt_state)
  jax.tree.map(np.testing.assert_array_equal, average, params)


@pytest.mark.parametrize('tokenizer', [_LARGER, _AS_LARGE])
def test_with_another_table_the_outputs_are_fresh(pretrained, tokenizer):
  folder, params, _ = pretrained
  source = _source(folder, tokenizer)
  wanted = {
    f'params/{path}'
    for path in parameters.paths(params)
    if parameters.matches(path, 'vocabulary')
  }
  assert set(source.fresh) == wanted
  assert len(source.kept) + len(source.fresh) == len(
    jax.tree.leaves(params)
  ) + len(jax.tree.leaves(pretrained[2]))
  text = source.describe()
  for part in ('ctc/kernel', 'forward_decoder/embedding', 'kept: ', 'encoder'):
    assert part in text
  fresh, state = _started(source, tokenizer)
  old, random = parameters.paths(params), parameters.paths(fresh.params)
  for path, leaf in parameters.paths(state.params).items():
    kept = not parameters.matches(path, 'vocabulary')
    expected = old if kept else random
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_another_model_is_refused_by_array(pretrained):
  with pytest.raises(directory.CheckpointError) as error:
    _source(pretrained[0], _OLD, num_blocks=3)
  message = str(error.value)
  assert 'train.init_from' in message
  assert '(2, ' in message
  assert '(3, ' in message


def test_nothing_to_start_from(pretrained, tmp_path):
  assert starting.find_source(config_lib.Config(), _OLD) is None
  with pytest.raises(directory.CheckpointError, match='no checkpoint here'):
    _source(tmp_path, _OLD)
