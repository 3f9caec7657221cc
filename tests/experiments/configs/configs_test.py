"""Every experiment file gives a config that resolves and can be built."""

import importlib
import pathlib

import jax
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.models import u2

_FOLDER = pathlib.Path(__file__).parents[3] / 'experiments' / 'configs'
_NAMES = sorted(
  path.stem
  for path in _FOLDER.glob('*.py')
  if path.stem not in ('__init__', 'base')
)


def _module(name):
  return importlib.import_module(f'experiments.configs.{name}')


def test_there_are_configs():
  assert {'quickstart', 'dense_225m', 'dense_1b', 'moe_1b'} <= set(_NAMES)


@pytest.mark.parametrize('name', _NAMES)
def test_it_resolves_and_the_model_has_shapes(name):
  tree = _module(name).get_config().to_dict()
  config = config_lib.from_dict(config_lib.Config, tree)
  # Through JSON-like plain values and back, nothing is lost.
  assert (
    config_lib.from_dict(config_lib.Config, config_lib.to_dict(config))
    == config
  )
  model = config.model
  if not model.vocab_size:
    model = config_lib.replace(model, 'vocab_size', 100)
  shapes = jax.eval_shape(
    lambda key: u2.init_params(u2.U2MoeModel(model), key), jax.random.key(0)
  )
  assert jax.tree.leaves(shapes)


@pytest.mark.parametrize('name', _NAMES)
def test_flags_can_change_keys_but_not_invent_them(name):
  config = _module(name).get_config()
  config.train.num_steps = 7
  assert config.to_dict()['train']['num_steps'] == 7
  with pytest.raises((AttributeError, KeyError), match='num_stepps'):
    config.train.num_stepps = 7


@pytest.mark.parametrize('name', _NAMES)
def test_it_tells_its_story(name):
  text = _module(name).__doc__
  for part in ('Command:', 'Hardware:', 'Expected:'):
    assert part in text, part
