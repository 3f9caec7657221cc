"""Finds out when each word of known transcripts was said.

  python -m experiments.align --checkpoint=DIR --manifest=FILE --out=FILE

CTC forced alignment: start and end of every token and word, with confidences,
as JSON lines, or words as CTM (--format=ctm). An utterance that cannot be
aligned stands there with the reason. The last line printed is one JSON object.
"""

import json

from absl import flags
from absl import logging

from experiments.wiring import command
from experiments.wiring import decode_flags

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'Model folder, work directory, or one of its steps.',
  required=True,
)
_MANIFEST = flags.DEFINE_string(
  'manifest',
  None,
  'Manifest, prepared dataset as DIR or DIR:SPLIT, or any KIND:PATH.',
  required=True,
)
_OUT = flags.DEFINE_string('out', None, 'File for the times.', required=True)
_FORMAT = flags.DEFINE_enum(
  'format', 'jsonl', ['jsonl', 'ctm'], 'Form of the times.'
)
_CHUNK_SIZE = flags.DEFINE_integer(
  'chunk_size', -1, 'Encoder frames per chunk; -1: full context.'
)
_LEFT_CHUNKS = flags.DEFINE_integer(
  'left_chunks', -1, 'Chunks of left context; -1: all.'
)
_BATCH_SECONDS = flags.DEFINE_float(
  'batch_seconds', 120.0, 'Padded sound per batch.'
)
_MOST_NAMED = 10


def main(_: list[str]) -> int:
  """Aligns; exit codes in docs/exit_codes.md."""
  from data_pipelines import sources
  from experiments.wiring import aligning
  from u2moe_jax import config as config_lib
  from u2moe_jax.checkpoint import directory
  from u2moe_jax.decoding import recognizer as recognizer_lib

  config = config_lib.DecodeConfig(
    # Alignment reads CTC alone; this mode does not ask for decoders.
    mode='ctc_greedy_search',
    chunk_size=_CHUNK_SIZE.value,
    left_chunks=_LEFT_CHUNKS.value,
    batch_seconds=_BATCH_SECONDS.value,
  )
  # What is wrong with the model shows before the data is opened, and what is
  # wrong with the data before parameters are read.
  found = directory.find(_CHECKPOINT.value, for_decoding=True)
  decode_flags.warn(found.description, config)
  rate = found.description.features.sample_rate
  source = sources.open_source(_MANIFEST.value, split='test', sample_rate=rate)
  print(f'checkpoint: {found.choice}')
  recognizer = recognizer_lib.Recognizer.from_checkpoint(
    _CHECKPOINT.value, config=config
  )
  aligned = aligning.align(recognizer, source)
  aligning.write(_OUT.value, source, aligned, format_name=_FORMAT.value)
  failed = [i for i, each in enumerate(aligned) if each.problem is not None]
  for index in failed[:_MOST_NAMED]:
    key = source.utterances[index].key
    logging.warning('not aligned: %s: %s', key, aligned[index].problem)
  words = sum(len(each.words) for each in aligned)
  summary = {'utterances': len(aligned), 'failed': len(failed), 'words': words}
  print(json.dumps(summary))
  return command.OK


if __name__ == '__main__':
  command.run(main)
