"""Token tables: `units.txt`, the order of tokens, and the special ids.

New tables start with <blank> 0, <unk> 1, <sos/eos> 2, and the rest follows
sorted. Tables that were made elsewhere keep their order; the special ids are
found by name.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re

BLANK = '<blank>'
UNKNOWN = '<unk>'
SOS_EOS = '<sos/eos>'
SPACE = '▁'  # U+2581, as in sentencepiece
RESERVED = (BLANK, UNKNOWN, SOS_EOS)

_UNIT_LINE = re.compile(r'([^ \t]+)[ \t]+([0-9]+)[ \t]*')


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """Ids that are not text.

  Attributes:
    blank: CTC blank.
    unk: unknown text; -1 if the table has none, and it is left out then.
    sos: start of sentence.
    eos: end of sentence.
  """

  blank: int = 0
  unk: int = 1
  sos: int = 2
  eos: int = 2


def special_ids(tokens: Sequence[str]) -> SpecialIds:
  """Finds the special ids of a table by name.

  Args:
    tokens: all tokens in the order of their ids.

  Returns:
    <blank>, else 0; <unk>, else -1; <sos/eos>, else <sos> and <eos>, else
    the last id for both.

  Raises:
    ValueError: for an empty table.
  """
  if not tokens:
    raise ValueError('the token table is empty')
  ids = {token: index for index, token in enumerate(tokens)}
  # The last id: what the reference takes without such names.
  both = ids.get(SOS_EOS, len(tokens) - 1)
  return SpecialIds(
    blank=ids.get(BLANK, 0),
    unk=ids.get(UNKNOWN, -1),
    sos=both if SOS_EOS in ids else ids.get('<sos>', both),
    eos=both if SOS_EOS in ids else ids.get('<eos>', both),
  )


def make_table(symbols: Sequence[str]) -> list[str]:
  """Returns a new table: the reserved tokens, then `symbols`."""
  return [*RESERVED, *symbols]


def read_units(path: str | os.PathLike[str]) -> list[str]:
  """Reads a table with one `TOKEN ID` per line, in any order.

  Args:
    path: the file, UTF-8.

  Returns:
    The tokens in the order of their ids.

  Raises:
    ValueError: for a line of another form, a token or an id that comes
      twice, ids that are not 0 to V-1, or text that is not UTF-8; names the
      file and the line.
    OSError: if the file cannot be read.
  """
  try:
    text = pathlib.Path(path).read_bytes().decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not UTF-8 text ({error})') from error
  table: dict[int, str] = {}
  seen: dict[str, int] = {}
  # Not splitlines(), which also cuts at characters that may be tokens.
  for number, line in enumerate(text.split('\n'), start=1):
    if not line.strip(' \t\r'):
      continue
    token, index = _parse_unit(line.rstrip('\r'), f'{path}:{number}')
    if index in table:
      raise ValueError(
        f'{path}:{number}: id {index} of {token!r} already belongs to '
        f'{table[index]!r}'
      )
    if token in seen:
      raise ValueError(
        f'{path}:{number}: token {token!r} already has id {seen[token]}'
      )
    table[index], seen[token] = token, index
  _check_ids(table, path)
  return [table[index] for index in range(len(table))]


def _parse_unit(line: str, where: str) -> tuple[str, int]:
  match = _UNIT_LINE.fullmatch(line)
  if match is None:
    raise ValueError(f'{where}: {line!r} is not of the form TOKEN ID')
  return match[1], int(match[2])


def _check_ids(table: dict[int, str], path: str | os.PathLike[str]) -> None:
  if not table:
    raise ValueError(f'{path}: no tokens')
  for index in range(len(table)):
    if index not in table:
      raise ValueError(
        f'{path}: {len(table)} tokens but none with id {index}; ids must run '
        f'from 0 to {len(table) - 1}'
      )


def write_units(path: str | os.PathLike[str], tokens: Sequence[str]) -> None:
  """Writes a table that `read_units` reads."""
  lines = [f'{token} {index}\n' for index, token in enumerate(tokens)]
  pathlib.Path(path).write_bytes(''.join(lines).encode('utf-8'))
