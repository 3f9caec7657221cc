"""Starting from another model: what is kept, what is fresh."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


@pytest.mark.parametrize('trainable', ['', 'experts,router'])
def test_moments_of_the_model_are_taken(pretrained, tmp_path, trainable):
  _, params, buffers = pretrained
  moments = {
    name: jax.tree.map(lambda leaf, seed=seed: seed + jnp.abs(leaf), params)
    for seed, name in ((1, 'mu'), (2, 'nu'))
  }
  directory.write(
    tmp_path / 'model',
    directory.Description(_model(_OLD), config_lib.FeatureConfig()),
    params,
    buffers,
    tokens=pretrained[0] / 'tokens',
    moments={**moments, 'count': np.asarray(90, np.int32)},
  )
  source = _source(tmp_path / 'model', _LARGER)
  assert 'moments are those that it was given' in source.describe()
  _, state = _started(source, _LARGER, trainable=trainable)
  (adam,) = _states(state.opt_state, optax.ScaleByAdamState)
  (schedule,) = _states(state.opt_state, optax.ScaleByScheduleState)
  assert (adam.count, schedule.count) == (90, 0)
  found, given = parameters.paths(adam.nu), parameters.paths(moments['nu'])
  assert set(map(parameters.selector(trainable), found)) == {True}
  for path, leaf in found.items():
    # What hangs on the tokens is fresh, and so are its moments.
    fresh = parameters.matches(path, 'vocabulary')
    expected = np.zeros(leaf.shape) if fresh else given[path]
    np.testing.assert_array_equal(leaf, expected, err_msg=path)
  # Without the folder they are zero.
  shutil.rmtree(tmp_path / 'model' / 'moments')
  _, state = _started(_source(tmp_path / 'model', _LARGER), _LARGER)
  (adam,) = _states(state.opt_state, optax.ScaleByAdamState)
  assert not any(leaf.any() for leaf in jax.tree.leaves(adam))


def _states(tree, kind):
  leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
  return [leaf for leaf in leaves if isinstance(leaf, kind)]


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
