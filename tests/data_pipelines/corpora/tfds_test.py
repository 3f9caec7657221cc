"""TFDS data sets: found by name or folder, read in any order, or refused."""

import pathlib
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines import prepare
from data_pipelines import sources
from data_pipelines import tfds_dataset
from u2moe_jax.frontend import audio

_SOUND = tfds.features.Tensor(shape=(None,), dtype=np.int16)


def _write(data_dir, name, features, examples, *, split='train'):
  """Writes a data set as TFDS itself does; returns its folder."""
  folder = pathlib.Path(data_dir) / name / '1.0.0'
  folder.mkdir(parents=True)
  info = tfds.core.DatasetInfo(
    builder=tfds.core.dataset_info.DatasetIdentity(
      name=name,
      version=tfds.core.Version('1.0.0'),
      data_dir=str(folder),
      module_name='test',
    ),
    features=tfds.features.FeaturesDict(features),
    disable_shuffling=True,
  )
  writer = tfds.core.SequentialWriter(
    info, max_examples_per_shard=2, file_format='array_record'
  )
  writer.initialize_splits([split])
  writer.add_examples({split: examples})
  writer.close_all()
  return folder


def _samples(index):
  rng = np.random.default_rng(index)
  return rng.integers(-3000, 3000, 800 + index, np.int16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  monkeypatch.setattr(
    tfds.core.utils.file_utils.constants, 'DATA_DIR', str(tmp_path)
  )
  features = {
    'speech': _SOUND,
    'text': tfds.features.Text(),
    'id': tfds.features.Text(),
    'sample_rate': np.int32,
    'speaker_id': np.int64,
  }
  examples = [
    {
      'speech': _samples(index),
      'text': 'GRÜSSE' if index else '',
      'id': f'utt{index}',
      'sample_rate': 8000,
      'speaker_id': 10 + index,
    }
    for index in range(5)
  ]
  return _write(tmp_path, 'talks', features, examples)


def test_a_set_is_found_by_name_and_by_folder(folder):
  by_name = sources.open_source('tfds:talks:train')
  by_folder = sources.open_source(f'tfds:{folder}:train')
  assert sources.find_splits('tfds:talks') == ['train']
  assert len(by_name) == len(by_folder) == 5
  for index in (4, 1, 3):
    utterance = by_name.utterances[index]
    assert utterance == by_folder.utterances[index]
    assert utterance.key == f'utt{index}'
    assert utterance.txt == 'GRÜSSE'
    assert utterance.extra['speaker'] == str(10 + index)
    assert utterance.duration == (800 + index) / 8000
    expected = audio.as_mono(_samples(index), 8000)
    np.testing.assert_array_equal(by_name.load(index), expected)
  assert by_name.header(2) == audio.Header(802 / 8000, 8000, 1)


def test_an_empty_transcript_is_named(folder):
  source = sources.open_source(f'tfds:{folder}', measure=False)
  problem = source.utterances[0].problem
  assert problem is not None
  assert problem.reason == 'no_text'
  with pytest.raises(audio.AudioError) as caught:
    source.load(0)
  assert caught.value.reason == 'no_text'


def test_an_open_set_travels_to_another_process(folder):
  source = sources.open_source(f'tfds:{folder}', measure=False)
  expected = source.load(3)
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again.load(3), expected)
  assert again.utterances[3].key == 'utt3'


def test_sound_and_text_may_lie_deeper_and_the_rate_be_given(tmp_path):
  features = {'audio': {'array': _SOUND}, 'sentence': tfds.features.Text()}
  example = {'audio': {'array': _samples(1)}, 'sentence': 'A'}
  folder = _write(tmp_path, 'deep', features, [example], split='dev')
  with pytest.raises(sources.SourceError, match='sample rate'):
    sources.open_source(f'tfds:{folder}:dev')
  source = sources.open_source(f'tfds:{folder}@8000:dev')
  (utterance,) = source.utterances
  assert (utterance.key, utterance.txt) == ('dev-00000000', 'A')
  assert len(source.load(0)) == 2 * 801


def test_wide_integers_must_hold_16_bits(tmp_path):
  wide = tfds.features.Tensor(shape=(None,), dtype=np.int64)
  features = {'audio': wide, 'text': tfds.features.Text()}
  good = {'audio': _samples(1).astype(np.int64), 'text': 'A'}
  bad = {'audio': np.array([0, 1 << 20]), 'text': 'B'}
  folder = _write(tmp_path, 'wide', features, [good, bad])
  source = sources.open_source(f'tfds:{folder}@16000')
  np.testing.assert_array_equal(
    source.load(0), (_samples(1) / 32768).astype(np.float32)
  )
  problem = source.utterances[1].problem
  assert problem is not None
  assert problem.reason == 'not_scaled'


def test_what_is_not_there_is_named(folder, tmp_path):
  with pytest.raises(sources.SourceError) as caught:
    sources.open_source('tfds:gossip')
  assert 'download and prepare it' in str(caught.value)
  assert '\n' not in str(caught.value)
  (tmp_path / 'hollow').mkdir()
  with pytest.raises(sources.SourceError, match='no such prepared data set'):
    sources.open_source(f'tfds:{tmp_path}/hollow')
  with pytest.raises(sources.SourceError, match="no split 'dev'"):
    sources.open_source('tfds:talks:dev')
  silent = _write(
    tmp_path, 'books', {'text': tfds.features.Text()}, [{'text': 'A'}]
  )
  with pytest.raises(sources.SourceError, match='called audio, speech'):
    sources.open_source(f'tfds:{silent}')


def test_tensorflow_is_asked_for_only_by_name(folder, monkeypatch):
  def needs_tensorflow(_):
    raise ModuleNotFoundError("No module named 'tensorflow'", name='tensorflow')

  monkeypatch.setattr(tfds, 'builder_from_directory', needs_tensorflow)
  with pytest.raises(sources.SourceError, match='pip install tensorflow'):
    sources.open_source(f'tfds:{folder}')


def test_preparing_copies_a_set(folder, tmp_path):
  """Into one that needs nothing of the old one any more."""
  prepare.prepare(tmp_path / 'out', {'train': f'tfds:{folder}'})
  recordings = tfds_dataset.read(tmp_path / 'out', 'train')
  assert [r.key for r in recordings] == [f'utt{i}' for i in range(1, 5)]
  assert recordings[0].extra == {'speaker': '11'}
  assert len(recordings[0].audio) == 2 * 801  # 8 kHz before
  skipped = (tmp_path / 'out/skipped.jsonl').read_text()
  assert '"reason": "no_text"' in skipped
