"""Segments put together are one transcript with times of the whole."""

import math

import pytest

from u2moe_jax.decoding import transcript as transcript_lib
from u2moe_jax.text import words as words_lib


def _segment(start, text, confidence):
  tokens = tuple(range(len(text)))
  part = transcript_lib.Transcript(
    text=text,
    tokens=tokens,
    score=-1.5,
    times=tuple(0.04 * (i + 1) for i in tokens),
    confidence=confidence,
    margin=0.5 if start else 0.25,
    nbest=(transcript_lib.Alternative(text, tokens, -1.5),),
    token_confidence=tuple(0.5 for _ in tokens),
    words=(words_lib.TimedWord(text, 0.0, 0.04),) if text else (),
  )
  part = transcript_lib.shift(part, start)
  return transcript_lib.Segment(start, start + 2.0, part)


def test_times_move_and_texts_join():
  segments = [_segment(0.0, 'AB', 0.5), _segment(2.0, '', None)]
  segments.append(_segment(4.0, 'C', 0.25))
  whole = transcript_lib.join(segments)
  assert whole.text == 'AB C'
  assert whole.tokens == (0, 1, 0)
  assert whole.times == (0.04, 0.08, 4.04)
  assert [word.start for word in whole.words] == [0.0, 4.0]
  assert whole.score == pytest.approx(-4.5)
  assert whole.margin == 0.25
  # Three tokens and two ends.
  expected = math.exp((3 * math.log(0.5) + 2 * math.log(0.25)) / 5)
  assert whole.confidence == pytest.approx(expected)
  assert [span.text for span in whole.segments] == ['AB', '', 'C']
  assert [span.start for span in whole.segments] == [0.0, 2.0, 4.0]


def test_chinese_segments_join_without_a_space():
  segments = [_segment(0.0, '你好', 0.5), _segment(2.0, '世界', 0.0)]
  whole = transcript_lib.join(segments)
  assert whole.text == '你好世界'
  assert whole.confidence == 0.0


def test_nothing():
  assert transcript_lib.join([]).text == transcript_lib.empty().text == ''
  assert transcript_lib.join([]).confidence is None
