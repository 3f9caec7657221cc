"""Sentencepiece pieces, and single Chinese characters between them."""

from collections.abc import Iterable
from collections.abc import Sequence
import io
import os
import pathlib
import re
from typing import Any
from typing import Literal

from u2moe_jax.text import base_tokenizer
from u2moe_jax.text import units

MODEL_FILE = 'bpe.model'
_CJK = re.compile(r'([\u4e00-\u9fff])')


class BpeTokenizer(base_tokenizer.Tokenizer):
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
    (pathlib.Path(folder) / MODEL_FILE).write_bytes(self._model)

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
    return ''.join(tokens).replace(units.SPACE, ' ').strip()

  def _knows(self, character: str) -> bool:
    # sentencepiece cuts any text; whether the pieces have ids is the question.
    return all(piece in self._ids for piece in self._split(character))


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
    # A split by a group gives text and separators in turn.
    chinese.update(parts[1::2])
    sentences += [' '.join(part.split()) for part in parts[::2] if part.strip()]
  model = _train_sentencepiece(
    sentences,
    # sentencepiece counts <unk> among its pieces; we have it anyway.
    vocab_size=vocab_size - len(chinese) - len(units.RESERVED) + 1,
    model_type=model_type,
    character_coverage=character_coverage,
  )
  tokens = units.make_table(sorted(chinese | _pieces(model)))
  return BpeTokenizer(tokens, model=model, uppercase=uppercase)


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
