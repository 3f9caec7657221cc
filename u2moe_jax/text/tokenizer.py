"""Turns text into token ids and back: characters, BPE pieces or bytes.

A tokenizer lives in a folder: `units.txt` with one `TOKEN ID` per line,
`bpe.model` for sentencepiece, and `tokenizer.json` with its kind. WeNet's
folders have no `tokenizer.json`; what else is there tells the kind then.

New tables start with <blank> 0, <unk> 1, <sos/eos> 2, and the rest follows
sorted. Tables that were made elsewhere keep their order; the special ids are
found by name.

Every kind treats whitespace alike: runs of it are one space, and there is
none at the ends. With that, `decode(encode(text)) == text` for text whose
characters the table knows, with one exception that `BpeTokenizer` names.
"""

import abc
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import io
import json
import os
import pathlib
import re
from typing import Any
from typing import ClassVar
from typing import Literal

BLANK = '<blank>'
UNKNOWN = '<unk>'
SOS_EOS = '<sos/eos>'
SPACE = '▁'  # U+2581, as in sentencepiece
UNKNOWN_TEXT = '⁇'  # what an unknown token reads as; one character

_UNITS_FILE = 'units.txt'
_MODEL_FILE = 'bpe.model'
_SETTINGS_FILE = 'tokenizer.json'
_UNIT_LINE = re.compile(r'([^ \t]+)[ \t]+([0-9]+)[ \t]*')
_CJK = re.compile(r'([\u4e00-\u9fff])')
_NUM_RESERVED = 3  # <blank>, <unk>, <sos/eos>


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
    self.special = special_ids(self.tokens)
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
    lines = [f'{token} {index}\n' for index, token in enumerate(self.tokens)]
    (folder / _UNITS_FILE).write_bytes(''.join(lines).encode('utf-8'))
    settings = json.dumps(self._settings(), indent=2) + '\n'
    (folder / _SETTINGS_FILE).write_text(settings, encoding='utf-8')

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


class CharTokenizer(Tokenizer):
  """One token for each character; the space is `SPACE`."""

  kind = 'char'

  def _split(self, text: str) -> list[str]:
    return list(text.replace(' ', SPACE))

  def _join(self, tokens: list[str]) -> str:
    return ''.join(tokens).replace(SPACE, ' ').strip()

  def _knows(self, character: str) -> bool:
    return character.replace(' ', SPACE) in self._ids


class BpeTokenizer(Tokenizer):
  """Sentencepiece pieces; each Chinese character is a token of its own.

  As in WeNet, the text is cut at Chinese characters (U+4E00 to U+9FFF) and
  sentencepiece sees only what is between them. So a space next to a Chinese
  character is not kept, and one appears before a word that follows one.
  """

  kind = 'bpe'

  def __init__(
    self, tokens: Sequence[str], *, model: bytes, uppercase: bool = False
  ):
    """Wraps a table and a sentencepiece model.

    Args:
      tokens: all tokens in the order of their ids.
      model: contents of the sentencepiece model file.
      uppercase: turns text into capitals first, as WeNet's recipes do.

    Raises:
      ValueError: if the table or the model is no good.
    """
    import sentencepiece  # only this kind needs it

    super().__init__(tokens)
    self._model = model
    self._uppercase = uppercase
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
      raise ValueError(f'not a sentencepiece model: {error}') from error

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the folder that `load` reads; makes it if needed."""
    super().save(folder)
    (pathlib.Path(folder) / _MODEL_FILE).write_bytes(self._model)

  def _settings(self) -> dict[str, Any]:
    return super()._settings() | {'uppercase': self._uppercase}

  def _split(self, text: str) -> list[str]:
    pieces = []
    for part in _CJK.split(text.upper() if self._uppercase else text):
      if _CJK.fullmatch(part):
        pieces.append(part)
      elif part.strip():
        pieces += self._processor.EncodeAsPieces(part)
    return pieces

  def _join(self, tokens: list[str]) -> str:
    return ''.join(tokens).replace(SPACE, ' ').strip()

  def _knows(self, character: str) -> bool:
    return all(piece in self._ids for piece in self._split(character))


class ByteTokenizer(Tokenizer):
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
    super().__init__(_table(names) if tokens is None else tokens)
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
  both = ids.get(SOS_EOS, len(tokens) - 1)
  return SpecialIds(
    blank=ids.get(BLANK, 0),
    unk=ids.get(UNKNOWN, -1),
    sos=both if SOS_EOS in ids else ids.get('<sos>', both),
    eos=both if SOS_EOS in ids else ids.get('<eos>', both),
  )


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


def load(folder: str | os.PathLike[str]) -> Tokenizer:
  """Reads a tokenizer folder, ours or one from WeNet.

  Args:
    folder: has `units.txt`, and `bpe.model` for sentencepiece. Without
      `tokenizer.json` a `bpe.model` means BPE on capitals, as in WeNet's
      recipes, and `units.txt` alone means characters.

  Returns:
    The tokenizer.

  Raises:
    ValueError: if a file is malformed; names it.
    OSError: if a file is missing.
  """
  folder = pathlib.Path(folder)
  settings = _read_settings(folder)
  tokens = read_units(folder / _UNITS_FILE)
  try:
    if settings['kind'] == BpeTokenizer.kind:
      model = (folder / _MODEL_FILE).read_bytes()
      uppercase = bool(settings.get('uppercase', False))
      return BpeTokenizer(tokens, model=model, uppercase=uppercase)
    if settings['kind'] == ByteTokenizer.kind:
      return ByteTokenizer(tokens)
    return CharTokenizer(tokens)
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from error


def build_char_tokenizer(texts: Iterable[str]) -> CharTokenizer:
  """Makes a table of all characters of some texts.

  Args:
    texts: transcripts, in the form that will be encoded later.

  Returns:
    A tokenizer whose characters are sorted, the space among them if any text
    has one inside.
  """
  characters: set[str] = set()
  for text in texts:
    characters.update(SPACE.join(text.split()))
  return CharTokenizer(_table(sorted(characters)))


def train_bpe(
  texts: Iterable[str],
  vocab_size: int,
  *,
  model_type: Literal['unigram', 'bpe'] = 'unigram',
  character_coverage: float = 1.0,
  uppercase: bool = False,
) -> BpeTokenizer:
  """Trains sentencepiece pieces; the same texts give the same table.

  Args:
    texts: transcripts. Chinese characters become tokens of their own.
    vocab_size: tokens V of the whole table, special ones and Chinese
      characters included; a unigram table may turn out smaller.
    model_type: unigram (WeNet's recipes) or bpe (merges).
    character_coverage: share of the characters that pieces must cover.
    uppercase: turns text into capitals, here and when encoding.

  Returns:
    The tokenizer.

  Raises:
    ValueError: if the texts cannot give such a table; says why.
  """
  chinese: set[str] = set()
  sentences: list[str] = []
  for text in texts:
    parts = _CJK.split(text.upper() if uppercase else text)
    chinese.update(parts[1::2])
    sentences += [' '.join(part.split()) for part in parts[::2] if part.strip()]
  model = _train_sentencepiece(
    sentences,
    # sentencepiece counts <unk> among its pieces; we have it anyway.
    vocab_size=vocab_size - len(chinese) - _NUM_RESERVED + 1,
    model_type=model_type,
    character_coverage=character_coverage,
  )
  tokens = _table(sorted(chinese | _pieces(model)))
  return BpeTokenizer(tokens, model=model, uppercase=uppercase)


def _table(symbols: Sequence[str]) -> list[str]:
  return [BLANK, UNKNOWN, SOS_EOS, *symbols]


def _byte_token(value: int) -> str:
  return f'<0x{value:02X}>'


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


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
  """Reads tokenizer.json, or tells the kind by the files there are."""
  path = folder / _SETTINGS_FILE
  if not path.exists():
    if (folder / _MODEL_FILE).exists():
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


def _train_sentencepiece(
  sentences: Sequence[str],
  *,
  vocab_size: int,
  model_type: str,
  character_coverage: float,
) -> bytes:
  """Returns the contents of a trained model file."""
  import sentencepiece

  if not sentences:
    raise ValueError('no text to train pieces on, other than Chinese')
  writer = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=iter(sentences),
      model_writer=writer,
      vocab_size=vocab_size,
      model_type=model_type,
      character_coverage=character_coverage,
      hard_vocab_limit=model_type == 'bpe',  # the other trainers may end short
      normalization_rule_name='identity',  # or decode(encode(x)) is not x
      bos_id=-1,
      eos_id=-1,
      num_threads=1,  # sums in one order: the same table every time
      minloglevel=2,
    )
  except RuntimeError as error:
    detail = ' '.join(str(error).split())
    raise ValueError(
      f'sentencepiece cannot make {vocab_size} pieces of {len(sentences)} '
      f'texts; try another vocab_size ({detail})'
    ) from error
  return writer.getvalue()


def _pieces(model: bytes) -> set[str]:
  """The pieces of a model that stand for text."""
  import sentencepiece

  processor = sentencepiece.SentencePieceProcessor()
  processor.LoadFromSerializedProto(model)
  indices = range(processor.GetPieceSize())
  return {
    processor.IdToPiece(i)
    for i in indices
    if not (processor.IsUnknown(i) or processor.IsControl(i))
  }
