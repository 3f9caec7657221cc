r"""Makes a token table from transcripts.

  python -m experiments.train_tokenizer --source=train.jsonl --type=bpe \
    --size=5000 --out=DIR

DIR then goes to --config.data.tokens=DIR. A table of characters or bytes has
the size it has; --size is that of a BPE table, special tokens included.
"""

from collections.abc import Iterable
import os
import pathlib
import shutil

from absl import flags

from experiments.wiring import command
from u2moe_jax import config as config_lib
from u2moe_jax.text import tokenizer as tokenizer_lib

_SOURCE = flags.DEFINE_string(
  'source', None, 'Manifest, prepared data set, or KIND:PATH.', required=True
)
_TYPE = flags.DEFINE_enum(
  'type', 'char', ['char', 'bpe', 'bytes'], 'Kind of token.'
)
_SIZE = flags.DEFINE_integer('size', 5000, 'BPE: tokens.', lower_bound=1)
_MODEL = flags.DEFINE_enum(
  'model', 'unigram', ['unigram', 'bpe'], "BPE: sentencepiece's model type."
)
_UPPERCASE = flags.DEFINE_bool(
  'uppercase', False, 'BPE: turn text into capitals, here and when encoding.'
)
_OUT = flags.DEFINE_string(
  'out', None, 'Folder to write; must not be there.', required=True
)


def main(_: list[str]) -> int:
  """Trains and writes; exit codes in docs/exit_codes.md."""
  from data_pipelines import sources  # not for --help

  out = pathlib.Path(_OUT.value)
  if out.exists():
    raise config_lib.ConfigError(f'--out={out} is there already; give another')
  # Only texts are needed: without durations no header is read.
  source = sources.open_source(_SOURCE.value, measure=False)
  # A list, since it is gone through twice.
  texts = [utterance.txt for utterance in source.utterances]
  tokenizer = _make(texts)
  _write(tokenizer, out)
  count = sum(len(tokenizer.encode(text)) for text in texts)
  print(
    f'{out}: {tokenizer.vocab_size} tokens ({tokenizer.kind}) from '
    f'{len(texts)} transcripts, {count / len(texts):.1f} tokens each'
  )
  return command.OK


def _make(texts: Iterable[str]) -> tokenizer_lib.Tokenizer:
  if _TYPE.value == 'char':
    return tokenizer_lib.build_char_tokenizer(texts)
  if _TYPE.value == 'bytes':
    return tokenizer_lib.ByteTokenizer()
  return tokenizer_lib.train_bpe(
    texts,
    _SIZE.value,
    model_type='bpe' if _MODEL.value == 'bpe' else 'unigram',
    uppercase=_UPPERCASE.value,
  )


def _write(tokenizer: tokenizer_lib.Tokenizer, out: pathlib.Path) -> None:
  """Writes the folder; it appears when everything is in it."""
  unfinished = out.with_name(f'{out.name}.incomplete')
  shutil.rmtree(unfinished, ignore_errors=True)
  tokenizer.save(unfinished)
  os.rename(unfinished, out)


if __name__ == '__main__':
  command.run(main)
