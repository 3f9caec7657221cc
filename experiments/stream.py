"""Streams a recording: growing text as chunks arrive, then the final one.

  python -m experiments.stream --checkpoint=DIR --wav=FILE
  arecord -f S16_LE -r 16000 -c 1 -t raw | \
    python -m experiments.stream --checkpoint=DIR --wav=-

`-` is raw PCM on standard input: 16-bit little-endian, mono, at the model's
rate (16 kHz unless it was trained for another).
"""

from collections.abc import Iterator
import sys

from absl import flags
import numpy as np

from experiments.wiring import command
from experiments.wiring import decode_flags

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'Model folder, work directory, or one of its steps.',
  required=True,
)
_WAV = flags.DEFINE_string(
  'wav', None, 'Audio file, or - for PCM on stdin.', required=True
)
decode_flags.define(chunk_size=16)

_PIECE_SECONDS = 0.1


def _pieces(recognizer) -> Iterator[np.ndarray]:
  """The sound in pieces of a tenth of a second."""
  size = int(recognizer.description.features.sample_rate * _PIECE_SECONDS)
  if _WAV.value == '-':
    while data := sys.stdin.buffer.read(2 * size):
      yield np.frombuffer(data[: len(data) // 2 * 2], np.dtype('<i2'))
    return
  samples = recognizer.load(_WAV.value)
  for start in range(0, len(samples), size):
    yield samples[start : start + size]


def main(_) -> int:
  """Streams; exit codes in docs/exit_codes.md."""
  config = decode_flags.config()
  from u2moe_jax.decoding import recognizer as recognizer_lib
  from u2moe_jax.decoding import streaming

  recognizer = recognizer_lib.Recognizer.from_checkpoint(
    _CHECKPOINT.value, config=config
  )
  decode_flags.warn(recognizer.description.model, config)
  stream = streaming.Stream(recognizer)
  shown = ''
  for piece in _pieces(recognizer):
    part = stream.accept(piece)
    if part.text != shown:
      shown = part.text
      print(f'{part.seconds:7.2f} s  {shown}', flush=True)
  print(f'  final    {stream.finish().text}')
  return command.OK


if __name__ == '__main__':
  command.run(main)
