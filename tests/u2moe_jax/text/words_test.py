"""Words are found in tokens of any kind, and none of their text is lost."""

import hypothesis
from hypothesis import strategies as st
import pytest

from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.text import words

_TEXTS = ["IT'S TEN", '你好 OK 世界', 'naïve café', 'A', '', 'カナ X Y']
_CHARACTERS = tokenizer_lib.build_char_tokenizer(_TEXTS, double_letters=True)


@pytest.mark.parametrize(
  'tokenizer', [_CHARACTERS, tokenizer_lib.ByteTokenizer()]
)
@pytest.mark.parametrize('text', _TEXTS)
def test_words_of_tokens_are_words_of_the_text(tokenizer, text):
  ids = tokenizer.encode(text)
  grouped = words.group(ids, tokenizer)
  assert [word.text for word in grouped] == words.split(text)
  for word in grouped:
    assert tokenizer.decode(ids[word.start : word.end]) == word.text
  ends = [0, *(word.end for word in grouped)]
  assert all(w.start >= end for w, end in zip(grouped, ends, strict=False))


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(max_size=12), st.integers(0, 12))
def test_bytes_cut_anywhere_still_read(text, cut):
  tokenizer = tokenizer_lib.ByteTokenizer()
  ids = tokenizer.encode(text)[:cut]
  grouped = words.group(ids, tokenizer)
  assert all(0 <= w.start < w.end <= len(ids) for w in grouped)
  assert [w.text for w in grouped] == words.split(tokenizer.decode(ids))


def test_bpe_pieces_begin_words_and_chinese_characters_are_words():
  class Pieces(tokenizer_lib.CharTokenizer):
    pass

  tokenizer = Pieces(
    ['<blank>', '<unk>', '▁HEL', 'LO', '▁W', '你', '<sos/eos>']
  )
  grouped = words.group([2, 3, 4, 5, 5, 1, 6], tokenizer)
  unknown = tokenizer_lib.UNKNOWN_TEXT
  assert [(w.text, w.start, w.end) for w in grouped] == [
    ('HELLO', 0, 2),
    ('W', 2, 3),
    ('你', 3, 4),
    ('你', 4, 5),
    (unknown, 5, 6),
  ]
  assert words.group([7, 8], None) == [
    words.TokenSpan('7', 0, 1),
    words.TokenSpan('8', 1, 2),
  ]


def test_times_and_confidence_of_a_word_are_those_of_its_tokens():
  ids = _CHARACTERS.encode("IT'S TEN")
  spans = [(i / 10, (i + 1) / 10) for i in range(len(ids))]
  confidence = [0.25, 1.0, 0.25, 1.0] + [1.0] * 4
  first, second = words.timed(ids, spans, _CHARACTERS, confidence=confidence)
  assert first == words.TimedWord("IT'S", 0.0, 0.4, 0.5)
  assert (second.text, second.start, second.end) == ('TEN', 0.5, 0.8)
  assert words.timed(ids, spans, _CHARACTERS)[0].confidence is None
  confidence[1] = 0.0
  assert (
    words.timed(ids, spans, _CHARACTERS, confidence=confidence)[0].confidence
    == 0.0
  )


@pytest.mark.parametrize('text', ["IT'S TEN", '你好 OK 世界', 'カナ X'])
def test_joining_undoes_splitting(text):
  assert words.join(words.split(text)) == text
