"""AISHELL folders: splits, transcripts without spaces, what is missing."""

import numpy as np
import pytest
import soundfile

from data_pipelines import sources


@pytest.fixture
def root(tmp_path):
  """Two utterances of train, one of dev; one without transcript."""
  root = tmp_path / 'data_aishell'
  for index, name in enumerate(('train/S02/B1', 'train/S02/B2', 'dev/S09/B3')):
    wav = root / 'wav' / f'{name}.wav'
    wav.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(wav, np.full(1600, 0.1 * index), 16000, 'FLOAT')
  text = 'B1 而 对 楼市\nB3 作用  最 大 的\nB7 别的\n'
  (root / 'transcript').mkdir()
  path = root / 'transcript/aishell_transcript_v0.8.txt'
  path.write_text(text, encoding='utf-8')
  return root


def test_splits_and_texts(root):
  for folder in (root, root.parent):
    spec = f'aishell:{folder}'
    assert sources.find_splits(spec) == ['train', 'dev']
    train = sources.open_source(spec)
    assert [u.key for u in train.utterances] == ['B1', 'B2']
    assert train.utterances[0].txt == '而对楼市'
    assert train.utterances[0].extra['speaker'] == 'S02'
    assert train.utterances[0].duration == 0.1
    dev = sources.open_source(f'{spec}:dev')
    assert [u.txt for u in dev.utterances] == ['作用最大的']
    np.testing.assert_array_equal(dev.load(0), np.full(1600, 0.2, np.float32))


def test_sound_without_text_is_named(root):
  problem = sources.open_source(f'aishell:{root}').utterances[1].problem
  assert problem is not None
  assert problem.reason == 'no_text'
  assert 'B2' in problem.detail


def test_archives_must_be_unpacked(root):
  (root / 'wav/S0002.tar.gz').write_bytes(b'')
  with pytest.raises(sources.SourceError, match='unpack the archives'):
    sources.open_source(f'aishell:{root}:test')


def test_a_folder_without_transcripts_is_refused(tmp_path):
  with pytest.raises(sources.SourceError, match='no such file'):
    sources.open_source(f'aishell:{tmp_path}')
