"""The grammar: fixed promises about its sentences."""

from collections import Counter
import re

import numpy as np
import pytest

from data_pipelines.corpora import grammar

# Words that sound like a digit, a letter or another word of the grammar.
_CONFUSING = (
  *('OH', 'WON', 'TO', 'TOO', 'FOR', 'FORE', 'ATE', 'TREE', 'FORTH'),
  *('BE', 'BEE', 'SEE', 'SEA', 'EYE', 'ARE', 'TEA', 'YOU', 'WHY', 'CUE'),
  *('AN', 'BY', 'BYE', 'READ', 'WRITE', 'OUR', 'BLEW', 'EAT', 'SENSE'),
)


@pytest.fixture(scope='module')
def drawn() -> list[str]:
  return grammar.sentences(np.random.default_rng(7), 4000)


def test_sentences_are_upper_case_words(drawn):
  assert all(re.fullmatch(r"[A-Z']+( [A-Z']+)+", s) for s in drawn)


def test_sentences_have_the_promised_lengths(drawn):
  lengths = [len(s.split()) for s in drawn]
  assert (min(lengths), max(lengths)) == (2, 12)
  assert np.mean(lengths) >= 5


def test_sentences_are_distinct_and_exclusion_holds(drawn):
  assert len(set(drawn)) == len(drawn)
  more = grammar.sentences(np.random.default_rng(7), 300, exclude=set(drawn))
  assert not set(more) & set(drawn)
  # The control: without exclusion the same generator repeats itself.
  assert grammar.sentences(np.random.default_rng(7), 300) == drawn[:300]


def test_all_words_are_drawn_often(drawn):
  counts = Counter(word for s in drawn for word in s.split())
  assert set(counts) == grammar.words()
  assert len(counts) >= 150
  assert min(counts.values()) >= 15


def test_letters_digits_and_apostrophes_are_among_the_words():
  letters = set('ABCDEFGHIJKLMNOPQRSTUVWXYZ')
  digits = {'ZERO', 'ONE', 'TWO', 'THREE', 'FOUR'}
  digits |= {'FIVE', 'SIX', 'SEVEN', 'EIGHT', 'NINE'}
  assert letters | digits | {"O'CLOCK", "DON'T", "WHAT'S"} <= grammar.words()


def test_no_word_sounds_like_another():
  assert not grammar.words() & set(_CONFUSING)


def test_a_grammar_that_runs_out_says_so(monkeypatch):
  monkeypatch.setitem(grammar._RULES, 'sentence', ('PLAY <music>',))
  assert len(grammar.sentences(np.random.default_rng(0), 3)) == 3
  with pytest.raises(ValueError, match='after 3 of 4'):
    grammar.sentences(np.random.default_rng(0), 4)
