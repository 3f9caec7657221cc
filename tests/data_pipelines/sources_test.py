"""Sources: the same utterances and samples by every way of naming them."""

import pathlib
import pickle
import sys

import numpy as np
import pytest
import soundfile

from data_pipelines import corpora
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
  prepare.prepare(folder / 'set', {'train': str(train), 'dev': str(dev)})
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
  assert [u.duration for u in source.utterances] == [None] * 3
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


def test_segments_are_cut_and_measured(tmp_path):
  ramp = np.arange(16000, dtype=np.int16)
  soundfile.write(tmp_path / 'a.wav', ramp, 16000)
  items = [
    manifest.Utterance('a', 'a.wav', 'A', {'start': 0.25, 'end': 0.5}),
    manifest.Utterance('b', 'a.wav', 'B', {'start': 0.75}),
    manifest.Utterance('c', 'a.wav', 'C', {'start': 0.75, 'end': 2.0}),
    manifest.Utterance('d', 'a.wav', 'D', {'start': 0.75, 'end': 0.5}),
  ]
  manifest.write(tmp_path / 'm.jsonl', items)
  source = sources.open_source(f'{tmp_path}/m.jsonl')
  assert [u.duration for u in source.utterances] == [0.25, 0.25, 1.25, None]
  for index, first, last in ((0, 4000, 8000), (1, 12000, 16000)):
    expected = ramp[first:last] / np.float32(32768)
    np.testing.assert_array_equal(source.load(index), expected)
  for index in (2, 3):
    with pytest.raises(audio.AudioError) as caught:
      source.load(index)
    assert caught.value.reason == 'bad_segment'


@pytest.mark.parametrize('rate', [8000, 16000, 24000])
def test_samples_come_at_the_rate_that_is_asked_for(corpus, rate):
  for spec in (f'{corpus}/train/manifest.jsonl', f'{corpus}/set'):
    source = sources.open_source(spec, sample_rate=rate)
    seconds = source.utterances[0].duration
    assert seconds is not None
    assert len(source.load(0)) == pytest.approx(seconds * rate, abs=1)
    assert source.header(0).sample_rate == 16000  # as recorded


def test_kinds_name_what_paths_mean(corpus):
  path = f'{corpus}/train/manifest.jsonl'
  _assert_same(
    sources.open_source(f'manifest:{path}'), sources.open_source(path)
  )
  for spec in (f'prepared:{corpus}/set:dev', f'prepared:{corpus}/set'):
    _assert_same(
      sources.open_source(spec, split='dev'),
      sources.open_source(f'{corpus}/set:dev'),
    )
  assert sources.kinds() == [
    *('aishell', 'builtin', 'kaldi', 'librispeech'),
    *('manifest', 'prepared', 'shards', 'tfds'),
  ]


def test_splits_are_found_where_none_is_named(corpus):
  folder = f'{corpus}/set'
  assert sources.find_splits(folder) == ['train', 'dev']
  assert sources.find_splits(f'{folder}:dev') == ['train']
  assert sources.find_splits(f'{corpus}/train/manifest.jsonl') == ['train']


def test_a_part_of_a_source_is_a_source(corpus):
  manifest_spec = f'{corpus}/train/manifest.jsonl'
  for spec in (
    manifest_spec,
    f'{corpus}/set',
    f'{corpus}/set:dev,{manifest_spec}',
  ):
    source = sources.open_source(spec)
    for first, last in ((0, 1), (1, 3), (0, len(source))):
      part = pickle.loads(pickle.dumps(sources.select(source, first, last)))
      assert list(part.utterances) == list(source.utterances[first:last])
      for index in range(last - first):
        np.testing.assert_array_equal(
          part.load(index), source.load(first + index)
        )
        assert part.header(index) == source.header(first + index)
  plain = sources._Selected(source, 1, 3)  # what others are wrapped in
  assert list(plain.utterances) == list(source.utterances[1:3])
  np.testing.assert_array_equal(plain.load(1), source.load(2))


def test_a_part_travels_without_the_rest(tmp_path):
  path = synthetic.write_corpus(tmp_path, num_utterances=200, seed=1)
  source = sources.open_source(str(path))
  whole = len(pickle.dumps(source))
  assert len(pickle.dumps(sources.select(source, 7, 9))) < whole / 10


def test_a_file_in_corpora_is_a_kind(tmp_path, monkeypatch):
  """Whoever adds a corpus adds one file."""
  (tmp_path / 'toy.py').write_text(
    'from data_pipelines import manifest, sources\n'
    'def open_corpus(path, *, split, sample_rate, tolerant):\n'
    "  item = manifest.Utterance(split, path, 'A')\n"
    '  return sources.FileSource(manifest.table([item]))\n'
  )
  (tmp_path / 'helper.py').write_text('')
  with pytest.raises(sources.SourceError, match="'toy' is no kind"):
    sources.open_source('toy:x')
  monkeypatch.setattr(corpora, '__path__', [*corpora.__path__, str(tmp_path)])
  (utterance,) = sources.open_source('toy:x:dev').utterances
  assert (utterance.key, utterance.wav) == ('train', 'x:dev')
  with pytest.raises(sources.SourceError, match="'helper' is no kind"):
    sources.open_source('helper:x')
  for name in ('toy', 'helper'):
    sys.modules.pop(f'{corpora.__name__}.{name}')


@pytest.mark.parametrize(
  ('spec', 'error', 'message'),
  [
    ('{}/none.jsonl', sources.SourceError, 'none.jsonl: no such manifest'),
    ('{}/none:dev', sources.SourceError, "none (for the split 'dev'): no such"),
    ('{}/set:test', tfds_dataset.DatasetError, "no split 'test'"),
    ('{}/train', tfds_dataset.DatasetError, 'not a prepared data set'),
    (' , ', sources.SourceError, 'no data is named'),
    ('{0}/set,{0}/set', sources.SourceError, 'occurs in two'),
    ('kaldy:{}', sources.SourceError, "'kaldy' is no kind of source; there is"),
    ('manifest:{}/no', manifest.ManifestError, 'no such manifest'),
    ('prepared:{}/train', tfds_dataset.DatasetError, 'not a prepared'),
  ],
)
def test_what_cannot_be_opened_is_named(corpus, spec, error, message):
  with pytest.raises(error) as caught:
    sources.open_source(spec.format(corpus))
  assert message in str(caught.value)
