"""Each bad utterance is told once, whatever happens; too many end it."""

import dataclasses
import json

import pytest

from u2moe_jax.training import skips


@dataclasses.dataclass(frozen=True)
class _Skip:
  key: str
  reason: str = 'missing'
  detail: str = 'a.wav: no such file'


def _log(folder, **options):
  return skips.SkipLog(folder, num_utterances=10, **options)


def _lines(folder):
  text = (folder / 'skipped.jsonl').read_text(encoding='utf-8')
  return [json.loads(line) for line in text.splitlines()]


def test_an_utterance_is_told_once(tmp_path):
  log = _log(tmp_path)
  log.add([])
  assert not (tmp_path / 'skipped.jsonl').exists()
  log.add([_Skip('a'), _Skip('b', 'empty'), _Skip('a')])
  log.add([_Skip('a', 'other')])  # the next epoch
  log.add([_Skip('a')], split='dev')  # another utterance
  assert [(x['key'], x['reason'], x['split']) for x in _lines(tmp_path)] == [
    ('a', 'missing', 'train'),
    ('b', 'empty', 'train'),
    ('a', 'missing', 'dev'),
  ]
  assert log.total == 3
  assert log.reasons() == '2 missing, 1 empty'
  again = _log(tmp_path)
  again.add([_Skip('b')])
  assert again.counts == log.counts
  assert len(_lines(tmp_path)) == 3


def test_a_torn_line_is_forgotten(tmp_path):
  file = tmp_path / 'skipped.jsonl'
  _log(tmp_path).add([_Skip('a'), _Skip('b')])
  file.write_bytes(file.read_bytes()[:-5])
  log = _log(tmp_path)
  assert log.total == 1
  log.add([_Skip('b')])
  assert [line['key'] for line in _lines(tmp_path)] == ['a', 'b']


def test_more_than_a_share_ends_it_with_the_reasons(tmp_path):
  log = _log(tmp_path, max_share=0.3)
  log.add([_Skip('a'), _Skip('b'), _Skip('c', 'empty')])
  with pytest.raises(skips.BadDataError) as error:
    log.add([_Skip('d', 'empty')])
  for part in (
    '4 of 10',
    '2 missing, 2 empty',
    'data.max_skipped=0.3',
    'd: a.w',
  ):
    assert part in str(error.value)
  with pytest.raises(skips.BadDataError):
    _log(tmp_path, max_share=0.3).check()
  _log(tmp_path, max_share=0.4).check()


def test_strict_ends_it_at_the_first(tmp_path):
  log = _log(tmp_path, strict=True)
  log.check()
  with pytest.raises(
    skips.BadDataError, match=r'a: a.wav: no such file.*strict'
  ):
    log.add([_Skip('a')])
  assert len(_lines(tmp_path)) == 1
  with pytest.raises(skips.BadDataError):
    _log(tmp_path, strict=True).check()
