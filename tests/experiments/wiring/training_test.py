"""Training from a config to a model directory, on tones."""

import errno
import json
import os
import re
import tempfile

import jax
import numpy as np
import pytest

from data_pipelines import synthetic
from experiments.configs import tiny
from experiments.wiring import averaging
from experiments.wiring import preparing
from experiments.wiring import training
from tests.reference import jax_cache
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.training import stopping

_CHANGES = {
  'data.num_workers': 1,
  'data.batch_frames': 2000,
  'data.max_batch_size': 8,
  'mesh.data': 1,
  'model.encoder.num_blocks': 1,
  'model.encoder.moe.num_experts': 0,
  # CTC alone: the training step of the decoders is compiled elsewhere.
  'model.decoder.num_reverse_blocks': 0,
  'model.decoder.num_blocks': 0,
}


def _config(folder, **changes):
  config = config_lib.from_dict(config_lib.Config, tiny.get_config().to_dict())
  manifest = str(folder / 'manifest.jsonl')
  data = {'data.train': manifest, 'data.dev': manifest}
  for path, value in (data | _CHANGES | changes).items():
    config = config_lib.replace(config, path, value)
  return config


def _steps(workdir, kind):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [r['step'] for r in records if r['kind'] == kind]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('tones')
  synthetic.write_corpus(path, num_utterances=16, seed=1)
  return path


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """A mesh of one device, whatever the session has."""
  devices = jax.devices
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *args: devices(*args)[:1])
    yield


@pytest.fixture(scope='module', autouse=True)
def compiled_once(tmp_path_factory):
  """A compilation cache, since the same model is trained several times."""
  with jax_cache.use(tmp_path_factory.mktemp('cache')):
    yield


@pytest.fixture(scope='module')
def workdir(folder, tmp_path_factory):
  """Trained for 4 steps, then continued to 6."""
  path = tmp_path_factory.mktemp('run') / 'work'
  assert training.train(_config(folder), path) is True
  assert _steps(path, 'train') == [1, 2, 4]
  assert _steps(path, 'dev') == [2, 4]
  first = directory.find(path).description.provenance['averaged_steps']
  assert sorted(first) == [2, 4]
  more = _config(folder, **{'train.num_steps': 6})
  assert training.train(more, path) is True
  return path


def test_a_run_continues_where_it_stopped(workdir):
  assert _steps(workdir, 'train') == [1, 2, 4, 6]
  assert _steps(workdir, 'dev') == [2, 4, 6]


def test_the_model_is_the_mean_of_the_averaged_steps(workdir):
  found = directory.find(workdir)
  steps = found.description.provenance['averaged_steps']
  assert len(steps) == 2
  params, buffers = directory.restore(found)
  each = [
    directory.restore(directory.find(workdir / 'checkpoints' / str(step)))[0]
    for step in steps
  ]
  jax.tree.map(
    lambda mean, *parts: np.testing.assert_allclose(
      mean, np.mean(parts, axis=0), atol=1e-6
    ),
    params,
    *each,
  )
  assert np.abs(buffers['cmvn']['mean']).min() > 0
  assert (found.tokens / 'units.txt').is_file()
  assert found.description.model.vocab_size > 8
  assert found.description.features.num_mel_bins == 20


def test_chosen_steps_are_averaged(workdir, tmp_path):
  kept = sorted(int(p.name) for p in directory.step_folders(workdir))
  for options, steps in (
    ({'num': 2, 'by': 'newest'}, kept[:-3:-1]),
    ({'num': 1, 'by': 'wer', 'steps': [str(kept[0])]}, kept[:1]),
  ):
    assert averaging.average(workdir, tmp_path / 'model', **options) == steps
    found = directory.find(tmp_path / 'model')
    assert found.description.provenance['averaged_steps'] == steps
    each = [
      directory.restore(directory.find(workdir / 'checkpoints' / str(step)))
      for step in steps
    ]
    jax.tree.map(
      lambda mean, *parts: np.testing.assert_allclose(
        mean, np.mean(parts, axis=0), atol=1e-6
      ),
      directory.restore(found),
      *each,
    )
  with pytest.raises(directory.CheckpointError, match=r'no step \[5\]'):
    averaging.average(workdir, tmp_path / 'model', num=1, by='wer', steps=['5'])
  with pytest.raises(directory.CheckpointError, match='no checkpoints here'):
    averaging.average(tmp_path, tmp_path / 'other', num=1, by='wer')
  with pytest.raises(directory.CheckpointError, match='it is left alone'):
    averaging.average(workdir, tmp_path, num=1, by='wer')
  assert (tmp_path / 'model' / 'model.json').is_file()


def test_a_finished_run_says_so_and_does_nothing(workdir, folder, capsys):
  before = (workdir / 'metrics.jsonl').read_bytes()
  config = _config(folder, **{'train.num_steps': 6})
  assert training.train(config, workdir) is True
  assert 'training is done (6 steps)' in capsys.readouterr().out
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_a_signal_before_the_first_step_is_no_error(
  folder, tmp_path, monkeypatch
):
  """Behind the warm-up, say; then there is nothing to make a model of."""

  def stopped(self, step):
    assert step == 0
    return True

  monkeypatch.setattr(stopping.StopRequest, 'asked_after', stopped)
  assert training.train(_config(folder), tmp_path) is False
  assert not (tmp_path / 'model').exists()
  assert list((tmp_path / 'checkpoints').iterdir()) == []


def test_a_run_stopped_before_its_first_step_begins_where_it_should(
  workdir, folder, tmp_path, monkeypatch, capsys
):
  source = str(workdir / 'model')
  changes = {
    'train.init_from': source,
    'train.trainable': '-ctc',
    'optimizer.learning_rate': 1e-30,
  }
  with monkeypatch.context() as patch:
    patch.setattr(stopping.StopRequest, 'asked_after', lambda *_: True)
    assert training.train(_config(folder, **changes), tmp_path) is False
  capsys.readouterr()
  assert training.train(_config(folder, **changes), tmp_path) is True
  told = capsys.readouterr().out
  assert 'starting from' in told
  assert re.search(r'ctc +\d+ +0\n', told)  # the table of what trains
  assert 'the others stay as they are\n' in told
  trained, given = map(directory.find, (tmp_path, source))
  jax.tree.map(
    np.testing.assert_allclose,
    directory.restore(trained),
    directory.restore(given),
  )
  # From its first checkpoint on it has weights of its own.
  longer = _config(folder, **changes, **{'train.num_steps': 6})
  assert training.train(longer, tmp_path) is True
  told = capsys.readouterr().out
  assert 'continuing at step 4' in told
  assert 'starting from' not in told


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('optimizer.learning_rate', 0.5),
    ('model.encoder.num_blocks', 3),
    ('data.batch_frames', 3000),
    ('train.seed', 3),
  ],
)
def test_another_experiment_is_refused_by_key(workdir, folder, key, value):
  before = (workdir / 'config.json').read_bytes()
  with pytest.raises(config_lib.ConfigError, match=f"another '{key}'"):
    training.train(_config(folder, **{key: value}), workdir)
  assert (workdir / 'config.json').read_bytes() == before


def test_a_key_that_came_later_had_its_default(workdir, folder):
  file = workdir / 'config.json'
  before = file.read_bytes()
  config = _config(folder, **{'train.num_steps': 6})
  tree = json.loads(before)
  try:
    tree['data'].pop('plan_epochs')
    file.write_text(json.dumps(tree))
    assert training.train(config, workdir) is True
    tree['data']['plan_epochs'] = 7
    file.write_text(json.dumps(tree))
    with pytest.raises(config_lib.ConfigError, match=r"'data\.plan_epochs'"):
      training.train(config, workdir)
  finally:
    file.write_bytes(before)


@pytest.mark.parametrize('part', ['encoder', 'decoder'])
def test_a_router_that_cannot_learn_is_refused(folder, tmp_path, part):
  moe = {'num_experts': 4, 'top_k': 1}
  changes = {f'model.{part}.moe.{key}': value for key, value in moe.items()}
  config = _config(folder, **changes)
  with pytest.raises(config_lib.ConfigError, match=f'model.{part}.moe.*top_k'):
    training.train(config, tmp_path / 'work')
  assert not (tmp_path / 'work').exists()
  trainable = config_lib.replace(
    config, f'model.{part}.moe.router_type', 'softmax_topk'
  )
  preparing.check_trainable(trainable)


def test_no_data_is_refused(tmp_path):
  config = config_lib.Config()
  with pytest.raises(config_lib.ConfigError, match=r'data\.train is empty'):
    training.train(config, tmp_path / 'work')


def test_a_workdir_that_cannot_be_written_is_told(
  folder, tmp_path, monkeypatch
):
  """Permissions do not bind root: a file in the way, and a system that says no."""
  (tmp_path / 'file').write_text('')
  with pytest.raises(
    OSError, match=r'file/work: nothing can be written.*--wor'
  ):
    training.train(_config(folder), tmp_path / 'file' / 'work')

  def refuse(**_):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
  with pytest.raises(OSError, match='Read-only file system'):
    training.train(_config(folder), tmp_path / 'work')
  assert list((tmp_path / 'work').iterdir()) == []


def test_freezing_needs_to_know_what(folder, tmp_path):
  config = _config(folder, **{'train.freeze_steps': 3})
  with pytest.raises(config_lib.ConfigError, match=r'needs train\.trainable'):
    training.train(config, tmp_path / 'work')
  config = _config(folder, **{'train.trainable': 'norms,gates'})
  with pytest.raises(config_lib.ConfigError, match="'gates' matches no"):
    training.train(config, tmp_path / 'work')
  assert not (tmp_path / 'work').exists()
