"""Counts word and character errors, after one stated normalisation.

Rates are per cent. Nothing is normalised on the way: call a `Normaliser` on
both sides first, so that what was compared is what the caller says.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import re
from typing import Literal
import unicodedata

from rapidfuzz.distance import Levenshtein

from u2moe_jax.text import words

# What is counted: words; characters without spaces; or, for text that mixes
# Chinese and English, single CJK characters and words between them.
Unit = Literal['word', 'character', 'mixed']
UNITS: tuple[Unit, ...] = ('word', 'character', 'mixed')
Case = Literal['upper', 'lower', 'keep']
Row = tuple[str | None, str | None]

# An apostrophe between letters belongs to the word: IT'S, L'EAU.
_INNER_APOSTROPHE = re.compile(r"(?<=[^\W_])['’](?=[^\W_])")


@dataclasses.dataclass(frozen=True)
class ErrorCounts:
  """Errors against a reference, summable over a corpus.

  Attributes:
    substitutions: reference tokens replaced by others.
    deletions: reference tokens missing from the hypothesis.
    insertions: hypothesis tokens with no counterpart.
    reference_length: tokens in the reference.
  """

  substitutions: int = 0
  deletions: int = 0
  insertions: int = 0
  reference_length: int = 0

  def __add__(self, other: 'ErrorCounts') -> 'ErrorCounts':
    return ErrorCounts(
      self.substitutions + other.substitutions,
      self.deletions + other.deletions,
      self.insertions + other.insertions,
      self.reference_length + other.reference_length,
    )

  @property
  def errors(self) -> int:
    """All errors together; the edit distance."""
    return self.substitutions + self.deletions + self.insertions

  @property
  def rate(self) -> float:
    """Errors per hundred reference tokens; may exceed 100.

    With an empty reference it is 0 without errors and 100 with any.
    """
    if self.reference_length == 0:
      return 100.0 if self.errors else 0.0
    return 100.0 * self.errors / self.reference_length


@dataclasses.dataclass(frozen=True)
class Normaliser:
  """Brings text to the form in which it is scored.

  In this order: compatibility forms, parts to ignore, punctuation, case,
  whitespace.

  Attributes:
    nfkc: Unicode NFKC: full-width letters become plain ones, and so on.
    ignore: regular expression; what matches becomes a space.
    remove_punctuation: see `normalise`.
    case: the letters' case.
  """

  nfkc: bool = False
  ignore: str = ''
  remove_punctuation: bool = False
  case: Case = 'upper'

  def __call__(self, text: str) -> str:
    """Returns the text as it is scored."""
    if self.nfkc:
      text = unicodedata.normalize('NFKC', text)
    if self.ignore:
      text = re.sub(self.ignore, ' ', text)
    if self.case == 'lower':
      text = text.lower()
    return normalise(
      text,
      uppercase=self.case == 'upper',
      remove_punctuation=self.remove_punctuation,
    )

  def __str__(self) -> str:
    parts = [
      'NFKC' if self.nfkc else '',
      f'without /{self.ignore}/' if self.ignore else '',
      'without punctuation' if self.remove_punctuation else '',
      'case as it is' if self.case == 'keep' else f'{self.case} case',
      'single spaces',
    ]
    return ', '.join(part for part in parts if part)


def normalise(
  text: str, *, uppercase: bool = True, remove_punctuation: bool = False
) -> str:
  """Brings text to the form in which it is scored.

  Args:
    text: any text.
    uppercase: turns letters into capitals.
    remove_punctuation: turns every character of the Unicode categories P*
      into a space, but for apostrophes between letters or digits, which
      become straight ones. Symbols such as + and $ stay.

  Returns:
    The text with each run of whitespace as one space, and none at the ends.
    Doing it again changes nothing.
  """
  if remove_punctuation:
    text = _without_punctuation(text)
  if uppercase:
    text = text.upper()
  return ' '.join(text.split())


def word_errors(reference: str, hypothesis: str) -> ErrorCounts:
  """Counts errors between words, which whitespace separates."""
  return _count(_tokens(reference, 'word'), _tokens(hypothesis, 'word'))


def character_errors(reference: str, hypothesis: str) -> ErrorCounts:
  """Counts errors between characters; whitespace does not count as one."""
  return _count(
    _tokens(reference, 'character'), _tokens(hypothesis, 'character')
  )


def corpus_errors(
  pairs: Iterable[tuple[str, str]], *, unit: Unit = 'word'
) -> ErrorCounts:
  """Sums the errors of many (reference, hypothesis) pairs.

  Args:
    pairs: texts; the corpus rate weights each utterance by its length.
    unit: what to compare.

  Returns:
    The counts of all pairs together.

  Raises:
    ValueError: for another unit.
  """
  total = ErrorCounts()
  for reference, hypothesis in pairs:
    total += _count(_tokens(reference, unit), _tokens(hypothesis, unit))
  return total


def align(reference: str, hypothesis: str, *, unit: Unit = 'word') -> list[Row]:
  """Lines up two texts with the fewest errors.

  Args:
    reference: what was said.
    hypothesis: what was recognised.
    unit: what to line up.

  Returns:
    (reference token, hypothesis token) pairs in order; None stands in for
    the missing side of an insertion or a deletion.

  Raises:
    ValueError: for another unit.
  """
  left, right = _tokens(reference, unit), _tokens(hypothesis, unit)
  rows: list[Row] = []
  for step in Levenshtein.opcodes(left, right):
    from_left = left[step.src_start : step.src_end]
    from_right = right[step.dest_start : step.dest_end]
    if step.tag == 'delete':
      rows += [(token, None) for token in from_left]
    elif step.tag == 'insert':
      rows += [(None, token) for token in from_right]
    else:
      # Equal or replaced: as many tokens on both sides.
      rows += zip(from_left, from_right, strict=True)
  return rows


def count_rows(rows: Iterable[Row]) -> ErrorCounts:
  """Counts the errors of an alignment."""
  kinds = Counter(map(_kind, rows))
  return ErrorCounts(
    substitutions=kinds['S'],
    deletions=kinds['D'],
    insertions=kinds['I'],
    reference_length=kinds[' '] + kinds['S'] + kinds['D'],
  )


def show(rows: Sequence[Row]) -> str:
  """An alignment as three lines: reference, hypothesis, and what is wrong.

  Args:
    rows: see `align`.

  Returns:
    Columns of equal width on a terminal; stars for what is missing, and S, D
    or I below each error.
  """
  lines = ['REF:', 'HYP:', '    ']
  for row in rows:
    cells = [*('*' if part is None else part for part in row), _kind(row)]
    width = max(map(_width, cells))
    for at, cell in enumerate(cells):
      fill = '*' if cell == '*' and at < 2 else ' '
      lines[at] += ' ' + cell + fill * (width - _width(cell))
  return '\n'.join(line.rstrip() for line in lines if line.strip())


def _kind(row: Row) -> str:
  reference, hypothesis = row
  if reference == hypothesis:
    return ' '
  return 'I' if reference is None else 'D' if hypothesis is None else 'S'


def _width(text: str) -> int:
  """Columns on a terminal: Chinese characters take two."""
  return sum(
    1 + (unicodedata.east_asian_width(character) in 'WF')
    for character in text
    if not unicodedata.combining(character)
  )


def _tokens(text: str, unit: Unit) -> list[str]:
  if unit == 'word':
    return text.split()
  if unit == 'character':
    # A CER with spaces would count word boundaries, which Chinese has none of.
    return list(''.join(text.split()))
  if unit == 'mixed':
    return words.split(text)
  raise ValueError(f'unit is {unit!r}; it must be one of {", ".join(UNITS)}')


def _count(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
  tags = [step.tag for step in Levenshtein.editops(reference, hypothesis)]
  return ErrorCounts(
    substitutions=tags.count('replace'),
    deletions=tags.count('delete'),
    insertions=tags.count('insert'),
    reference_length=len(reference),
  )


def _without_punctuation(text: str) -> str:
  kept = {match.start() for match in _INNER_APOSTROPHE.finditer(text)}
  return ''.join(
    "'" if at in kept else ' ' if _is_punctuation(character) else character
    for at, character in enumerate(text)
  )


def _is_punctuation(character: str) -> bool:
  return unicodedata.category(character).startswith('P')
