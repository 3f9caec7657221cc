"""Checking a source: what is found, and the manifest of the rest."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile

from data_pipelines import check
from data_pipelines import manifest
from data_pipelines import prepare
from data_pipelines import sources
from data_pipelines import synthetic
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.text import tokenizer

_SETTINGS = check.Settings(config_lib.DataConfig(), rate=4, min_input=7)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Three good utterances, and one of each kind of bad ones."""

  def refuse(_):
    raise EOFError  # as the decoders behind librosa do, but at once

  monkeypatch.setattr(audio, '_decode_with_librosa', refuse)
  good = manifest.read(
    synthetic.write_corpus(tmp_path, num_utterances=3, seed=1)
  )
  tone = soundfile.read(good[0].wav, dtype='int16')[0]
  long = np.tile(tone, 40)
  sounds = {
    'hollow': np.zeros(0, np.int16),
    'silent': np.zeros(16000, np.int16),
    'click': tone[:900],
    'long': long,
    'fast': tone[:8000],
    'low': tone[::2],
  }
  for name, samples in sounds.items():
    rate = 8000 if name == 'low' else 16000
    soundfile.write(tmp_path / f'{name}.wav', samples, rate)
  whole = (tmp_path / 'long.wav').read_bytes()
  (tmp_path / 'cut.wav').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'text.wav').write_text('no sound')
  lines = [manifest.to_line(item) for item in good]
  rows = [
    ('none', 'none.wav', 'A'),
    ('text', 'text.wav', 'A'),
    *((name, f'{name}.wav', 'AB') for name in sounds),
    ('cut', 'cut.wav', 'A'),
    ('wordy', 'fast.wav', 'AB' * 300),
    ('crowded', 'fast.wav', 'A' * 8),
    ('again', good[1].wav, good[1].txt),
    ('other', good[1].wav, 'OTHER'),
  ]
  for key, wav, txt in rows:
    lines.append(json.dumps({'key': key, 'wav': wav, 'txt': txt}))
  lines.append(json.dumps({'key': good[0].key, 'wav': 'x', 'txt': 'A'}))
  lines.append('no json')
  lines.append(
    json.dumps(
      {'key': 'part', 'wav': 'long.wav', 'txt': 'A', 'start': 2, 'end': 1}
    )
  )
  data = '\n'.join(lines).encode()
  data += b'\n{"key": "latin", "wav": "low.wav", "txt": "\xff"}\n'
  (tmp_path / 'm.jsonl').write_bytes(data)
  return tmp_path


def _check(folder, settings=_SETTINGS, **options):
  spec = str(folder / 'm.jsonl')
  source = sources.open_source(spec, measure=False, tolerant=True)
  return source, check.check(source, settings, **options)


_FOUND = {
  'missing': 'none',
  'unreadable': 'text',
  'empty': 'hollow',
  'silent': 'silent',
  'too_short': 'click',
  'too_long': 'long',
  'truncated': 'cut',
  'too_many_tokens': 'wordy',
  'labels_do_not_fit': 'crowded',
  'duplicate': 'again',
  'duplicate_key': 'tones-1-0000',
  'bad_line': 'm.jsonl:18',
  'bad_segment': 'part',
  'bad_encoding': 'latin',
}


def test_every_kind_of_bad_input_has_its_reason(folder):
  source, report = _check(folder)
  assert dict(report.reasons) == dict.fromkeys(_FOUND, 1)
  assert {r: report.examples[r][0][0] for r in report.reasons} == _FOUND
  good = [source.utterances[index].key for index in report.good]
  assert good == [f'tones-1-000{i}' for i in range(3)] + [
    'fast',
    'low',
    'other',
  ]
  assert report.same_sound == 1
  assert report.sample_rates[8000] == 1


def test_repeats_count_against_the_frames(folder):
  """Eight equal labels need seven blanks more than eight others."""
  lines = (folder / 'm.jsonl').read_text(errors='replace')
  (folder / 'm.jsonl').write_text(lines.replace('A' * 8, 'ABABABAB'))
  _, report = _check(folder)
  assert 'labels_do_not_fit' not in report.reasons


def test_processes_find_the_same(folder, monkeypatch):
  monkeypatch.setattr(check, '_CHUNK', 4)
  _, alone = _check(folder, num_workers=0)
  monkeypatch.setattr(check, '_CHUNK', 64)
  _, together = _check(folder, num_workers=0)
  assert alone.to_json() == together.to_json()
  assert alone.good == together.good


def test_limits_are_those_of_the_config(folder):
  config = dataclasses.replace(
    _SETTINGS.config, max_seconds=1e4, min_seconds=0.0, max_tokens=10**6
  )
  _, report = _check(folder, dataclasses.replace(_SETTINGS, config=config))
  assert 'too_long' not in report.reasons
  assert 'too_many_tokens' not in report.reasons


def test_headers_alone_tell_less(folder):
  settings = dataclasses.replace(_SETTINGS, decode=False)
  _, report = _check(folder, settings)
  lost = {'silent', 'truncated', 'duplicate'}
  assert set(report.reasons) - {'too_short', 'too_long'} == (
    set(_FOUND) - lost - {'too_short', 'too_long', 'empty'}
  )


def test_the_token_table_is_compared(folder):
  table = tokenizer.build_char_tokenizer(['ABCDEFG'])
  settings = dataclasses.replace(_SETTINGS, tokenizer=table)
  _, report = _check(folder, settings)
  assert set('OTR') <= set(report.unknown)
  assert 'A' not in report.unknown
  assert 'unknown_tokens' not in report.reasons  # they become <unk>
  strict = dataclasses.replace(settings.config, skip_unknown=True)
  _, report = _check(folder, dataclasses.replace(settings, config=strict))
  assert report.reasons['unknown_tokens']


def test_the_cleaned_manifest_is_clean(folder, tmp_path_factory):
  source, report = _check(folder)
  other = tmp_path_factory.mktemp('elsewhere') / 'clean.jsonl'
  for path in (folder / 'clean.jsonl', other):
    check.write_cleaned(path, source, report)
    cleaned = sources.open_source(str(path))
    again = check.check(cleaned, _SETTINGS)
    assert again.usable == len(cleaned) == 6
    assert not again.reasons
    np.testing.assert_array_equal(cleaned.load(2), source.load(2))
  first = json.loads((folder / 'clean.jsonl').read_text().splitlines()[0])
  assert first['wav'] == 'tones-1-0000.wav'  # relative: the folder may move
  assert first['duration'] == manifest.read(folder / 'clean.jsonl')[0].duration
  assert json.loads(other.read_text().splitlines()[0])['wav'].startswith('/')


def test_a_report_in_words_names_reasons_and_examples(folder):
  _, report = _check(folder)
  lines = list(check.describe(report))
  for reason, key in _FOUND.items():
    at = lines.index(f'1 {reason}')
    assert lines[at + 1].startswith(f'  {key}: ')
  assert lines[-1] == '6 of 20 utterances can be used'
  assert any('#' * 40 in line for line in lines)  # the histogram


def test_sound_that_is_in_no_file_makes_no_manifest(tmp_path):
  path = synthetic.write_corpus(tmp_path / 'a', num_utterances=1, seed=1)
  prepare.prepare(tmp_path / 'out', {'train': str(path)})
  source = sources.open_source(f'{tmp_path}/out')
  assert check.check(source, _SETTINGS).usable == 1
  with pytest.raises(check.CheckError, match='prepare_corpus'):
    check.require_files(source)
  check.require_files(sources.open_source(str(path)))


def test_nothing_usable_writes_nothing(tmp_path):
  bad = manifest.Utterance('a', '/none.wav', 'A')
  manifest.write(tmp_path / 'm.jsonl', [bad])
  source, report = _check(tmp_path)
  with pytest.raises(check.CheckError, match='no utterance can be used'):
    check.write_cleaned(tmp_path / 'clean.jsonl', source, report)
  assert not (tmp_path / 'clean.jsonl').exists()
  assert list(check.describe(report))[-1] == '0 of 1 utterances can be used'
  assert report.to_json()['hours'] == 0
