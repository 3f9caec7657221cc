"""What all tokenizers have in common: a table, encoding, decoding, saving."""

import abc
from collections.abc import Iterable
from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any
from typing import ClassVar

from u2moe_jax.text import units

UNKNOWN_TEXT = '⁇'  # what an unknown token reads as; one character
UNITS_FILE = 'units.txt'
SETTINGS_FILE = 'tokenizer.json'


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Attributes:
    kind: char, bpe or bytes.
    tokens: the table; token `i` has id i.
    special: ids of the special tokens.
  """

  kind: ClassVar[str]

  def __init__(self, tokens: Sequence[str]):
    """Wraps a table.

    Args:
      tokens: all tokens in the order of their ids, special ones included.

    Raises:
      ValueError: if a token stands there twice, or there are none.
    """
    self.tokens = tuple(tokens)
    self.special = units.special_ids(self.tokens)
    self._ids = {token: index for index, token in enumerate(self.tokens)}
    if len(self._ids) != len(self.tokens):
      twice = next(t for i, t in enumerate(self.tokens) if self._ids[t] != i)
      raise ValueError(f'token {twice!r} stands in the table twice')

  @property
  def vocab_size(self) -> int:
    """Tokens in the table, special ones included."""
    return len(self.tokens)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text; what the table lacks becomes `unk`."""
    unknown = self.special.unk
    pieces = self._split(' '.join(text.split()))
    ids = [self._ids.get(piece, unknown) for piece in pieces]
    # A table without <unk> leaves out what it lacks.
    return [i for i in ids if i >= 0]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, without blank, sos and eos.

    Args:
      ids: ids in [0, vocab_size); no padding.

    Returns:
      The text; an unknown token reads as `UNKNOWN_TEXT`.

    Raises:
      ValueError: if an id is outside the table.
    """
    special = self.special
    silent = {special.blank, special.sos, special.eos}
    return self._join([self._token(i) for i in ids if i not in silent])

  def unknown_characters(self, text: str) -> list[str]:
    """Returns the distinct characters the table lacks, in their order."""
    text = ' '.join(text.split())
    return [c for c in dict.fromkeys(text) if not self._knows(c)]

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the folder that `load` reads; makes it if needed."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    units.write_units(folder / UNITS_FILE, self.tokens)
    settings = json.dumps(self._settings(), indent=2) + '\n'
    (folder / SETTINGS_FILE).write_text(settings, encoding='utf-8')

  def _token(self, index: int) -> str:
    if not 0 <= index < len(self.tokens):
      raise ValueError(
        f'token id {index} is outside the table of {len(self.tokens)} tokens'
      )
    return UNKNOWN_TEXT if index == self.special.unk else self.tokens[index]

  def _settings(self) -> dict[str, Any]:
    return {'kind': self.kind}

  @abc.abstractmethod
  def _split(self, text: str) -> list[str]:
    """Cuts text with single inner spaces into tokens."""

  @abc.abstractmethod
  def _join(self, tokens: list[str]) -> str:
    """Puts tokens together; the inverse of `_split`."""

  @abc.abstractmethod
  def _knows(self, character: str) -> bool:
    """Says whether the table can write a character."""
