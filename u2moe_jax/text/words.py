"""Where words begin and end: in texts, and in sequences of tokens.

Words are what whitespace separates; but a Chinese or Japanese character is a
word by itself, also where nothing separates it from its neighbours.
"""

import codecs
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import math
import re

from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.text import units

# Kana and the CJK ideographs with their extensions.
_CJK = (
  r'[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]'
)
_BEGINS_IN_CJK = re.compile(_CJK)
_ENDS_IN_CJK = re.compile(rf'{_CJK}$')
_WORD = re.compile(rf'{_CJK}|(?:(?!{_CJK})\S)+')
_BYTE = re.compile(r'<0x([0-9A-F]{2})>')


@dataclasses.dataclass(frozen=True)
class TimedWord:
  """A word and when it was said.

  Attributes:
    text: the word.
    start: seconds.
    end: seconds.
    confidence: probability in [0, 1]; None where nobody knows it.
  """

  text: str
  start: float
  end: float
  confidence: float | None = None


@dataclasses.dataclass(frozen=True)
class TokenSpan:
  """A word, and the tokens [start, end) it is made of."""

  text: str
  start: int
  end: int


def split(text: str) -> list[str]:
  """Cuts a text into words and single CJK characters."""
  return _WORD.findall(text)


def join(words: Iterable[str]) -> str:
  """Puts words or texts together: spaces between them, none between CJK
  characters.
  """
  parts: list[str] = []
  for word in filter(None, words):
    if parts and not (
      _ENDS_IN_CJK.search(parts[-1]) and _BEGINS_IN_CJK.match(word)
    ):
      parts.append(' ')
    parts.append(word)
  return ''.join(parts)


def group(
  ids: Sequence[int], tokenizer: tokenizer_lib.Tokenizer | None
) -> list[TokenSpan]:
  """Groups tokens into words.

  Args:
    ids: token ids.
    tokenizer: their table; without one each id is a word.

  Returns:
    The words in order. Tokens that are nothing but a space belong to none. A
    token that holds parts of two words belongs to both.
  """
  if tokenizer is None:
    return [TokenSpan(str(token), i, i + 1) for i, token in enumerate(ids)]
  characters = list(_characters(_pieces(ids, tokenizer)))
  text = ''.join(character for character, _, _ in characters)
  return [
    TokenSpan(
      match[0], characters[match.start()][1], characters[match.end() - 1][2]
    )
    for match in _WORD.finditer(text)
  ]


def timed(
  ids: Sequence[int],
  spans: Sequence[tuple[float, float]],
  tokenizer: tokenizer_lib.Tokenizer | None,
  *,
  confidence: Sequence[float] | None = None,
) -> list[TimedWord]:
  """Groups tokens with known times into words.

  Args:
    ids: token ids.
    spans: (start, end) of each token in seconds.
    tokenizer: table of the tokens; None as in `group`.
    confidence: probability of each token; that of a word is their geometric
      mean.
  """
  return [
    TimedWord(
      word.text,
      spans[word.start][0],
      spans[word.end - 1][1],
      None
      if confidence is None
      else _geometric_mean(confidence[word.start : word.end]),
    )
    for word in group(ids, tokenizer)
  ]


def _geometric_mean(values: Sequence[float]) -> float:
  # The logarithm of 0 would raise.
  if min(values) <= 0:
    return 0.0
  return math.exp(math.fsum(map(math.log, values)) / len(values))


def _pieces(
  ids: Sequence[int], tokenizer: tokenizer_lib.Tokenizer
) -> list[bytes]:
  """What each token writes."""
  silent = {
    tokenizer.special.blank,
    tokenizer.special.sos,
    tokenizer.special.eos,
  }
  pieces = []
  for token in ids:
    text = '' if token in silent else tokenizer.tokens[token]
    if token == tokenizer.special.unk:
      text = tokenizer_lib.UNKNOWN_TEXT
    byte = _BYTE.fullmatch(text)
    if byte is not None and tokenizer.kind == 'bytes':
      pieces.append(bytes([int(byte[1], 16)]))
    else:
      pieces.append(text.replace(units.SPACE, ' ').encode('utf-8'))
  return pieces


def _characters(pieces: Sequence[bytes]) -> Iterator[tuple[str, int, int]]:
  """Each character, its first token, and the one behind its last."""
  # A byte token may be a part of a character, and a search may end inside one.
  decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
  first = 0
  for index, piece in enumerate(pieces):
    for character in decoder.decode(piece):
      # A byte that breaks a character off begins the next one.
      yield character, min(first, index), index + 1
      first = index
    # No bytes wait for the rest of a character, so the next one begins later.
    if not decoder.getstate()[0]:
      first = index + 1
  for character in decoder.decode(b'', final=True):
    yield character, first, len(pieces)
