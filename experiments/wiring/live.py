"""Streams side by side: pieces of sound in, lines of text out."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import sys

import numpy as np

from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import sessions
from u2moe_jax.decoding import transcript as transcript_lib

# Pieces as a microphone gives them.
PIECE_SECONDS = 0.1


def pieces_of_file(
  recognizer: recognizer_lib.Recognizer, path: str
) -> Iterator[np.ndarray]:
  """The sound of a file in pieces.

  Raises:
    audio.AudioError: at the first piece, if it cannot be used.
  """
  size = _size(recognizer)
  samples = recognizer.load(path)
  for start in range(0, len(samples), size):
    yield samples[start : start + size]


def pieces_of_stdin(
  recognizer: recognizer_lib.Recognizer,
) -> Iterator[np.ndarray]:
  """16-bit little-endian mono PCM as it comes, until it ends or is stopped."""
  # Two bytes a sample; the end of a pipe may cut the last one in half.
  while data := _read(2 * _size(recognizer)):
    yield np.frombuffer(data[: len(data) // 2 * 2], np.dtype('<i2'))


def _read(size: int) -> bytes:
  try:
    return sys.stdin.buffer.read(size)
  except KeyboardInterrupt:
    return b''  # that is how one stops a microphone; what was said is wanted


def _size(recognizer: recognizer_lib.Recognizer) -> int:
  rate = recognizer.description.features.sample_rate
  return int(rate * PIECE_SECONDS)


def listen(
  pool: sessions.Sessions,
  sounds: Mapping[str, Iterator[np.ndarray]],
  *,
  say: Callable[[str], None] = print,
) -> dict[str, str]:
  """Streams several sounds in one batch, a piece of each at a time.

  Args:
    pool: with a slot for each.
    sounds: pieces of sound by name. One that cannot be used leaves; the others
      go on.
    say: told the text as it grows, and every segment when it has ended.

  Returns:
    Why a sound could not be used, by name.
  """
  prefix = {name: f'{name}: ' if len(sounds) > 1 else '' for name in sounds}
  running = {name: pool.open() for name in sounds}
  shown = dict.fromkeys(sounds, '')
  failed: dict[str, str] = {}
  while running:
    for name, session in list(running.items()):
      try:
        piece = next(sounds[name], None)
        session.close() if piece is None else session.feed(piece)
      except ValueError as error:
        failed[name] = ' '.join(str(error).split())
        running.pop(name).leave()
    # All have been fed, so one step takes a chunk of each that has one; again
    # until none has, since a stream that ends may leave frames of two chunks.
    while pool.step():
      pass
    # A copy: streams leave on the way.
    for name, session in list(running.items()):
      part = session.read()
      segments = part.segments
      if session.closed:
        segments += running.pop(name).finish()
      elif part.text not in ('', shown[name]):
        say(f'{prefix[name]}{part.seconds:8.2f} s  {part.text}')
      shown[name] = part.text
      for segment in segments:
        if segment.transcript.text:
          say(prefix[name] + _line(segment))
  return failed


def _line(segment: transcript_lib.Segment) -> str:
  text, end = segment.transcript.text, segment.end
  return f'[{segment.start:.2f} - {end:.2f} s, {segment.reason}]  {text}'
