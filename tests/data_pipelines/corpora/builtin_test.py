"""The built-in corpus as a source: the engine's samples, by number."""

import pickle

import numpy as np
import pytest

from data_pipelines import sources
from data_pipelines.corpora import builtin
from data_pipelines.corpora import espeak


@pytest.fixture(scope='module')
def scripts():
  sizes = {'num_train': 2, 'num_dev': 1, 'num_test': 1}
  return espeak.write_scripts(seed=3, **sizes)['train']


def test_samples_are_the_engine_s(scripts):
  source = builtin.SpokenSource(scripts)
  again = pickle.loads(pickle.dumps(source))
  for index in (1, 0):
    expected = espeak.record(scripts[index])
    assert source.utterances[index].txt == expected.txt
    assert dict(source.utterances[index].extra) == dict(expected.extra)
    samples = (expected.audio / 32768).astype(np.float32)
    np.testing.assert_array_equal(source.load(index), samples)
    np.testing.assert_array_equal(again.load(index), samples)
    assert source.header(index).seconds == expected.duration


def test_what_was_measured_is_not_spoken_again(scripts, monkeypatch):
  source = builtin.SpokenSource(scripts)
  source.header(0)
  expected = source.load(0)
  monkeypatch.setattr(espeak, 'record', None)
  np.testing.assert_array_equal(source.load(0), expected)
  with pytest.raises(TypeError):
    source.load(1)


def test_splits_are_named():
  assert sources.find_splits('builtin:') == ['train', 'dev', 'test']
  with pytest.raises(sources.SourceError, match="no split 'eval'"):
    sources.open_source('builtin:eval')
  source = sources.open_source('builtin:dev', measure=False)
  assert len(source) == 300
  assert source.utterances[0].key == 'dev-00000'
