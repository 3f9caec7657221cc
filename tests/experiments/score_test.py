"""The score script: files in, rates out, and what cannot be compared."""

import json

import jiwer
import pytest

from experiments.wiring import scores
from u2moe_jax.text import scoring

REFERENCES = {'a': 'THE CAT SAT', 'b': 'ON THE MAT', 'c': 'A 你好'}
HYPOTHESES = {'a': 'the cap sat', 'b': 'on mat mat too', 'c': 'A 你们'}


@pytest.fixture
def files(tmp_path):
  manifest, decoded = tmp_path / 'ref.jsonl', tmp_path / 'hyp.jsonl'
  with manifest.open('w', encoding='utf-8') as file:
    for key, text in REFERENCES.items():
      # `text` is not what was said here.
      record = {'key': key, 'wav': '', 'txt': text, 'text': 'X'}
      file.write(json.dumps(record, ensure_ascii=False) + '\n')
  with decoded.open('w', encoding='utf-8') as file:
    for key, text in reversed(HYPOTHESES.items()):
      file.write(json.dumps({'key': key, 'text': text, 'txt': 'X'}) + '\n\n')
  return manifest, decoded


def _read(ref, hyp, **options):
  return scores.match(
    scores.read_texts(ref, role='reference'),
    scores.read_texts(hyp, role='hypothesis'),
    **options,
  )


@pytest.mark.parametrize('unit', scoring.UNITS)
def test_rates_are_those_of_the_whole_corpus(files, unit):
  normaliser = scoring.Normaliser()
  scored = scores.score(_read(*files), normaliser, unit=unit)
  summary = scores.summarise(scored, normaliser, unit=unit)
  upper = [text.upper() for text in HYPOTHESES.values()]
  theirs = jiwer.wer(list(REFERENCES.values()), upper)
  assert summary['wer'] == pytest.approx(100 * theirs, abs=1e-3)
  assert summary['mer'] == pytest.approx(100 * 4 / 9, abs=1e-3)
  assert summary['ser'] == 100.0
  errors = sum(
    summary[kind] for kind in ('substitutions', 'deletions', 'insertions')
  )
  rate = summary[{'word': 'wer', 'character': 'cer', 'mixed': 'mer'}[unit]]
  assert rate == pytest.approx(100 * errors / summary['length'], abs=1e-3)
  assert summary['normaliser'] == 'upper case, single spaces'
  # Without normalising, the case is an error too.
  plain = scoring.Normaliser(case='keep')
  kept = scores.summarise(scores.score(_read(*files), plain), plain)
  assert kept['wer'] > summary['wer']


def test_lines_of_key_and_text_are_read(tmp_path, files):
  plain = tmp_path / 'hyp.txt'
  lines = [f'{key}\t{text}' for key, text in HYPOTHESES.items()]
  plain.write_text('\ufeff' + '\n'.join(lines).replace('\t', ' ', 1) + '\n')
  assert _read(files[0], plain) == _read(*files)
  plain.write_text('a\nb X\nc  Y\n')
  assert [row[2] for row in _read(files[0], plain)] == ['', 'X', 'Y']


def test_details_and_frequent_errors(files):
  scored = scores.score(_read(*files), scoring.Normaliser())
  text = scores.details(scored)
  assert 'b  wer 66.67  length 3, S 1, D 0, I 1' in text
  assert 'REF: THE CAT SAT\nHYP: THE CAP SAT' in text
  table = scores.frequent_errors(scored, most=1).splitlines()
  assert table[0] == 'substitutions: 3, 3 different'
  assert table[1].split() == ['1', 'CAT', '->', 'CAP']
  assert table[-1].split() == ['1', 'TOO']


def test_keys_of_one_side_are_named_or_dealt_with(files):
  references = scores.read_texts(files[0], role='reference')
  less = {'a': 'X', 'z': 'Y'}
  error = scores.ScoreError
  with pytest.raises(error, match=r'2 keys \(b, c\) without hypothesis'):
    scores.match(references, less)
  with pytest.raises(error, match="'z' without reference"):
    scores.match({'a': 'X'}, less)
  assert [r[0] for r in scores.match(references, less, keys='common')] == ['a']
  empty = scores.match(references, less, keys='empty')
  assert [row[2] for row in empty] == ['X', '', '']
  with pytest.raises(error, match='in common'):
    scores.match(references, {'z': 'Y'}, keys='common')


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'a X\na Y\n', [':2', "'a'", 'line 1']),
    (b'{"key": "a"}\n', [':1', "'txt'"]),
    (b'{"key": "a", "txt": 3}\n', [':1', 'not a string']),
    (b'{"key": \n', [':1', 'not JSON']),
    (b'a X\n\xff\n', [':2', 'UTF-8']),
    (b'\n', ['no texts']),
  ],
)
def test_a_line_that_cannot_be_read_is_named(data, words, tmp_path):
  file = tmp_path / 'x'
  file.write_bytes(data)
  with pytest.raises(scores.ScoreError) as caught:
    scores.read_texts(file, role='reference')
  assert all(word in str(caught.value) for word in [str(file), *words])
  with pytest.raises(scores.ScoreError, match='no such file'):
    scores.read_texts(tmp_path / 'none', role='reference')
