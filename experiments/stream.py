r"""Streams recordings: text that grows as chunks arrive, then its final form.

  python -m experiments.stream --checkpoint=DIR --wav=FILE [--wav=FILE ...]
  arecord -f S16_LE -r 16000 -c 1 -t raw | \
    python -m experiments.stream --checkpoint=DIR --wav=-

`-` is raw PCM on standard input: 16-bit little-endian, mono, at the model's
rate (16 kHz unless it was trained for another). Several files are several
streams that step together, in one batch. A stream is cut into segments by
endpoint rules; each is printed when it has ended.
"""

import sys

from absl import flags

from experiments.wiring import command
from experiments.wiring import decode_flags

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'Model folder, work directory, or one of its steps.',
  required=True,
)
_WAV = flags.DEFINE_multi_string(
  'wav',
  None,
  'Audio file, or - for PCM on stdin. Several: streams of one batch.',
  required=True,
)
_ENDPOINTS = flags.DEFINE_bool(
  'endpoints', True, 'Cut the streams into segments by the endpoint rules.'
)
decode_flags.define(chunk_size=16)


def main(_: list[str]) -> int:
  """Streams; exit codes in docs/exit_codes.md."""
  config = decode_flags.config()
  # Streams are told apart by name, so a file given twice is one stream.
  names = list(dict.fromkeys(_WAV.value))
  # Imported here, so that --help and bad flags answer at once.
  from experiments.wiring import live
  from u2moe_jax.decoding import recognizer as recognizer_lib
  from u2moe_jax.decoding import sessions

  recognizer = recognizer_lib.Recognizer.from_checkpoint(
    _CHECKPOINT.value, config=config
  )
  decode_flags.warn(recognizer.description, config)
  pool = sessions.Sessions(
    recognizer, slots=len(names), endpoints=_ENDPOINTS.value
  )
  if '-' in names:
    pool.warm_up()  # nobody should speak to a compiler
  sounds = {
    name: live.pieces_of_stdin(recognizer)
    if name == '-'
    else live.pieces_of_file(recognizer, name)
    for name in names
  }
  try:
    failed = live.listen(pool, sounds, say=_say)
  except KeyboardInterrupt:
    return command.INTERRUPTED
  for reason in failed.values():
    print(f'error: {reason}', file=sys.stderr, flush=True)
  return command.BAD_INPUT if failed else command.OK


def _say(line: str) -> None:
  print(line, flush=True)


if __name__ == '__main__':
  command.run(main)
