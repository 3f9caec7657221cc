"""The upcycling study on tones: a few steps of a grown model."""

import dataclasses
import itertools
import json
import os
import shutil
import types

import jax
import numpy as np
import pytest

from data_pipelines import synthetic
from experiments.configs import base
from experiments.configs import tiny
from experiments.studies import design
from experiments.studies import running
from experiments.studies import study
from experiments.wiring import preparing
from experiments.wiring import receipt
from experiments.wiring import training
from experiments.wiring import upcycling
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.training import parameters

_CHANGES = {
  'data.num_workers': 1,
  'data.batch_frames': 2000,
  'data.max_batch_size': 8,
  'mesh.data': 1,
  'model.encoder.num_blocks': 1,
  # What compiles fastest: CTC alone, no scan, and experts as one product.
  'model.encoder.scan_blocks': False,
  'model.decoder.num_reverse_blocks': 0,
  'model.decoder.num_blocks': 0,
  'model.encoder.moe.executor': 'dense',
  'decode.mode': 'ctc_greedy_search',
}


def _tree():
  dense = base.with_experts(tiny.get_config(), num_experts=0)
  config = config_lib.from_dict(config_lib.Config, dense.to_dict())
  for path, value in _CHANGES.items():
    config = config_lib.replace(config, path, value)
  return config_lib.to_dict(config)


_NUM_UTTERANCES = 8
# Receipts have tests of their own.
_ANSWER = receipt.Answer(
  frames=np.zeros((1, 1, 1), np.float32),
  mask=np.ones((1, 1), bool),
  log_probs={'ctc': np.zeros((1, 1, 1), np.float32)},
  texts=((),),
  visited=0,
  experts=0,
)


@pytest.fixture(scope='module', autouse=True)
def cheap():
  """One device, two arms, no receipts."""
  devices = jax.devices
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *args: devices(*args)[:1])
    # The others are as these (design_test).
    patch.setitem(design.LETTERS, 'an4', 'ae')
    patch.setattr(receipt, 'ask', lambda *args, **kwargs: _ANSWER)
    yield


@pytest.fixture(scope='module')
def request_(tmp_path_factory):
  """Two arms on tones in place of recordings."""
  folder = tmp_path_factory.mktemp('tones')
  source = synthetic.write_corpus(
    folder, num_utterances=_NUM_UTTERANCES, seed=1
  )
  for split in ('train', 'dev', 'test'):
    shutil.copy(source, folder / f'{split}.jsonl')
  return study.Request(
    form='quick',
    studies=('an4',),
    dense_steps=4,
    more_steps=4,
    every=2,
    config={},
    an4_config=_tree(),
    an4=str(folder),
    growth=upcycling.Request(num_experts=4),
  )


@pytest.fixture(scope='module')
def workdir(request_, tmp_path_factory):
  path = tmp_path_factory.mktemp('study')
  _leave_dense_arm(_arms(request_, path)['a'], path)
  said = []
  assert study.run(request_, path, say=said.append)
  assert '  done already' in said[:2]
  return path


def _leave_dense_arm(arm, root):
  """What an earlier sitting left of the dense arm; its weights are random.

  Another training would take as long again, and trainings have tests.
  """
  folder = root / arm.folder
  config = preparing.prepare(arm.config, folder).config
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype),
    directory.abstract_variables(config.model),
  )
  directory.write(
    folder / 'model',
    directory.Description(config.model, config.data.features),
    **variables,
    tokens=folder / 'tokens',
  )
  entry = {
    'asked': running._asked(arm),
    'study': arm.study,
    'seed': arm.seed,
    'letter': arm.letter,
    'title': design.TITLES[arm.letter],
    'start': arm.start,
    'search': arm.decode.mode,
    'wall_seconds': 9.0,
    'updates': 4,
    'seconds': 3.0,
    'dev': [{'step': 4, 'wer': 90.0, 'seconds': 3.0}],
    'wer': {'an4': dict.fromkeys(('dev', 'greedy', 'test'), 90.0)},
    'errors': {'an4': [2] * _NUM_UTTERANCES},
    'parameters': 1000,
    'active_parameters': 1000,
    'trainable_parameters': 1000,
    'trainable_bytes': 4000,
    'moment_bytes': 8000,
  }
  preparing.write_json(folder / 'arm.json', entry)


@pytest.fixture(scope='module')
def arms(workdir):
  """Entries of study.json by letter."""
  record = json.loads((workdir / 'study.json').read_text())
  return {entry['letter']: entry for entry in record['arms']}


def test_every_arm_is_trained_and_measured(arms):
  assert list(arms) == ['a', 'e']
  steps = {
    letter: [point['step'] for point in entry['dev']]
    for letter, entry in arms.items()
  }
  assert steps == {'a': [4], 'e': [2, 4]}
  entry = arms['e']
  assert entry['updates'] == 4
  assert 0 < entry['seconds'] < entry['wall_seconds']
  assert list(entry['wer']['an4']) == ['dev', 'greedy', 'test']
  assert 0 <= entry['load_low'] < 1 / 4 < entry['load_high'] <= 1


def test_moments_weigh_what_trains(arms):
  entry = arms['e']
  share = entry['moment_bytes'] / (2 * entry['trainable_bytes'])
  assert share == pytest.approx(1, rel=0.01)
  # Not what moments of all parameters would weigh.
  assert entry['moment_bytes'] < 0.9 * 2 * 4 * entry['parameters']


def test_only_experts_and_routers_move_in_the_frozen_arm(workdir):
  start = directory.restore(directory.find(workdir / 'an4-0' / 'a' / 'grown'))
  trained = directory.restore(directory.find(workdir / 'an4-0' / 'e'))
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), start[0], trained[0])
  is_chosen = parameters.selector(design.FROZEN_ARM_TRAINS)
  found = {is_chosen(path): [] for path in parameters.paths(moved)}
  for path, value in parameters.paths(moved).items():
    found[is_chosen(path)].append(value)
  assert all(found[True])
  assert not any(found[False])


def test_tables_and_plots_are_written(workdir):
  text = (workdir / 'study.md').read_text()
  assert text.startswith('## Upcycling, quick form\n')
  assert 'Updates of (a), and of what continues it: an4: 4 and 4.' in text
  assert '### AN4 (recordings), seed 0' in text
  assert '| (e) UME, experts and routers train | 4 | 8 |' in text
  names = {path.name for path in (workdir / 'plots').iterdir()}
  assert names == {'an4-0.png', 'an4-0-e-load.png'}


def test_a_second_run_repeats_nothing(workdir, request_, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('trained or decoded again')

  monkeypatch.setattr(training, 'train', refuse)
  monkeypatch.setattr(running, '_decode', refuse)
  before = (workdir / 'study.json').read_text()
  assert study.run(request_, workdir)
  assert (workdir / 'study.json').read_text() == before
  # What has no result yet is trained.
  (workdir / 'an4-0' / 'e' / 'arm.json').rename(workdir / 'kept')
  try:
    with pytest.raises(AssertionError, match='again'):
      study.run(request_, workdir)
  finally:
    (workdir / 'kept').rename(workdir / 'an4-0' / 'e' / 'arm.json')


@pytest.mark.parametrize(
  ('changes', 'key'),
  [
    ({'more_steps': 6}, 'config.train.num_steps'),
    ({'rate': 0.1}, 'config.optimizer.learning_rate'),
    ({'growth': upcycling.Request(num_experts=2)}, 'growth.num_experts'),
  ],
)
def test_an_arm_is_not_continued_as_another(workdir, request_, changes, key):
  other = dataclasses.replace(request_, **changes)
  with pytest.raises(config_lib.ConfigError, match=f'/e holds.*{key}'):
    study.run(other, workdir)


def test_a_grown_model_is_not_taken_for_another(workdir, request_):
  other = dataclasses.replace(request_, growth=upcycling.Request(num_experts=2))
  arms = _arms(other, workdir)
  with pytest.raises(config_lib.ConfigError, match='num_experts=4, not 2'):
    running._source(arms['e'], workdir, print)


def test_a_growth_that_changes_the_model_stops_the_study(
  request_, tmp_path, monkeypatch
):
  monkeypatch.setattr(upcycling, 'upcycle', lambda *args, **kwargs: False)
  with pytest.raises(running.ReceiptError, match='not compute the same'):
    running._source(_arms(request_, tmp_path)['e'], tmp_path, print)


def _arms(request, workdir):
  corpora = dict(study._corpora(request, workdir))
  recipe, lengths = request.recipe('an4'), request.lengths('an4')
  made = design.arms('an4', 0, recipe, lengths, corpora)
  return {arm.letter: arm for arm in made}


def test_a_signal_stops_between_steps_and_time_adds_up(
  request_, tmp_path, monkeypatch
):
  clock = itertools.count(0, 10)
  fake = types.SimpleNamespace(monotonic=lambda: next(clock))
  monkeypatch.setattr(running, 'time', fake)

  def stopped(config, workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / 'config.json').touch()
    return False

  monkeypatch.setattr(training, 'train', stopped)
  for sitting in (1, 2):
    said = []
    assert not study.run(request_, tmp_path, say=said.append)
    assert said[-1] == 'stopped; run again to continue'
    known = json.loads((tmp_path / 'an4-0' / 'a' / 'arm.json').read_text())
    assert known['wall_seconds'] == 10 * sitting
  assert not (tmp_path / 'study.md').exists()


def test_time_before_a_kill_counts(request_, tmp_path):
  arm = _arms(request_, tmp_path)['a']
  folder = tmp_path / arm.folder
  folder.mkdir(parents=True)
  known = {'asked': running._asked(arm), 'wall_seconds': 10.0}
  for name in ('config.json', 'metrics.jsonl'):
    (folder / name).touch()
  for sitting, expected in (({'sitting': True}, 17.0), ({}, 10.0)):
    preparing.write_json(folder / 'arm.json', known | sitting)
    os.utime(folder / 'arm.json', (1000, 1000))
    os.utime(folder / 'metrics.jsonl', (1007, 1007))
    entry = running._begin(arm, folder)
    assert entry['wall_seconds'] == expected
    assert 'sitting' not in entry


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'an4': None}, 'needs recordings; give --an4'),
    ({'studies': ('ted',)}, "no 'ted'; there are builtin, an4, shift"),
    ({'studies': ('shift',)}, 'add that one'),
    ({'more_steps': 3}, 'more=3 updates must be a multiple of the 2'),
    ({'more_steps': 0}, 'more=0 updates must be a multiple of the 2'),
    ({'an4': '/nowhere'}, 'train.jsonl: no such manifest'),
  ],
)
def test_bad_requests_come_before_any_work(
  request_, changes, message, tmp_path
):
  with pytest.raises(config_lib.ConfigError, match=message):
    study.run(dataclasses.replace(request_, **changes), tmp_path)
  assert not list(tmp_path.iterdir())
