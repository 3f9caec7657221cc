"""LibriSpeech folders: subsets, transcripts, what is missing."""

import numpy as np
import pytest
import soundfile

from data_pipelines import sources
from data_pipelines import synthetic


def _chapter(root, subset, speaker, chapter, texts, *, ending='flac'):
  """Writes a chapter; its samples."""
  folder = root / subset / speaker / chapter
  folder.mkdir(parents=True)
  sounds, lines = [], []
  for index, txt in enumerate(texts):
    key = f'{speaker}-{chapter}-{index:04d}'
    rng = np.random.default_rng([int(speaker), int(chapter), index])
    samples = synthetic.utterance('AB', rng=rng)
    soundfile.write(folder / f'{key}.{ending}', samples, 16000)
    sounds.append(soundfile.read(folder / f'{key}.{ending}')[0])
    lines.append(f'{key} {txt}\n')
  (folder / f'{speaker}-{chapter}.trans.txt').write_text(''.join(lines))
  return sounds


@pytest.fixture
def root(tmp_path):
  root = tmp_path / 'LibriSpeech'
  _chapter(root, 'train-clean-100', '19', '198', ['ONE', 'TWO'])
  _chapter(root, 'train-other-500', '20', '200', ['THREE'])
  _chapter(root, 'dev-clean', '21', '201', ['FOUR'])
  (root / 'BOOKS').mkdir()  # which the real folder has too
  return root


def _texts(spec, **options):
  source = sources.open_source(spec, **options)
  return [utterance.txt for utterance in source.utterances]


def test_subsets_and_splits(root):
  spec = f'librispeech:{root}'
  assert sources.find_splits(spec) == ['train', 'dev']
  assert _texts(spec) == ['ONE', 'TWO', 'THREE']
  assert _texts(spec, split='dev') == ['FOUR']
  assert _texts(f'{spec}:train-clean-100') == ['ONE', 'TWO']
  assert _texts(f'{spec}:dev-clean+train-clean-100') == ['FOUR', 'ONE', 'TWO']
  assert _texts(f'{spec}/train-other-500') == ['THREE']


def test_samples_speakers_and_durations(tmp_path):
  (expected,) = _chapter(tmp_path, 'test-clean', '7', '8', ['A'])
  source = sources.open_source(f'librispeech:{tmp_path}:test-clean')
  (utterance,) = source.utterances
  assert utterance.key == '7-8-0000'
  assert utterance.extra['speaker'] == '7'
  assert utterance.duration == len(expected) / 16000
  np.testing.assert_array_equal(source.load(0), expected.astype(np.float32))


def test_what_lacks_sound_or_text_is_named(tmp_path):
  _chapter(tmp_path, 'test', '7', '8', ['A', 'B', ''])
  folder = tmp_path / 'test/7/8'
  (folder / '7-8-0000.flac').unlink()
  (folder / '7-8-0009.flac').write_bytes(b'')
  source = sources.open_source(f'librispeech:{tmp_path}:test')
  found = {u.key: u.problem and u.problem.reason for u in source.utterances}
  assert found == {
    '7-8-0000': 'no_audio',
    '7-8-0001': None,
    '7-8-0002': 'no_text',
    '7-8-0009': 'no_text',
  }


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('{}:test-clean', "no subset 'test-clean'; there is BOOKS, dev-clean"),
    ('{}/BOOKS', "no subset 'train'"),
    ('{}:BOOKS', 'no *.trans.txt in SPEAKER/CHAPTER folders of BOOKS'),
    ('{}/none', 'no such folder'),
  ],
)
def test_what_is_not_there_is_named(spec, message, root):
  with pytest.raises(sources.SourceError) as caught:
    sources.open_source('librispeech:' + spec.format(root))
  assert message in str(caught.value)
