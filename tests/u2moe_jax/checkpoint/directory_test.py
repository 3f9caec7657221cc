"""The model directory: round trip, and what is said of anything else."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import store as store_lib

_CONFIG = tiny.model_config(
  tiny.moe(), conv_norm='batch_norm', batch_norm_padding=True
)
_DESCRIPTION = directory.Description(
  _CONFIG, config_lib.FeatureConfig(num_mel_bins=tiny.BINS), {'step': 12}
)


@pytest.fixture(scope='module')
def variables():
  _, params, buffers = tiny.init(_CONFIG)
  return params, buffers


@pytest.fixture(scope='module')
def written(variables, tmp_path_factory):
  """A work directory with `model/` in it."""
  workdir = tmp_path_factory.mktemp('work')
  tokens = workdir / 'tokens'
  tokens.mkdir()
  (tokens / 'units.txt').write_text('<blank> 0\n')
  directory.write(workdir / 'model', _DESCRIPTION, *variables, tokens=tokens)
  return workdir


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('part', ['model', '.'])
def test_round_trip(written, variables, part):
  found = directory.find(written / part)
  assert found.description == _DESCRIPTION
  assert (found.tokens / 'units.txt').read_text() == '<blank> 0\n'
  assert str(written / 'model') in found.choice
  params, buffers = directory.restore(found)
  _assert_equal((params, buffers), variables)


def test_writing_again_replaces_everything(variables, tmp_path):
  params, buffers = variables
  doubled = jax.tree.map(lambda x: 2 * x, params)
  (tmp_path / 'tokens').mkdir()
  directory.write(
    tmp_path / 'm', _DESCRIPTION, params, buffers, tokens=tmp_path / 'tokens'
  )
  directory.write(tmp_path / 'm', _DESCRIPTION, doubled, buffers)
  found = directory.find(tmp_path / 'm')
  assert found.tokens is None
  _assert_equal(directory.restore(found)[0], doubled)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['m', 'tokens']


def test_a_newer_format_is_refused(written, tmp_path):
  tree = json.loads((written / 'model' / 'model.json').read_text())
  assert tree['format_version'] == 1  # what older programs read
  newer = directory.FORMAT_VERSION + 1
  tree['format_version'] = newer
  (tmp_path / 'model.json').write_text(json.dumps(tree))
  with pytest.raises(directory.CheckpointError, match=f'version {newer}'):
    directory.find(tmp_path)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{', 'not JSON'),
    ('[]', 'no model'),
    ('{}', 'format version None'),
    ('{"format_version": 1, "model": {}}', "no 'features'"),
  ],
)
def test_a_broken_description_is_refused(tmp_path, text, message):
  (tmp_path / 'model.json').write_text(text)
  with pytest.raises(directory.CheckpointError, match=message):
    directory.describe(tmp_path)


def test_missing_folders_are_named(tmp_path):
  with pytest.raises(directory.CheckpointError, match=r'nowhere: no such'):
    directory.find(tmp_path / 'nowhere')
  with pytest.raises(directory.CheckpointError, match='no checkpoint here'):
    directory.find(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(directory.CheckpointError, match='no checkpoint here'):
    directory.find(tmp_path)
  with pytest.raises(directory.CheckpointError, match=r'model.json: no such'):
    directory.describe(tmp_path)


def test_another_model_does_not_fit(written):
  found = directory.find(written)
  dense = tiny.model_config(conv_norm='batch_norm', batch_norm_padding=True)
  description = dataclasses.replace(_DESCRIPTION, model=dense)
  found = dataclasses.replace(found, description=description)
  with pytest.raises(directory.CheckpointError, match='cannot be restored'):
    directory.restore(found)


def test_steps_of_a_work_directory(variables, tmp_path):
  params, buffers = variables
  tree = config_lib.to_dict(
    config_lib.Config(
      model=_CONFIG,
      data=config_lib.DataConfig(features=_DESCRIPTION.features),
    )
  )
  (tmp_path / 'config.json').write_text(json.dumps(tree))
  store = store_lib.Store(tmp_path)
  for step in (9, 10):
    scaled = jax.tree.map(lambda x, step=step: step * x, params)
    store.save(
      step,
      params=scaled,
      buffers=buffers,
      opt_state={'count': jnp.asarray(step)},
      progress={'step': step},
      wer=50.0,
    )
  store.close()
  newest = directory.find(tmp_path)
  assert newest.params.parent.name == '10'  # not '9', the last by letters
  assert 'step 10' in newest.choice
  assert newest.description.model == _CONFIG
  _assert_equal(
    directory.restore(newest)[0], jax.tree.map(lambda x: 10 * x, params)
  )
  older = directory.find(tmp_path / 'checkpoints' / '9')
  _assert_equal(
    directory.restore(older)[0], jax.tree.map(lambda x: 9 * x, params)
  )
