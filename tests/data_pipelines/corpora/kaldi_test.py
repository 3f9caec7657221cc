"""Kaldi data directories: the same utterances and samples as a manifest."""

import numpy as np
import pytest
import soundfile

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines import synthetic
from u2moe_jax.frontend import audio


@pytest.fixture
def tones(tmp_path):
  path = synthetic.write_corpus(tmp_path / 'wav', num_utterances=3, seed=1)
  return manifest.read(path)


def _write(folder, utterances, **files):
  """Writes a data directory; `files` replaces the usual contents."""
  folder.mkdir(exist_ok=True)
  contents = {
    'wav.scp': ''.join(f'{u.key} {u.wav}\n' for u in utterances),
    'text': ''.join(f'{u.key} {u.txt}\n' for u in utterances),
    'utt2spk': ''.join(f'{u.key} s{i}\n' for i, u in enumerate(utterances)),
    **files,
  }
  for name, content in contents.items():
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
  return folder


def _reason(source, index):
  with pytest.raises(audio.AudioError) as caught:
    source.load(index)
  assert '\n' not in str(caught.value)
  return caught.value.reason


def test_it_is_its_manifest(tones, tmp_path):
  folder = _write(tmp_path / 'data', tones)
  for spec in (f'kaldi:{folder}', str(folder)):  # named, or recognised
    source = sources.open_source(spec)
    for index, (a, b) in enumerate(zip(source.utterances, tones, strict=True)):
      assert (a.key, a.txt, a.duration) == (b.key, b.txt, b.duration)
      assert a.extra['speaker'] == f's{index}'
      np.testing.assert_array_equal(source.load(index), audio.load_audio(b.wav))


def test_relative_paths_are_looked_for_in_both_places(
  tones, tmp_path, monkeypatch
):
  names = ''.join(f'{u.key} wav/{u.key}.wav\n' for u in tones)
  beside = _write(tmp_path, tones, **{'wav.scp': names})
  away = _write(tmp_path / 'data', tones, **{'wav.scp': names})
  assert len(sources.open_source(f'kaldi:{beside}').load(0))
  assert _reason(sources.open_source(f'kaldi:{away}'), 0) == 'missing'
  monkeypatch.chdir(tmp_path)
  assert len(sources.open_source(f'kaldi:{away}').load(0))


def test_segments_are_cut(tones, tmp_path):
  whole = audio.load_audio(tones[0].wav)
  seconds = len(whole) / 16000
  recording = tones[0].key
  segments = (
    f'a {recording} 0.1 0.25\n'
    f'b {recording} 0.2 -1\n'  # to the end
    f'c {recording} 0.1 {seconds + 0.3}\n'  # a little more than there is
    f'd {recording} 0.3 0.2\n'
    f'e {recording} 0.1 {seconds + 9}\n'
    'f nowhere 0.1 0.2\n'
  )
  text = ''.join(f'{key} {key.upper()}\n' for key in 'abcdef')
  folder = _write(tmp_path / 'd', tones, segments=segments, text=text)
  source = sources.open_source(f'kaldi:{folder}')
  assert [u.key for u in source.utterances] == list('abcdef')
  assert source.utterances[0].duration == pytest.approx(0.15)
  assert source.utterances[1].duration == pytest.approx(seconds - 0.2)
  np.testing.assert_array_equal(source.load(0), whole[1600:4000])
  np.testing.assert_array_equal(source.load(1), whole[3200:])
  np.testing.assert_array_equal(source.load(2), whole[1600:])
  for index in (3, 4, 5):
    assert _reason(source, index) == 'bad_segment'


def test_what_lacks_sound_or_text_is_named(tones, tmp_path):
  text = f'{tones[0].key} A\n{tones[1].key}\nghost BOO\n'
  source = sources.open_source(
    f'kaldi:{_write(tmp_path / "d", tones, text=text)}'
  )
  reasons = {u.key: u.problem and u.problem.reason for u in source.utterances}
  assert reasons == {
    tones[0].key: None,
    tones[1].key: 'no_text',
    tones[2].key: 'no_text',
    'ghost': 'no_audio',
  }
  assert _reason(source, 3) == 'no_audio'


def test_text_that_is_not_utf_8_is_named(tones, tmp_path):
  text = f'{tones[0].key} A\n{tones[1].key} '.encode() + b'\xc4\n'
  folder = _write(tmp_path / 'd', tones[:2], text=text)
  source = sources.open_source(f'kaldi:{folder}')
  assert source.utterances[0].problem is None
  problem = source.utterances[1].problem
  assert problem is not None
  assert problem.reason == 'bad_encoding'
  assert f'{folder}/text:2' in problem.detail


def test_archives_are_read_where_they_lie(tones, tmp_path):
  """As wav-copy writes them: `KEY ` and a WAV file, again and again."""
  lines = []
  with open(tmp_path / 'wav.ark', 'wb') as ark:
    for item in tones:
      ark.write(f'{item.key} '.encode())
      lines.append(f'{item.key} {tmp_path}/wav.ark:{ark.tell()}\n')
      with open(item.wav, 'rb') as file:
        ark.write(file.read())
  folder = _write(tmp_path / 'd', tones, **{'wav.scp': ''.join(lines)})
  source = sources.open_source(f'kaldi:{folder}')
  for index, item in enumerate(tones):
    assert source.utterances[index].duration == item.duration
    np.testing.assert_array_equal(
      source.load(index), audio.load_audio(item.wav)
    )
  wrong = f'{tones[0].key} {tmp_path}/wav.ark:3\n'
  _write(folder, tones, **{'wav.scp': wrong})
  with pytest.raises(sources.SourceError, match='no WAV file at byte 3'):
    sources.open_source(f'kaldi:{folder}')


def test_known_durations_are_believed(tones, tmp_path):
  dur = f'{tones[0].key} 12.5\n'
  folder = _write(tmp_path / 'd', tones, utt2dur=dur)
  source = sources.open_source(f'kaldi:{folder}')
  assert source.utterances[0].duration == 12.5
  assert source.utterances[1].duration == tones[1].duration


def test_a_folder_of_splits(tones, tmp_path):
  _write(tmp_path / 'train', tones[:2])
  _write(tmp_path / 'dev', tones[2:])
  spec = f'kaldi:{tmp_path}'
  assert sources.find_splits(spec) == ['train', 'dev']
  assert len(sources.open_source(spec)) == 2
  assert len(sources.open_source(f'{spec}:dev')) == 1


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({'wav.scp': 'a sox a.mp3 -t wav - |\n'}, 'wav.scp:1: a command'),
    ({'wav.scp': 'a\n'}, "wav.scp:1: 'a' has no path"),
    ({'wav.scp': 'a x.wav\na y.wav\n'}, "wav.scp:2: 'a' already stands"),
    ({'text': 'a A\na B\n'}, "text:2: 'a' already stands"),
    ({'segments': 'a b 1\n'}, 'segments:1: a segment is KEY'),
    ({'segments': 'a b 1 2 1\n'}, 'of channel 0'),
    ({'segments': 'a b one 2\n'}, "'one' is not a number"),
    ({'segments': 'a b nan 2\n'}, "'nan' is not a number"),
    ({'wav.scp': ''}, 'no utterance'),
  ],
)
def test_malformed_lists_are_refused(files, message, tmp_path):
  base = {'wav.scp': 'a x.wav\n', 'text': 'a A\n'}
  if 'no utterance' in message:
    base['text'] = ''
  folder = _write(tmp_path / 'd', [], **{**base, **files})
  with pytest.raises(sources.SourceError) as caught:
    sources.open_source(f'kaldi:{folder}')
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_the_advice_for_commands_holds(tmp_path):
  folder = _write(tmp_path / 'd', [], **{'wav.scp': 'a cat a.wav |\n'})
  with pytest.raises(sources.SourceError, match='wav-copy'):
    sources.open_source(f'kaldi:{folder}')


def test_other_folders_are_refused(tmp_path):
  with pytest.raises(sources.SourceError, match='not a Kaldi data directory'):
    sources.open_source(f'kaldi:{tmp_path}')


def test_other_rates_are_resampled_to_what_is_asked(tones, tmp_path):
  folder = _write(tmp_path / 'd', tones)
  low = sources.open_source(f'kaldi:{folder}', sample_rate=8000)
  length = soundfile.info(tones[0].wav).frames
  assert len(low.load(0)) == pytest.approx(length / 2, abs=1)
