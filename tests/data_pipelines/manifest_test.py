"""Manifests: what is written is read again, and bad lines are named."""

import json
import os
import pathlib
import pickle
import stat

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from data_pipelines import manifest
from u2moe_jax.frontend import audio

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


def _line(**fields):
  return json.dumps({'key': 'a', 'wav': 'a.wav', 'txt': 'A', **fields}) + '\n'


def test_segments_and_byte_ranges_say_where_the_sound_is(tmp_path):
  lines = (
    _line()
    + _line(key='b', start=1, end=2.5)
    + _line(key='c', start=1.5)
    + _line(key='d', offset=512, size=99, duration=3)
  )
  a, b, c, d = manifest.read(_write(tmp_path, lines))
  assert (a.part, a.duration) == (audio.WHOLE, None)
  assert (b.part, b.duration) == (audio.Part(start=1, end=2.5), 1.5)
  assert (c.part, c.duration) == (audio.Part(start=1.5), None)
  assert (d.part, d.duration) == (audio.Part(offset=512, size=99), 3.0)


@pytest.mark.parametrize('fields', [
  {'start': 2, 'end': 1}, {'start': 1, 'end': 1}, {'start': -1, 'end': 1},
])  # fmt: skip
def test_a_segment_without_sound_is_a_problem(fields, tmp_path):
  path = _write(tmp_path, _line(duration=1, **fields) + _line(key='b'))
  for read in (manifest.read, manifest.read_table):
    bad, good = read(path)
    assert bad.problem is not None
    assert bad.problem.reason == 'bad_segment'
    assert f'{path}:1' in bad.problem.detail
    assert bad.duration is None
    assert good.problem is None


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'start': '1'}, "'start' must be seconds"),
    ({'end': True}, "'end' must be seconds"),
    ({'offset': 1.5}, "'offset' must be bytes"),
    ({'size': -1}, "'size' must be bytes"),
    ({'txt': '\ud800'}, 'surrogate'),
  ],
)
def test_numbers_and_texts_of_other_kinds_are_refused(
  fields, message, tmp_path
):
  with pytest.raises(manifest.ManifestError, match=message):
    manifest.read_table(_write(tmp_path, _line(**fields)))


def test_a_table_is_a_sequence_of_what_read_gives(tmp_path):
  lines = ''.join(_line(key=f'k{i}', n=i, duration=i) for i in range(5))
  path = _write(tmp_path, f'\ufeff{lines}\n')
  expected, table = manifest.read(path), manifest.read_table(path)
  assert list(table) == expected
  assert len(table) == 5
  assert table[-1] == expected[-1]
  assert table[1:4] == expected[1:4]
  assert list(pickle.loads(pickle.dumps(table))) == expected
  assert list(manifest.table(expected)) == expected
  for index in (5, -6):
    with pytest.raises(IndexError):
      table[index]


def test_a_fingerprint_tells_lists_apart(tmp_path):
  tables = [
    manifest.table([manifest.Utterance('a', '/a.wav', txt)]) for txt in 'AAB'
  ]
  names = [table.fingerprint() for table in tables]
  assert names[0] == names[1] != names[2]


def test_measured_durations_fill_only_gaps(tmp_path):
  lines = _line() + _line(key='b', duration=2) + _line(key='c', start=2, end=1)
  table = manifest.read_table(_write(tmp_path, lines))
  assert table.unmeasured() == [0]
  measured = table.with_durations(np.array([7.0, 9.0, 9.0]))
  assert [u.duration for u in measured] == [7.0, 2.0, None]
  assert [u.duration for u in table] == [None, 2.0, None]


def test_a_tolerant_reader_names_every_bad_line(tmp_path):
  data = (
    _GOOD.encode() + b'\nno json\n'
    b'{"key": "l", "wav": "l.wav", "txt": "\xff"}\n' + _GOOD.encode()
  )
  path = _write(tmp_path, data)
  table = manifest.read_table(path, tolerant=True)
  assert [u.problem and u.problem.reason for u in table] == [
    None,
    'bad_line',
    'bad_encoding',
    'duplicate_key',
  ]
  assert [u.key for u in table] == ['a', 'm.jsonl:2', 'l', 'a']
  assert all(
    f'{path}:{i + 1}' in u.problem.detail for i, u in enumerate(table) if i
  )
  with pytest.raises(manifest.ManifestError, match='m.jsonl:2'):
    manifest.read_table(path)


def test_bad_encoding_alone_stops_only_the_strict_reader(tmp_path):
  path = _write(tmp_path, b'{"key": "l", "wav": "l", "txt": "\xff"}')
  (utterance,) = manifest.read_table(path)
  assert utterance.problem is not None
  assert utterance.problem.reason == 'bad_encoding'
  with pytest.raises(manifest.ManifestError, match='not UTF-8'):
    manifest.read(path)


def test_keys_of_one_hash_are_no_repeats():
  """Two keys may have one hash; only equal keys are found."""
  keys = ['a', 'b', 'a', 'c', 'b', 'a']
  expected = {2: 0, 4: 1, 5: 0}
  assert manifest.repeated([7] * 6, lambda i: keys[i]) == expected
  assert manifest.repeated([hash(k) for k in keys], lambda i: keys[i]) == (
    expected
  )
  assert manifest.repeated([1, 2, 3], lambda i: keys[i]) == {}
