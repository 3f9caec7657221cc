"""Manifests: what is written is read again, and bad lines are named."""

import json
import os
import pathlib
import stat

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from data_pipelines import manifest

_GOOD = '{"key": "a", "wav": "a.wav", "txt": "HELLO"}'
# JSON has no lone surrogates; blank texts are refused.
_TEXT = st.text(st.characters(codec='utf-8'), min_size=1).filter(str.strip)


def _write(folder: pathlib.Path, content: str | bytes) -> pathlib.Path:
  path = folder / 'm.jsonl'
  data = content.encode() if isinstance(content, str) else content
  path.write_bytes(data)
  return path


@settings(deadline=None, max_examples=50)
@given(
  rows=st.dictionaries(
    _TEXT, st.tuples(_TEXT, st.floats(0, 1e6)), min_size=1, max_size=5
  )
)
def test_written_manifest_is_read_again(rows, tmp_path_factory):
  folder = tmp_path_factory.mktemp('manifest')
  utterances = [
    manifest.Utterance(
      key, str(folder / f'{i}.wav'), txt, {'duration': seconds, 'speaker': txt}
    )
    for i, (key, (txt, seconds)) in enumerate(rows.items())
  ]
  manifest.write(folder / 'm.jsonl', utterances)
  assert manifest.read(folder / 'm.jsonl') == utterances


def test_relative_wav_is_relative_to_the_manifest(tmp_path, monkeypatch):
  (tmp_path / 'sub').mkdir()
  line = '{"key": "a", "wav": "../audio/a.wav", "txt": "HELLO"}'
  _write(tmp_path / 'sub', line)
  monkeypatch.chdir(tmp_path)
  (utterance,) = manifest.read('sub/m.jsonl')
  assert utterance.wav == str(tmp_path / 'audio/a.wav')


def test_absolute_wav_stays(tmp_path):
  path = _write(tmp_path, '{"key": "a", "wav": "/x/a.wav", "txt": "HELLO"}')
  assert manifest.read(path)[0].wav == os.path.normpath('/x/a.wav')


def test_byte_order_mark_blank_lines_and_crlf_are_read(tmp_path):
  path = _write(tmp_path, f'\ufeff{_GOOD}\r\n\r\n')
  (utterance,) = manifest.read(path)
  assert (utterance.key, utterance.txt) == ('a', 'HELLO')


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
  line = json.dumps(
    {'key': 'a', 'wav': 'a', 'txt': 'A\u2028B\x85C'}, ensure_ascii=False
  )
  assert manifest.read(_write(tmp_path, line))[0].txt == 'A\u2028B\x85C'


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"key": "b", ', 'not JSON'),
    ('[' * 100_000, 'not JSON'),
    ('["b"]', 'JSON object'),
    ('{"wav": "b.wav", "txt": "B"}', "'key' is missing"),
    ('{"key": "b", "txt": "B"}', "'wav' is missing"),
    ('{"key": "b", "wav": "b.wav"}', "'txt' is missing"),
    ('{"key": 7, "wav": "b.wav", "txt": "B"}', "'key' must be a string"),
    ('{"key": "b", "wav": "", "txt": "B"}', "'wav' is empty"),
    ('{"key": "b", "wav": "b.wav", "txt": " "}', 'transcript'),
    ('{"key": "a", "wav": "b.wav", "txt": "B"}', 'already stands in line 1'),
    (
      '{"key": "b", "wav": "b", "txt": "B", "duration": "long"}',
      "'duration' must be seconds",
    ),
    ('{"key": "b", "wav": "b", "txt": "B", "duration": NaN}', 'duration'),
    (b'{"key": "b", "wav": "b.wav", "txt": "\xff"}', 'not UTF-8'),
  ],
)
def test_a_bad_line_is_named_on_one_line(line, message, tmp_path):
  data = line if isinstance(line, bytes) else line.encode()
  path = _write(tmp_path, _GOOD.encode() + b'\n' + data + b'\n')
  with pytest.raises(manifest.ManifestError) as caught:
    manifest.read(path)
  text = str(caught.value)
  assert text.startswith(f'{path}:2: ')
  assert message in text
  assert '\n' not in text


def test_missing_and_empty_manifests_are_named(tmp_path):
  with pytest.raises(manifest.ManifestError, match=r'none\.jsonl: no such'):
    manifest.read(tmp_path / 'none.jsonl')
  with pytest.raises(manifest.ManifestError, match='no utterance'):
    manifest.read(_write(tmp_path, '\n'))


def test_empty_transcripts_are_read_on_request(tmp_path):
  path = _write(tmp_path, '{"key": "a", "wav": "a.wav", "txt": ""}')
  assert manifest.read(path, allow_empty_txt=True)[0].txt == ''


def test_failed_write_leaves_the_old_manifest_and_nothing_else(tmp_path):
  path = _write(tmp_path, _GOOD)
  bad = manifest.Utterance('b', 'b.wav', 'B', {'speaker': object()})
  with pytest.raises(TypeError):
    manifest.write(path, [bad])
  lone_surrogate = manifest.Utterance('b', 'b.wav', '\ud800')
  with pytest.raises(UnicodeEncodeError):
    manifest.write(path, [lone_surrogate])
  assert path.read_text() == _GOOD
  assert list(tmp_path.iterdir()) == [path]


def test_written_manifest_can_be_read_by_others(tmp_path):
  path = tmp_path / 'new/m.jsonl'
  manifest.write(path, [manifest.Utterance('a', 'a.wav', 'A')])
  assert stat.S_IMODE(path.stat().st_mode) == 0o644
