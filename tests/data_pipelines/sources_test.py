"""Sources: the same utterances and samples by every way of naming them."""

import pathlib

import numpy as np
import pytest
import soundfile

from data_pipelines import manifest
from data_pipelines import prepare
from data_pipelines import sources
from data_pipelines import synthetic
from data_pipelines import tfds_dataset
from u2moe_jax.frontend import audio


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> pathlib.Path:
  """A folder with the manifests train and dev, and both packed in `set`."""
  folder = tmp_path_factory.mktemp('corpus')
  train = synthetic.write_corpus(folder / 'train', num_utterances=3, seed=1)
  dev = synthetic.write_corpus(folder / 'dev', num_utterances=2, seed=2)
  prepare.prepare_manifest(folder / 'set', train=train, dev=dev)
  return folder


def _assert_same(a: sources.Source, b: sources.Source) -> None:
  assert [u.key for u in a.utterances] == [u.key for u in b.utterances]
  assert [u.duration for u in a.utterances] == [
    u.duration for u in b.utterances
  ]
  assert len(a) == len(b) == len(a.utterances)
  for index in range(len(a)):
    np.testing.assert_array_equal(a.load(index), b.load(index))


@pytest.mark.parametrize('split', ['train', 'dev'])
def test_data_set_equals_its_manifest(corpus, split):
  _assert_same(
    sources.open_source(f'{corpus}/{split}/manifest.jsonl'),
    sources.open_source(f'{corpus}/set:{split}'),
  )


def test_split_is_train_unless_said_otherwise(corpus):
  folder = f'{corpus}/set'
  _assert_same(
    sources.open_source(folder), sources.open_source(f'{folder}:train')
  )
  _assert_same(
    sources.open_source(folder, split='dev'),
    sources.open_source(f'{folder}:dev'),
  )


def test_commas_join(corpus):
  joined = sources.open_source(
    f'{corpus}/set:dev, {corpus}/train/manifest.jsonl'
  )
  parts = [sources.open_source(f'{corpus}/set:{s}') for s in ('dev', 'train')]
  assert len(joined) == 5
  expected = [part.load(i) for part in parts for i in range(len(part))]
  for index in (4, 0, 1, 2, 3):
    np.testing.assert_array_equal(joined.load(index), expected[index])
  for index in (-1, 5):
    with pytest.raises(IndexError):
      joined.load(index)


def test_samples_are_float32_at_16_khz(tmp_path):
  path = synthetic.write_corpus(
    tmp_path, num_utterances=1, seed=0, sample_rate=8000
  )
  source = sources.open_source(str(path))
  samples = source.load(0)
  assert samples.dtype == np.float32
  duration = source.utterances[0].duration
  assert duration is not None
  assert abs(len(samples) - 16000 * duration) <= 1


def test_unknown_durations_are_measured(corpus, tmp_path):
  known = manifest.read(corpus / 'train/manifest.jsonl')
  bare = [manifest.Utterance(u.key, u.wav, u.txt) for u in known]
  manifest.write(tmp_path / 'm.jsonl', bare)
  source = sources.open_source(str(tmp_path / 'm.jsonl'))
  durations = [u.duration for u in source.utterances]
  assert durations == [u.duration for u in known]


def test_bad_audio_is_known_when_it_is_loaded(tmp_path):
  soundfile.write(tmp_path / 'empty.wav', np.zeros(0, np.int16), 16000)
  (tmp_path / 'text.wav').write_text('no audio')
  names = ('missing', 'text', 'empty')
  items = [manifest.Utterance(name, f'{name}.wav', 'A') for name in names]
  manifest.write(tmp_path / 'm.jsonl', items)
  source = sources.open_source(str(tmp_path / 'm.jsonl'))
  assert [u.duration for u in source.utterances] == [None, None, 0.0]
  reasons = []
  for index in range(3):
    with pytest.raises(audio.AudioError) as caught:
      source.load(index)
    reasons.append(caught.value.reason)
  assert reasons == ['missing', 'unreadable', 'empty']


def test_a_path_with_a_colon_is_a_path(corpus, tmp_path):
  (tmp_path / 'a:b').mkdir()
  known = manifest.read(corpus / 'train/manifest.jsonl')
  manifest.write(tmp_path / 'a:b/m:1.jsonl', known)
  assert len(sources.open_source(f'{tmp_path}/a:b/m:1.jsonl')) == 3


@pytest.mark.parametrize(
  ('spec', 'error', 'message'),
  [
    ('{}/none.jsonl', sources.SourceError, 'none.jsonl: no such manifest'),
    ('{}/none:dev', sources.SourceError, "none (for the split 'dev'): no such"),
    ('{}/set:test', tfds_dataset.DatasetError, "no split 'test'"),
    ('{}/train', tfds_dataset.DatasetError, 'not a prepared data set'),
    (' , ', sources.SourceError, 'no data is named'),
    ('{0}/set,{0}/set', sources.SourceError, 'occurs in two'),
  ],
)
def test_what_cannot_be_opened_is_named(corpus, spec, error, message):
  with pytest.raises(error) as caught:
    sources.open_source(spec.format(corpus))
  assert message in str(caught.value)
