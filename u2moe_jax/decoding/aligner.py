"""From sound and text to times: forced alignment with a model directory."""

from collections.abc import Sequence
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from u2moe_jax.decoding import alignment
from u2moe_jax.decoding import batching
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.text import words as words_lib

# Labels are padded to a multiple of this, so that few shapes compile.
_LABEL_STEP = 32

_align = jax.jit(alignment.align, static_argnames='blank_id')


@dataclasses.dataclass(frozen=True)
class TimedToken:
  """A token of the text and when it was said.

  Attributes:
    text: the token as it stands in the table; its id without a table.
    start: seconds.
    end: seconds.
    confidence: its CTC probability at its most probable frame.
  """

  text: str
  start: float
  end: float
  confidence: float


@dataclasses.dataclass(frozen=True)
class Aligned:
  """An aligned utterance.

  Attributes:
    tokens: in order; empty if there is a problem.
    words: in order, likewise.
    score: log-prob of the alignment.
    problem: why it could not be aligned; None if it could.
  """

  tokens: tuple[TimedToken, ...]
  words: tuple[words_lib.TimedWord, ...]
  score: float
  problem: str | None = None


def failed(problem: str) -> Aligned:
  """An utterance that cannot be aligned."""
  return Aligned((), (), -np.inf, problem)


def encode_text(
  recognizer: recognizer_lib.Recognizer, text: str
) -> tuple[list[int], str | None]:
  """Token ids of a text, and why it cannot be aligned, if so.

  Without a token table the text must be ids.
  """
  tokenizer = recognizer.tokenizer
  if tokenizer is None:
    parts = text.split()
    size = recognizer.description.model.vocab_size
    if not all(part.isdecimal() and int(part) < size for part in parts):
      return [], f'no token table, and the text is not ids below {size}'
    ids = list(map(int, parts))
  else:
    unknown = tokenizer.unknown_characters(text)
    if unknown:
      listed = ' '.join(unknown)
      return [], f'characters that the token table lacks: {listed}'
    ids = tokenizer.encode(text)
  return ids, None if ids else 'the text has no tokens'


def align(
  recognizer: recognizer_lib.Recognizer,
  batch: batching.PaddedBatch,
  labels: Sequence[Sequence[int]],
) -> list[Aligned]:
  """Aligns one padded batch.

  Args:
    recognizer: the model; its chunk settings count, its mode does not.
    batch: see `Recognizer.batches`.
    labels: token ids of each utterance of the batch, in its order.

  Returns:
    One result for each of `labels`.
  """
  rows = batch.features.shape[0]
  longest = max((len(row) for row in labels), default=0)
  size = -(-max(longest, 1) // _LABEL_STEP) * _LABEL_STEP
  # As many rows as the batch has, those behind the utterances without labels.
  padded = np.full((rows, size), -1, np.int32)
  for row, ids in enumerate(labels):
    padded[row, : len(ids)] = ids
  encoded = recognizer.encode(batch)
  found = _align(
    encoded.log_probs,
    encoded.mask,
    jnp.asarray(padded),
    jnp.asarray(padded >= 0),
    blank_id=recognizer.description.model.blank_id,
  )
  found = jax.device_get(found)
  num_frames = np.asarray(encoded.mask).sum(axis=1)
  return [
    _read(recognizer, found, row, list(ids), int(num_frames[row]))
    for row, ids in enumerate(labels)
  ]


def _read(
  recognizer: recognizer_lib.Recognizer,
  found: alignment.Alignment,
  row: int,
  ids: list[int],
  num_frames: int,
) -> Aligned:
  if not found.feasible[row]:
    # Equal neighbours need a blank between them, hence a frame more.
    repeats = sum(a == b for a, b in itertools.pairwise(ids))
    return failed(
      f'{len(ids)} tokens, {repeats} of them repeated, need '
      f'{len(ids) + repeats} frames; the sound has {num_frames} of '
      f'{1000 * recognizer.frame_seconds:g} ms'
    )
  spans = alignment.token_spans(
    found.peaks[row, : len(ids)].tolist(),
    num_frames=num_frames,
    frame_seconds=recognizer.frame_seconds,
  )
  confidence = found.confidence[row, : len(ids)].tolist()
  tokenizer = recognizer.tokenizer
  names = [str(i) if tokenizer is None else tokenizer.tokens[i] for i in ids]
  words = words_lib.timed(ids, spans, tokenizer, confidence=confidence)
  return Aligned(
    tokens=tuple(
      TimedToken(name, start, end, share)
      for name, (start, end), share in zip(
        names, spans, confidence, strict=True
      )
    ),
    words=tuple(words),
    score=float(found.score[row]),
  )
