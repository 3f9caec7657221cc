"""Weights of sources: what they mean is told in numbers, or refused."""

import pytest

from data_pipelines import mixing
from data_pipelines import synthetic


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpora')
  sizes = {'a': 3, 'b': 5}
  for seed, (name, size) in enumerate(sizes.items()):
    synthetic.write_corpus(folder / name, num_utterances=size, seed=seed)
  return {name: str(folder / name / 'manifest.jsonl') for name in sizes}


def test_weights_become_shares_of_parts(corpora):
  spec = '{a}*3, {b}*1'.format(**corpora)
  mixture = mixing.open_mixture(spec)
  assert mixture.names == (corpora['a'], corpora['b'])
  assert mixture.shares == (0.75, 0.25)
  assert mixture.parts.tolist() == [0] * 3 + [1] * 5
  keys = [utterance.key for utterance in mixture.source.utterances]
  assert keys[2:4] == ['tones-0-0002', 'tones-1-0000']
  same = mixing.open_mixture({corpora['a']: 0.6, corpora['b']: 0.2})
  assert same.shares == pytest.approx(mixture.shares)
  assert same.parts.tolist() == mixture.parts.tolist()


def test_without_weights_nothing_is_mixed(corpora):
  mixture = mixing.open_mixture('{a},{b}'.format(**corpora))
  assert mixture.shares == ()
  assert len(mixture.source) == 8
  assert not mixture.parts.any()


def test_a_path_with_a_star_is_a_path(tmp_path):
  folder = tmp_path / 'x*0'
  synthetic.write_corpus(folder, num_utterances=2, seed=0)
  (folder / 'manifest.jsonl').rename(folder / 'm*0.5')
  assert mixing.open_mixture(str(folder / 'm*0.5')).shares == ()
  assert mixing.open_mixture(str(folder / 'm*0.5') + '*2').shares == (1.0,)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('{a}*0.7,{b}', 'some parts have a weight'),
    ('{a}*0,{b}*1', 'is 0.0; it must be positive'),
    ('{a}*1.2.3,{b}*1', 'not a number'),
    ('{a}*1,{a}*2', 'stands twice'),
    ('nothing*1,{b}*1', 'nothing'),
  ],
)
def test_weights_that_make_no_sense_are_refused(corpora, spec, message):
  with pytest.raises(ValueError, match=message):
    mixing.open_mixture(spec.format(**corpora))


def test_an_empty_mapping_is_refused():
  with pytest.raises(mixing.MixtureError, match='no source'):
    mixing.open_mixture({})
