"""Manifests into the recogniser, transcripts into files and scores."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import json
import os
import pathlib
import time
from typing import Any

from absl import logging
import numpy as np
import tqdm

from data_pipelines import manifest
from data_pipelines import sources
from experiments.wiring import timing
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import streaming
from u2moe_jax.frontend import audio
from u2moe_jax.text import scoring

# Sound is fed to a stream in pieces of this length, as a microphone would.
_PIECE_SECONDS = 0.1
# Utterances held in memory at once.
_GROUP = 512


@dataclasses.dataclass(frozen=True)
class Decoded:
  """One utterance, decoded.

  Attributes:
    utterance: reference.
    transcript: hypothesis.
    seconds: its sound.
    chunk_ms: milliseconds of each chunk, when streamed.
  """

  utterance: manifest.Utterance
  transcript: recognizer_lib.Transcript
  seconds: float
  chunk_ms: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Summary:
  """Scores of a decoded set.

  Attributes:
    words: word error counts.
    characters: character error counts.
    utterances: how many.
    rtf: seconds of work per second of sound, compilation apart.
    failed: utterances whose sound could not be used.
    chunk_ms: all chunks' milliseconds, when streamed.
  """

  words: scoring.ErrorCounts
  characters: scoring.ErrorCounts
  utterances: int
  rtf: float
  failed: int = 0
  chunk_ms: tuple[float, ...] = ()

  def to_json(self) -> dict[str, Any]:
    """Rates in per cent, and counts."""
    return {
      'utterances': self.utterances,
      'failed': self.failed,
      'words': self.words.reference_length,
      'wer': round(self.words.rate, 3),
      'cer': round(self.characters.rate, 3),
      'substitutions': self.words.substitutions,
      'deletions': self.words.deletions,
      'insertions': self.words.insertions,
      'rtf': round(self.rtf, 5),
    }


@dataclasses.dataclass
class Clock:
  """Work and sound so far."""

  work: float = 0.0
  sound: float = 0.0
  failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def decode(
  recognizer: recognizer_lib.Recognizer, source: sources.Source, clock: Clock
) -> Iterator[Decoded]:
  """Decodes a source in padded batches; yields in the source's order.

  An utterance whose sound cannot be used is left out and noted in
  `clock.failed`.
  """
  for start in range(0, len(source), _GROUP):
    loaded = list(
      _load(source, range(start, min(start + _GROUP, len(source))), clock)
    )
    features = []
    for _, samples in loaded:
      frames, seconds = timing.warm(
        functools.partial(recognizer.features, samples)
      )
      features.append(frames)
      clock.work += seconds
    results: list[recognizer_lib.Transcript | None] = [None] * len(loaded)
    for batch in recognizer.batches(features):
      found, seconds = timing.warm(functools.partial(recognizer.search, batch))
      clock.work += seconds
      for index, transcript in zip(batch.indices, found, strict=True):
        results[index] = transcript
    for (utterance, samples), result in zip(loaded, results, strict=True):
      assert result is not None  # every batch fills its own
      yield Decoded(utterance, result, _seconds(recognizer, samples))


def _seconds(recognizer, samples) -> float:
  return len(samples) / recognizer.description.features.sample_rate


def _load(source, indices, clock):
  for index in indices:
    utterance = source.utterances[index]
    try:
      samples = source.load(index)
    except audio.AudioError as error:
      clock.failed.append((utterance.key, str(error)))
      continue
    clock.sound += len(samples) / 16000
    yield utterance, samples


def decode_streaming(
  recognizer: recognizer_lib.Recognizer, source: sources.Source, clock: Clock
) -> Iterator[Decoded]:
  """Decodes a source chunk by chunk through the cached streaming path."""
  for utterance, samples in _load(source, range(len(source)), clock):
    result, seconds = timing.warm(
      functools.partial(_stream, recognizer, samples)
    )
    clock.work += seconds
    transcript, chunk_ms = result
    yield Decoded(
      utterance, transcript, _seconds(recognizer, samples), chunk_ms
    )


def _stream(recognizer, samples):
  """Feeds one waveform piece by piece; times the calls that ran a chunk."""
  stream = streaming.Stream(recognizer)
  size = int(_PIECE_SECONDS * recognizer.description.features.sample_rate)
  chunk_ms = []
  for start in range(0, len(samples), size):
    piece = samples[start : start + size]
    part, seconds = _timed(functools.partial(stream.accept, piece))
    if part.num_chunks:
      chunk_ms.append(1000 * seconds / part.num_chunks)
  return stream.finish(), tuple(chunk_ms)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
  begun = time.perf_counter()
  result = function()
  return result, time.perf_counter() - begun


def summarise(decoded: Sequence[Decoded], clock: Clock) -> Summary:
  """Corpus-level scores; both sides normalised the same way."""
  pairs = [
    (
      scoring.normalise(each.utterance.txt),
      scoring.normalise(each.transcript.text),
    )
    for each in decoded
  ]
  return Summary(
    words=scoring.corpus_errors(pairs),
    characters=scoring.corpus_errors(pairs, unit='character'),
    utterances=len(decoded),
    rtf=clock.work / max(clock.sound, 1e-9),
    failed=len(clock.failed),
    chunk_ms=tuple(ms for each in decoded for ms in each.chunk_ms),
  )


def run(
  recognizer: recognizer_lib.Recognizer,
  source: sources.Source,
  *,
  streamed: bool = False,
  out: str | os.PathLike[str] | None = None,
) -> tuple[Summary, list[Decoded]]:
  """Decodes and scores a source.

  Args:
    recognizer: model and settings.
    source: utterances.
    streamed: take the cached, chunk-by-chunk path.
    out: JSON-lines file for the transcripts, written whole or not at all.

  Returns:
    The scores, and every utterance.
  """
  clock = Clock()
  path = decode_streaming if streamed else decode
  progress = tqdm.tqdm(
    path(recognizer, source, clock),
    total=len(source),
    unit='utt',
    disable=None,
    leave=False,
  )
  decoded = list(progress)
  for key, reason in clock.failed[:10]:
    logging.warning('left out: %s: %s', key, reason)
  if out is not None:
    _write(pathlib.Path(out), decoded, recognizer)
  return summarise(decoded, clock), decoded


def _write(path, decoded, recognizer) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + '.unfinished')
  with unfinished.open('w', encoding='utf-8') as file:
    for each in decoded:
      line = to_line(each, with_nbest=recognizer.config.nbest > 1)
      file.write(line + '\n')
  os.replace(unfinished, path)


def to_line(decoded: Decoded, *, with_nbest: bool) -> str:
  """One transcript as a line of JSON."""
  transcript = decoded.transcript
  record: dict[str, Any] = {
    'key': decoded.utterance.key,
    'text': transcript.text,
    'tokens': list(transcript.tokens),
    'score': _number(transcript.score),
    'times': list(transcript.times),
  }
  if transcript.confidence is not None:
    record['confidence'] = _number(transcript.confidence)
  if with_nbest:
    record['nbest'] = [
      {'text': a.text, 'tokens': list(a.tokens), 'score': _number(a.score)}
      for a in transcript.nbest
    ]
  return json.dumps(record, ensure_ascii=False)


def _number(value: float) -> float | None:
  return round(value, 5) if np.isfinite(value) else None
