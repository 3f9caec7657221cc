"""Token table and CMVN statistics: the configured, the corpus's, or new ones."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import mixing
from data_pipelines import synthetic
from experiments.wiring import corpora
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import cmvn
from u2moe_jax.text import tokenizer as tokenizer_lib

_DATA = config_lib.DataConfig(num_workers=1)


@pytest.fixture(scope='module')
def mixture(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tones')
  return mixing.open_mixture(
    str(synthetic.write_corpus(folder, num_utterances=12, seed=1))
  )


@pytest.fixture
def prepared(mixture, tmp_path):
  """The same utterances, said to come from a prepared folder."""
  cmvn.save(
    tmp_path / 'global_cmvn.json',
    cmvn.CmvnStats(np.full(80, 30.0), np.full(80, 100.0), 10),
  )
  tokenizer_lib.build_char_tokenizer(['XYZ']).save(tmp_path / 'tokens')
  return dataclasses.replace(mixture, names=(str(tmp_path),))


def _features(**changes):
  return dataclasses.replace(
    _DATA, features=config_lib.FeatureConfig(**changes)
  )


@pytest.mark.parametrize('changes', [{}, {'dither': 0.0}])
def test_statistics_of_a_prepared_folder_are_used(prepared, changes):
  stats = corpora.first_cmvn(_features(**changes), prepared)
  assert stats.count == 10


@pytest.mark.parametrize(
  'changes',
  [{'mel_floor': 1000.0}, {'num_mel_bins': 40}, {'frame_shift_ms': 12.5}],
)
def test_statistics_of_other_features_are_not(prepared, changes):
  stats = corpora.first_cmvn(_features(**changes), prepared)
  assert stats.count > 100
  assert len(stats.sum) == changes.get('num_mel_bins', 80)


def test_only_the_train_split_has_the_statistics(prepared):
  for suffix, count in ((':train', True), (':dev', False)):
    named = dataclasses.replace(prepared, names=(prepared.names[0] + suffix,))
    assert (corpora.first_cmvn(_DATA, named).count == 10) == count
  joined = dataclasses.replace(prepared, names=prepared.names * 2)
  assert corpora.first_cmvn(_DATA, joined).count > 100


def test_a_configured_file_comes_first(prepared, tmp_path):
  file = tmp_path / 'mine.json'
  cmvn.save(file, cmvn.CmvnStats(np.ones(80), np.ones(80), 3))
  data = dataclasses.replace(_DATA, cmvn=str(file))
  assert corpora.first_cmvn(data, prepared).count == 3
  narrow = dataclasses.replace(
    data, features=config_lib.FeatureConfig(num_mel_bins=40)
  )
  with pytest.raises(config_lib.ConfigError, match=r'mine\.json has 80 bins'):
    corpora.first_cmvn(narrow, prepared)


def test_a_table_of_pieces_is_derived_where_asked_for(mixture, prepared):
  data = dataclasses.replace(_DATA, token_type='bpe', num_tokens=20)
  texts = [utterance.txt for utterance in mixture.source.utterances]
  for source in (mixture, prepared):  # not the table of characters beside it
    tokenizer = corpora.first_tokenizer(data, source)
    assert tokenizer.kind == 'bpe'
    assert tokenizer.vocab_size == 20
    assert max(len(token) for token in tokenizer.tokens[3:]) > 1
    for text in texts:
      ids = tokenizer.encode(text)
      assert tokenizer.special.unk not in ids
      assert tokenizer.decode(ids) == text
    assert sum(len(tokenizer.encode(text)) for text in texts) < sum(
      map(len, texts)
    )


def test_a_table_that_cannot_be_made_names_its_keys(mixture):
  data = dataclasses.replace(_DATA, token_type='bpe', num_tokens=5000)
  with pytest.raises(config_lib.ConfigError, match=r'data\.num_tokens=5000'):
    corpora.first_tokenizer(data, mixture)


def test_other_tables(mixture, prepared, tmp_path):
  chars = corpora.first_tokenizer(_DATA, mixture)
  assert chars.kind == 'char'
  assert 'A' in chars.tokens
  assert corpora.first_tokenizer(_DATA, prepared).tokens[3:] == ('X', 'Y', 'Z')
  named = dataclasses.replace(_DATA, tokens=str(tmp_path / 'tokens'))
  assert corpora.first_tokenizer(named, mixture).tokens[3:] == ('X', 'Y', 'Z')
  bytes_ = dataclasses.replace(_DATA, token_type='bytes')
  assert corpora.first_tokenizer(bytes_, prepared).vocab_size == 259
