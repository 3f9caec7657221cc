"""Decodes a manifest or dataset split and scores it.

  python -m experiments.decode --checkpoint=DIR --manifest=FILE \
    --mode=attention_rescoring --chunk_size=16 --out=FILE

The last line printed is one JSON object with the scores.
"""

import json

from absl import flags

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
  'Manifest, or prepared dataset as DIR or DIR:SPLIT.',
  required=True,
)
_OUT = flags.DEFINE_string('out', None, 'JSON-lines file for transcripts.')
_STREAMING = flags.DEFINE_bool(
  'streaming', False, 'Take the cached, chunk-by-chunk path (needs a chunk).'
)
decode_flags.define()


def main(_) -> int:
  """Decodes; exit codes in docs/exit_codes.md."""
  config = decode_flags.config()
  from data_pipelines import sources
  from experiments.wiring import decoding
  from u2moe_jax.checkpoint import directory
  from u2moe_jax.decoding import recognizer

  source = sources.open_source(_MANIFEST.value, split='test')
  print(f'checkpoint: {directory.find(_CHECKPOINT.value).choice}')
  model = recognizer.Recognizer.from_checkpoint(
    _CHECKPOINT.value, config=config
  )
  summary, _ = decoding.run(
    model, source, streamed=_STREAMING.value, out=_OUT.value
  )
  record = {'mode': config.mode, 'chunk_size': config.chunk_size}
  print(json.dumps(record | summary.to_json()))
  return command.OK


if __name__ == '__main__':
  command.run(main)
