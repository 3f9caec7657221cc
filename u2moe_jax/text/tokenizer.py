"""Turns text into token ids and back: characters, BPE pieces or bytes.

A tokenizer lives in a folder: `units.txt` with one `TOKEN ID` per line,
`bpe.model` for sentencepiece, and `tokenizer.json` with its kind. WeNet's
folders have no `tokenizer.json`, and other names (`lang_char.txt`,
`train_960_unigram5000.model`); what there is tells the kind then.

Every kind treats whitespace alike: runs of it are one space, and there is
none at the ends. With that, `decode(encode(text)) == text` for text whose
characters the table knows, with one exception that `BpeTokenizer` names.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import json
import os
import pathlib
import re
from typing import Any

from u2moe_jax.text import base_tokenizer
from u2moe_jax.text import bpe
from u2moe_jax.text import units

# Where tokenizers are used, this is the one module to import.
SpecialIds = units.SpecialIds
Tokenizer = base_tokenizer.Tokenizer
BpeTokenizer = bpe.BpeTokenizer
UNKNOWN_TEXT = base_tokenizer.UNKNOWN_TEXT
read_units = units.read_units
special_ids = units.special_ids
train_bpe = bpe.train_bpe

_TABLES = (base_tokenizer.UNITS_FILE, '*units.txt', 'lang_char.txt')
_MODELS = (bpe.MODEL_FILE, '*.model')
_SYMBOL = re.compile(r'<[^<>]+>|\[[^\[\]]+\]|{[^{}]+}')
_DOUBLE = re.compile(r'([^\W\d_])\1')  # a letter, twice


class CharTokenizer(base_tokenizer.Tokenizer):
  """One token for each character; the space is `units.SPACE`.

  Chinese and English alike. Tokens in brackets that the table has, such as
  <NOISE> or {laughter}, are kept whole, and so are doubled letters that it
  has, such as the EE of THREE.
  """

  kind = 'char'

  def __init__(self, tokens: Sequence[str]):
    """Wraps a table; see `Tokenizer`."""
    super().__init__(tokens)
    symbols = [
      re.escape(token)
      # Longest first: of alternatives a regular expression takes the first.
      for token in sorted(self.tokens, key=len, reverse=True)
      if _is_whole(token) and token not in units.RESERVED
    ]
    self._pattern = re.compile('|'.join([*symbols, '.']), re.DOTALL)

  def _split(self, text: str) -> list[str]:
    return self._pattern.findall(text.replace(' ', units.SPACE))

  def _join(self, tokens: list[str]) -> str:
    return ''.join(tokens).replace(units.SPACE, ' ').strip()

  def _knows(self, character: str) -> bool:
    return character.replace(' ', units.SPACE) in self._ids


class ByteTokenizer(base_tokenizer.Tokenizer):
  """UTF-8 bytes, which know every text; byte tokens read <0x00> to <0xFF>."""

  kind = 'bytes'

  def __init__(self, tokens: Sequence[str] | None = None):
    """Wraps a table; by default the special tokens and the 256 bytes.

    Args:
      tokens: all tokens in the order of their ids.

    Raises:
      ValueError: if a byte is missing.
    """
    names = [_byte_token(value) for value in range(256)]
    super().__init__(units.make_table(names) if tokens is None else tokens)
    self._values = {name: value for value, name in enumerate(names)}
    missing = [name for name in names if name not in self._ids]
    if missing:
      raise ValueError(f'the byte table has no token {missing[0]}')

  def _split(self, text: str) -> list[str]:
    return [_byte_token(value) for value in text.encode('utf-8')]

  def _join(self, tokens: list[str]) -> str:
    values = [self._values[token] for token in tokens if token in self._values]
    # A search may end in the middle of a character.
    return bytes(values).decode('utf-8', errors='replace').strip()

  def _knows(self, character: str) -> bool:
    return True


def _is_whole(token: str) -> bool:
  return bool(_SYMBOL.fullmatch(token) or _DOUBLE.fullmatch(token))


def build_char_tokenizer(
  texts: Iterable[str], *, double_letters: bool = False
) -> CharTokenizer:
  """Makes a table of all characters of some texts.

  Args:
    texts: transcripts, in the form that will be encoded later.
    double_letters: give the doubled letters of the texts a token of their own,
      so that CTC needs no blank inside of them (as the repetition graphemes
      of Wav2Letter, arXiv 1609.03193, section 2.2).

  Returns:
    A tokenizer whose characters are sorted, the space among them if any text
    has one inside.
  """
  characters: set[str] = set()
  for text in texts:
    characters.update(units.SPACE.join(text.split()))
    if double_letters:
      characters.update(found[0] for found in _DOUBLE.finditer(text))
  return CharTokenizer(units.make_table(sorted(characters)))


def load(path: str | os.PathLike[str]) -> Tokenizer:
  """Reads a tokenizer, ours or one from WeNet.

  Args:
    path: a folder with `units.txt`, and `bpe.model` for sentencepiece.
      Without `tokenizer.json`, as in WeNet's recipes, a model means BPE on
      capitals, a table alone means characters, and there may be one
      `*units.txt` or `lang_char.txt` and one `*.model` instead. Or the path
      of such a table, whose model lies beside it.

  Returns:
    The tokenizer.

  Raises:
    ValueError: if a file is malformed, or one of several might be meant;
      names it.
    OSError: if a file is missing.
  """
  path = pathlib.Path(path)
  folder = path.parent if path.is_file() else path
  table = path if path.is_file() else _find(folder, *_TABLES)
  model = _find(folder, *_MODELS)
  settings = _read_settings(folder, has_model=model.exists())
  tokens = read_units(table)
  try:
    if settings['kind'] == BpeTokenizer.kind:
      uppercase = bool(settings.get('uppercase', False))
      return BpeTokenizer(tokens, model=model.read_bytes(), uppercase=uppercase)
    if settings['kind'] == ByteTokenizer.kind:
      return ByteTokenizer(tokens)
    return CharTokenizer(tokens)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def _find(folder: pathlib.Path, *patterns: str) -> pathlib.Path:
  """The file of the first pattern with any; of the first one if none has."""
  for pattern in patterns:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
      names = ', '.join(file.name for file in found)
      raise ValueError(f'{folder}: {names}: which of them? keep one')
    if found:
      return found[0]
  return folder / patterns[0]


def _read_settings(folder: pathlib.Path, *, has_model: bool) -> dict[str, Any]:
  """Reads tokenizer.json, or tells the kind by the files there are."""
  path = folder / base_tokenizer.SETTINGS_FILE
  if not path.exists():
    if has_model:
      return {'kind': BpeTokenizer.kind, 'uppercase': True}
    return {'kind': CharTokenizer.kind}
  try:
    settings = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path}: not JSON: {error}') from error
  kinds = [c.kind for c in (CharTokenizer, BpeTokenizer, ByteTokenizer)]
  if not isinstance(settings, dict) or settings.get('kind') not in kinds:
    raise ValueError(f"{path}: 'kind' must be one of {', '.join(kinds)}")
  return settings


def _byte_token(value: int) -> str:
  return f'<0x{value:02X}>'
