"""Scoring: the counts are an edit distance, and agree with jiwer."""

import hypothesis
from hypothesis import strategies as st
import jiwer
import pytest

from u2moe_jax.text import scoring

_WORDS = st.lists(st.sampled_from(['A', 'B', 'C', 'DD']), max_size=8)
_SENTENCES = _WORDS.map(' '.join)
_SPOKEN = _SENTENCES.filter(bool)


def _distance(left, right):
  """Edit distance by its recurrence."""
  row = list(range(len(right) + 1))
  for i, a in enumerate(left, start=1):
    above, row = row, [i]
    for j, b in enumerate(right, start=1):
      row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
  return row[-1]


@pytest.mark.parametrize(
  ('reference', 'hypothesis_text', 'expected'),
  [
    ('A B C', 'A B C', (0, 0, 0, 3)),
    ('A B C', 'A X C', (1, 0, 0, 3)),
    ('A B C', 'A C', (0, 1, 0, 3)),
    ('A B C', 'A B B C', (0, 0, 1, 3)),
    ('A B C', '', (0, 3, 0, 3)),
    ('', 'A B', (0, 0, 2, 0)),
    ('', '', (0, 0, 0, 0)),
  ],
)
def test_counts_words(reference, hypothesis_text, expected):
  counts = scoring.word_errors(reference, hypothesis_text)
  assert counts == scoring.ErrorCounts(*expected)


def test_characters_do_not_count_spaces():
  counts = scoring.character_errors('广州 AB', '广 州AC')
  assert counts == scoring.ErrorCounts(1, 0, 0, 4)


def test_comparing_is_case_sensitive_until_normalised():
  assert scoring.word_errors('It is', 'it IS').errors == 2
  left, right = scoring.normalise('It is'), scoring.normalise(' it  IS')
  assert scoring.word_errors(left, right).errors == 0


@hypothesis.settings(deadline=None)
@hypothesis.given(_SENTENCES, _SENTENCES)
def test_the_errors_are_the_edit_distance(left, right):
  counts = scoring.word_errors(left, right)
  assert counts.errors == _distance(left.split(), right.split())
  length = len(left.split())
  assert counts.reference_length == length
  assert counts.insertions - counts.deletions == len(right.split()) - length


@hypothesis.settings(deadline=None)
@hypothesis.given(_SPOKEN, _SENTENCES)
def test_word_rates_agree_with_jiwer(reference, other):
  ours = scoring.word_errors(reference, other)
  theirs = jiwer.process_words(reference, other)
  assert ours.rate == pytest.approx(100 * theirs.wer)
  assert (ours.substitutions, ours.deletions, ours.insertions) == (
    theirs.substitutions,
    theirs.deletions,
    theirs.insertions,
  )


@hypothesis.settings(deadline=None)
@hypothesis.given(_SPOKEN, _SENTENCES)
def test_character_rates_agree_with_jiwer(reference, other):
  ours = scoring.character_errors(reference, other)
  theirs = jiwer.cer(reference.replace(' ', ''), other.replace(' ', ''))
  assert ours.rate == pytest.approx(100 * theirs)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.tuples(_SPOKEN, _SENTENCES), min_size=1))
def test_corpus_rates_agree_with_jiwer(pairs):
  references, others = zip(*pairs)
  theirs = jiwer.wer(list(references), list(others))
  assert scoring.corpus_errors(pairs).rate == pytest.approx(100 * theirs)


def test_a_corpus_rate_is_not_the_mean_of_rates():
  pairs = [('A', 'B'), ('A B C', 'A B C')]
  assert scoring.corpus_errors(pairs).rate == 25.0
  mean = sum(scoring.word_errors(*pair).rate for pair in pairs) / 2
  assert mean == 50.0


def test_a_corpus_counts_the_unit_asked_for():
  pairs = [('AB CD', 'AB CE')]
  assert scoring.corpus_errors(pairs).rate == 50.0
  assert scoring.corpus_errors(pairs, unit='character').rate == 25.0


def test_sums_add_up():
  total = scoring.ErrorCounts(1, 2, 3, 4) + scoring.ErrorCounts(10, 20, 30, 40)
  assert total == scoring.ErrorCounts(11, 22, 33, 44)
  assert scoring.corpus_errors([]) == scoring.ErrorCounts()


def test_rates_of_an_empty_reference():
  assert scoring.word_errors('', '').rate == 0.0
  assert scoring.word_errors('', 'A B C').rate == 100.0


@hypothesis.settings(deadline=None)
@hypothesis.given(_SENTENCES, _SENTENCES)
def test_an_alignment_holds_both_texts_and_the_fewest_errors(left, right):
  rows = scoring.align(left, right)
  assert [a for a, _ in rows if a is not None] == left.split()
  assert [b for _, b in rows if b is not None] == right.split()
  errors = sum(a != b for a, b in rows)
  assert errors == scoring.word_errors(left, right).errors


def test_an_alignment_shows_what_happened():
  assert scoring.align('THE CAT SAT ON', 'CAT SIT ON IT') == [
    ('THE', None),
    ('CAT', 'CAT'),
    ('SAT', 'SIT'),
    ('ON', 'ON'),
    (None, 'IT'),
  ]


@pytest.mark.parametrize(
  ('text', 'options', 'expected'),
  [
    ("  it's\tfine \n", {}, "IT'S FINE"),
    ('Straße', {}, 'STRASSE'),
    ('Straße', {'uppercase': False}, 'Straße'),
    ('Hello, world!', {}, 'HELLO, WORLD!'),
    ('Hello, world!', {'remove_punctuation': True}, 'HELLO WORLD'),
    ("'it’s' -- l'eau.", {'remove_punctuation': True}, "IT'S L'EAU"),
    ('twenty-one, $5', {'remove_punctuation': True}, 'TWENTY ONE $5'),
    ('你好，世界。', {'remove_punctuation': True}, '你好 世界'),
    (' ... ', {'remove_punctuation': True}, ''),
  ],
)
def test_normalises(text, options, expected):
  assert scoring.normalise(text, **options) == expected


_TEXTS = st.text() | st.text(alphabet="aB'’_-. é1你，\t")


@hypothesis.settings(deadline=None)
@hypothesis.given(_TEXTS, st.booleans(), st.booleans())
def test_normalising_twice_changes_nothing(text, uppercase, remove):
  once = scoring.normalise(text, uppercase=uppercase, remove_punctuation=remove)
  twice = scoring.normalise(
    once, uppercase=uppercase, remove_punctuation=remove
  )
  assert twice == once


_MIXED = st.lists(st.sampled_from(['你', '好', 'OK', 'A']), max_size=8)


@hypothesis.settings(deadline=None)
@hypothesis.given(_MIXED.filter(bool), _MIXED)
def test_mixed_rates_agree_with_jiwer(reference, other):
  """Chinese by character, English by word, whatever the spaces between."""
  glue = lambda parts: ' '.join(parts).replace('你 好', '你好')
  counts = scoring.corpus_errors([(glue(reference), glue(other))], unit='mixed')
  theirs = jiwer.wer(' '.join(reference), ' '.join(other))
  assert counts.rate == pytest.approx(100 * theirs)


def test_mixed_differs_from_words_where_nothing_separates_characters():
  pairs = [('你好 OK', '你们 OK')]
  assert scoring.corpus_errors(pairs).rate == 50.0
  assert scoring.corpus_errors(pairs, unit='mixed').rate == pytest.approx(
    100 / 3
  )


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    ({}, 'ＯK, <NOISE> STRASSE'),
    ({'case': 'lower'}, 'ｏk, <noise> straße'),
    ({'case': 'keep'}, 'Ｏk, <noise> Straße'),
    ({'nfkc': True, 'case': 'keep'}, 'Ok, <noise> Straße'),
    ({'ignore': '<[^>]*>'}, 'ＯK, STRASSE'),
    ({'remove_punctuation': True, 'ignore': '<[^>]*>'}, 'ＯK STRASSE'),
  ],
)
def test_a_normaliser_does_what_it_is_asked(options, expected):
  normaliser = scoring.Normaliser(**options)
  assert normaliser(' Ｏk,  <noise> Straße') == expected


def test_a_normaliser_says_what_it_does():
  assert str(scoring.Normaliser()) == 'upper case, single spaces'
  every = scoring.Normaliser(
    nfkc=True, ignore='<.*>', remove_punctuation=True, case='keep'
  )
  assert str(every) == (
    'NFKC, without /<.*>/, without punctuation, case as it is, single spaces'
  )


@hypothesis.settings(deadline=None)
@hypothesis.given(_SENTENCES, _SENTENCES)
def test_rows_count_as_the_texts_do(left, right):
  rows = scoring.align(left, right)
  assert scoring.count_rows(rows) == scoring.word_errors(left, right)


def test_an_alignment_is_shown_in_columns():
  rows = scoring.align('THE 你 SAT ON', '你 SIT ON IT')
  assert scoring.show(rows) == (
    'REF: THE 你 SAT ON **\nHYP: *** 你 SIT ON IT\n     D      S      I'
  )
  assert scoring.show(scoring.align('A', 'A')) == 'REF: A\nHYP: A'


def test_another_unit_is_refused():
  with pytest.raises(ValueError, match='sentence'):
    scoring.corpus_errors([('A', 'A')], unit='sentence')
