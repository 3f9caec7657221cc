"""Two files of texts into error rates, alignments and frequent errors."""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any
from typing import Literal

from u2moe_jax.text import scoring

Keys = Literal['strict', 'empty', 'common']
_MOST_NAMED = 5
_FIELDS = {'reference': ('txt', 'text'), 'hypothesis': ('text', 'txt')}
# What the rates are called, by unit.
_RATES: dict[scoring.Unit, str] = {
  'word': 'wer',
  'character': 'cer',
  'mixed': 'mer',
}


class ScoreError(ValueError):
  """Texts that cannot be compared; says which file, line or key."""


@dataclasses.dataclass(frozen=True)
class Scored:
  """One utterance, normalised and lined up.

  Attributes:
    key: its key.
    rows: see `scoring.align`, in the unit of the report.
    pair: normalised reference and hypothesis.
  """

  key: str
  rows: list[scoring.Row]
  pair: tuple[str, str]


def read_texts(
  path: str | os.PathLike[str], *, role: Literal['reference', 'hypothesis']
) -> dict[str, str]:
  """Reads the texts of a file by key.

  Args:
    path: JSON lines with `key` and `txt` or `text` (a manifest, or what
      `decode` writes), or lines `KEY TEXT`.
    role: which of `txt` and `text` is meant where a line has both: `txt` is
      what was said, `text` what was recognised.

  Raises:
    ScoreError: naming file and line.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ScoreError(f'{path}: no such file')
  texts: dict[str, str] = {}
  numbers: dict[str, int] = {}
  # In bytes: a line that is not UTF-8 can be named, and only \n ends one, where
  # str.splitlines() also cuts at characters that a text may hold.
  for number, line in enumerate(path.read_bytes().split(b'\n'), start=1):
    if not line.strip():
      continue
    where = f'{path}:{number}'
    key, text = _parse(line, where, _FIELDS[role])
    if key in texts:
      raise ScoreError(
        f'{where}: the key {key!r} already stands in line {numbers[key]}'
      )
    texts[key], numbers[key] = text, number
  if not texts:
    raise ScoreError(f'{path}: no texts in this file')
  return texts


def _parse(line: bytes, where: str, fields: Sequence[str]) -> tuple[str, str]:
  try:
    # Editors put a byte order mark in front; it is none of the first key.
    text = line.decode('utf-8-sig').strip()
  except UnicodeDecodeError as error:
    raise ScoreError(f'{where}: not UTF-8 ({error.reason})') from None
  if not text.startswith('{'):
    # A key alone is an utterance without words.
    key, *rest = text.split(maxsplit=1)
    return key, ' '.join(rest)
  try:
    record = json.loads(text)
  except ValueError as error:
    raise ScoreError(f'{where}: not JSON ({error})') from None
  # In the order of the role: a line may have both.
  found = [record[name] for name in fields if name in record]
  if not isinstance(record.get('key'), str) or not found:
    raise ScoreError(f"{where}: needs 'key' and 'txt' or 'text'")
  if not isinstance(found[0], str):
    raise ScoreError(f'{where}: the text is not a string')
  return record['key'], found[0]


def match(
  references: Mapping[str, str],
  hypotheses: Mapping[str, str],
  *,
  keys: Keys = 'strict',
) -> list[tuple[str, str, str]]:
  """Puts texts of the same key together, in the order of the references.

  Args:
    references: by key.
    hypotheses: by key.
    keys: what happens to keys that only one side has. strict: refused; empty:
      a missing hypothesis counts as nothing recognised, one without reference
      is left out; common: only what both have counts.

  Returns:
    (key, reference, hypothesis).

  Raises:
    ScoreError: naming keys.
  """
  missing = [key for key in references if key not in hypotheses]
  extra = [key for key in hypotheses if key not in references]
  if keys == 'strict':
    if missing:
      raise ScoreError(
        f'{_name(missing)} without hypothesis; --keys=empty counts them as '
        'nothing recognised, --keys=common leaves them out'
      )
    if extra:
      raise ScoreError(
        f'{_name(extra)} without reference; --keys=common leaves them out'
      )
  kept = [key for key in references if keys == 'empty' or key in hypotheses]
  if not kept:
    raise ScoreError('the two files have no key in common')
  return [(key, references[key], hypotheses.get(key, '')) for key in kept]


def _name(keys: Sequence[str]) -> str:
  named = ', '.join(keys[:_MOST_NAMED])
  more = ', ...' if len(keys) > _MOST_NAMED else ''
  return f'{len(keys)} keys ({named}{more})' if len(keys) > 1 else repr(keys[0])


def score(
  matched: Sequence[tuple[str, str, str]],
  normaliser: scoring.Normaliser,
  *,
  unit: scoring.Unit = 'word',
) -> list[Scored]:
  """Normalises both sides and lines them up."""
  scored = []
  for key, *texts in matched:
    reference, hypothesis = map(normaliser, texts)
    rows = scoring.align(reference, hypothesis, unit=unit)
    scored.append(Scored(key, rows, (reference, hypothesis)))
  return scored


def summarise(
  scored: Sequence[Scored],
  normaliser: scoring.Normaliser,
  *,
  unit: scoring.Unit = 'word',
) -> dict[str, Any]:
  """Rates over the whole corpus, in per cent, and the counts of the unit."""
  pairs = [each.pair for each in scored]
  counts = scoring.corpus_errors(pairs, unit=unit)
  # For the sentence error rate: one wrong unit makes the utterance wrong.
  wrong = sum(any(a != b for a, b in each.rows) for each in scored)
  rates = {
    name: round(scoring.corpus_errors(pairs, unit=each).rate, 3)
    for each, name in _RATES.items()
  }
  return {
    'utterances': len(scored),
    **rates,
    'ser': round(100 * wrong / len(scored), 3),
    'unit': unit,
    'length': counts.reference_length,
    'substitutions': counts.substitutions,
    'deletions': counts.deletions,
    'insertions': counts.insertions,
    'normaliser': str(normaliser),
  }


def details(scored: Sequence[Scored], *, unit: scoring.Unit = 'word') -> str:
  """Every utterance with its rate and its alignment, as text."""
  blocks = []
  for each in scored:
    counts = scoring.count_rows(each.rows)
    blocks.append(
      f'{each.key}  {_RATES[unit]} {counts.rate:.2f}  '
      f'length {counts.reference_length}, S {counts.substitutions}, '
      f'D {counts.deletions}, I {counts.insertions}\n'
      f'{scoring.show(each.rows)}\n'
    )
  return '\n'.join(blocks)


def frequent_errors(scored: Sequence[Scored], *, most: int) -> str:
  """The most frequent errors of each kind, as a table."""
  kinds: dict[str, Counter[str]] = {
    'substitutions': Counter(),
    'deletions': Counter(),
    'insertions': Counter(),
  }
  for each in scored:
    for reference, hypothesis in each.rows:
      if reference is None:
        kinds['insertions'][str(hypothesis)] += 1
      elif hypothesis is None:
        kinds['deletions'][reference] += 1
      elif reference != hypothesis:
        kinds['substitutions'][f'{reference} -> {hypothesis}'] += 1
  lines = []
  for kind, counter in kinds.items():
    lines.append(f'{kind}: {counter.total()}, {len(counter)} different')
    # Ties in the order of the alphabet, so that two runs read the same.
    ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    lines += [f'{count:7d}  {what}' for what, count in ranked[:most]]
  return '\n'.join(lines)
