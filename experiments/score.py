r"""Compares what was recognised with what was said.

  python -m experiments.score --ref=test.jsonl --hyp=text.jsonl \
    --details=details.txt

Both are JSON lines (a manifest; what `decode` writes) or lines `KEY TEXT`. The
last line printed is one JSON object with the rates.
"""

import json
import os
import pathlib
import re
from typing import cast

from absl import flags

from experiments.wiring import command

_REF = flags.DEFINE_string('ref', None, 'What was said.', required=True)
_HYP = flags.DEFINE_string('hyp', None, 'What was recognised.', required=True)
_DETAILS = flags.DEFINE_string(
  'details', None, 'Text file for the alignment of every utterance.'
)
_UNIT = flags.DEFINE_enum(
  'unit',
  'word',
  ['word', 'character', 'mixed'],
  'What alignments and counts are made of; mixed: words, but single CJK '
  'characters.',
)
_KEYS = flags.DEFINE_enum(
  'keys',
  'strict',
  ['strict', 'empty', 'common'],
  'Keys that only one file has: refuse; count a missing hypothesis as nothing '
  'recognised; or leave them out.',
)
_TOP = flags.DEFINE_integer(
  'top', 10, 'Most frequent errors shown of each kind.', lower_bound=0
)
_CASE = flags.DEFINE_enum(
  'case', 'upper', ['upper', 'lower', 'keep'], 'Case that is compared.'
)
_PUNCTUATION = flags.DEFINE_bool(
  'punctuation', True, 'Compare punctuation; --nopunctuation removes it.'
)
_NFKC = flags.DEFINE_bool('nfkc', False, 'Apply Unicode NFKC first.')
_IGNORE = flags.DEFINE_string(
  'ignore', '', r'Regular expression of parts to leave out, such as <[^>]*>.'
)


def main(_: list[str]) -> int:
  """Scores; exit codes in docs/exit_codes.md."""
  from experiments.wiring import scores
  from u2moe_jax.text import scoring

  unit = cast(scoring.Unit, _UNIT.value)
  try:
    # Only to name the flag if the expression is none.
    re.compile(_IGNORE.value)
  except re.error as error:
    raise scores.ScoreError(f'--ignore={_IGNORE.value}: {error}') from None
  normaliser = scoring.Normaliser(
    nfkc=_NFKC.value,
    ignore=_IGNORE.value,
    remove_punctuation=not _PUNCTUATION.value,
    case=cast(scoring.Case, _CASE.value),
  )
  matched = scores.match(
    scores.read_texts(_REF.value, role='reference'),
    scores.read_texts(_HYP.value, role='hypothesis'),
    keys=cast(scores.Keys, _KEYS.value),
  )
  scored = scores.score(matched, normaliser, unit=unit)
  if _DETAILS.value is not None:
    _write(pathlib.Path(_DETAILS.value), scores.details(scored, unit=unit))
  if _TOP.value:
    print(scores.frequent_errors(scored, most=_TOP.value))
  print(json.dumps(scores.summarise(scored, normaliser, unit=unit)))
  return command.OK


def _write(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + '.unfinished')
  unfinished.write_text(text, encoding='utf-8')
  os.replace(unfinished, path)


if __name__ == '__main__':
  command.run(main)
