"""Manifests into the recogniser, transcripts into files and scores."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import functools
import os
import time
from typing import Any

from absl import logging
import numpy as np
import tqdm

from data_pipelines import job_shard
from data_pipelines import manifest
from data_pipelines import sources
from experiments.wiring import timing
from experiments.wiring import transcripts
from u2moe_jax import config as config_lib
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import sessions
from u2moe_jax.decoding import transcript as transcript_lib
from u2moe_jax.frontend import audio
from u2moe_jax.text import scoring

# Sound is fed to a stream in pieces of this length, as a microphone would.
_PIECE_SECONDS = 0.1
# Of settings that change no result.
_FREE_SETTINGS = ('batch_seconds',)
_MOST_NAMED = 10


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
  transcript: transcript_lib.Transcript
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


@dataclasses.dataclass(frozen=True)
class _Loaded:
  """One utterance on its way in: features, or a reason.

  Attributes:
    index: its place in the source.
    features: what is encoded; None of what failed, and of long recordings,
      which are cut into segments first.
    samples: of a long recording.
    failed: why its sound cannot be used.
    sound: seconds of it.
    work: seconds that were spent on it.
  """

  index: int
  features: np.ndarray | None = None
  samples: np.ndarray | None = None
  failed: str = ''
  sound: float = 0.0
  work: float = 0.0


def decode(
  recognizer: recognizer_lib.Recognizer,
  source: sources.Source,
  indices: Sequence[int],
) -> Iterator[list[transcripts.Entry]]:
  """Decodes utterances of like length together, the longest first.

  Long ones come first so that too little memory shows at once.

  Args:
    recognizer: model and settings.
    source: utterances.
    indices: which of them.

  Yields:
    One batch after the other. An utterance whose sound cannot be used has the
    reason in its entry.
  """
  seconds = [source.utterances[index].duration or 0.0 for index in indices]
  groups = [[indices[i] for i in group] for group in recognizer.plan(seconds)][
    ::-1
  ]
  load = functools.partial(_load, recognizer, source)
  # Reading and features are host work: one thread does them for the next group
  # while the devices decode this one.
  with futures.ThreadPoolExecutor(max_workers=1) as ahead:
    coming = None
    for number, group in enumerate(groups):
      loaded = _load_all(load, group) if coming is None else coming.result()
      if number + 1 < len(groups):
        following = groups[number + 1]
        coming = ahead.submit(_load_all, load, following)
      yield [_failed(source, item) for item in loaded if item.failed]
      usable = [item for item in loaded if item.features is not None]
      yield from _decode_group(recognizer, source, usable)
      for item in loaded:
        if item.samples is not None:
          yield [_decode_long(recognizer, source, item, item.samples)]


def _load_all(
  load: Callable[[int], _Loaded], indices: Sequence[int]
) -> list[_Loaded]:
  return [load(index) for index in indices]


def _decode_group(
  recognizer: recognizer_lib.Recognizer, source: sources.Source, loaded
):
  """Mostly one batch; more if the durations in the list are not true."""
  for batch in recognizer.batches([item.features for item in loaded]):
    # Without compilation, so that the real-time factor does not hang on how
    # many shapes a small corpus has.
    found, seconds = timing.warm(functools.partial(recognizer.search, batch))
    # Evenly: nobody knows what each took, and only the sum is reported.
    share = seconds / len(batch.indices)
    yield [
      transcripts.Entry(
        index=loaded[i].index,
        key=source.utterances[loaded[i].index].key,
        transcript=transcript,
        sound=loaded[i].sound,
        work=loaded[i].work + share,
      )
      for i, transcript in zip(batch.indices, found, strict=True)
    ]


def _decode_long(
  recognizer: recognizer_lib.Recognizer,
  source: sources.Source,
  item: _Loaded,
  samples: np.ndarray,
) -> transcripts.Entry:
  """A recording that is cut into segments; timed once, it takes long enough."""
  (transcript,), seconds = _timed(
    functools.partial(recognizer.transcribe_batch, [samples])
  )
  return transcripts.Entry(
    index=item.index,
    key=source.utterances[item.index].key,
    transcript=transcript,
    sound=item.sound,
    work=seconds,
  )


def _load(
  recognizer: recognizer_lib.Recognizer, source: sources.Source, index: int
) -> _Loaded:
  try:
    samples = source.load(index)
  except audio.AudioError as error:
    return _Loaded(index, failed=f'{error.reason}: {error}')
  sound = _seconds(recognizer, samples)
  if sound > recognizer.config.whole_seconds:
    return _Loaded(index, samples=samples, sound=sound)
  features, seconds = _timed(functools.partial(recognizer.features, samples))
  return _Loaded(index, features, sound=sound, work=seconds)


def _failed(source: sources.Source, item: _Loaded) -> transcripts.Entry:
  key = source.utterances[item.index].key
  return transcripts.Entry(item.index, key, None, failed=item.failed)


def _seconds(
  recognizer: recognizer_lib.Recognizer, samples: np.ndarray
) -> float:
  return len(samples) / recognizer.description.features.sample_rate


def decode_streaming(
  recognizer: recognizer_lib.Recognizer,
  source: sources.Source,
  indices: Sequence[int],
) -> Iterator[list[transcripts.Entry]]:
  """Decodes utterances chunk by chunk through the cached streaming path.

  Those longer than `whole_seconds` are cut into segments on the way.
  """
  for index in indices:
    key = source.utterances[index].key
    try:
      samples = source.load(index)
    except audio.AudioError as error:
      reason = f'{error.reason}: {error}'
      yield [transcripts.Entry(index, key, None, failed=reason)]
      continue
    is_long = _seconds(recognizer, samples) > recognizer.config.whole_seconds
    # `warm` may call twice, which an hour of sound is not worth.
    time_it = _timed if is_long else timing.warm
    result, seconds = time_it(
      functools.partial(_stream, recognizer, samples, endpoints=is_long)
    )
    transcript, chunk_ms = result
    yield [
      transcripts.Entry(
        index,
        key,
        transcript,
        sound=_seconds(recognizer, samples),
        work=seconds,
        chunk_ms=chunk_ms,
      )
    ]


def _stream(
  recognizer: recognizer_lib.Recognizer, samples: np.ndarray, *, endpoints: bool
):
  """Feeds one waveform piece by piece; times the calls that ran a chunk."""
  pool = sessions.Sessions(recognizer, slots=1, endpoints=endpoints)
  stream = pool.open()
  size = int(_PIECE_SECONDS * recognizer.description.features.sample_rate)
  chunk_ms: list[float] = []
  segments: list[transcript_lib.Segment] = []
  for start in range(0, len(samples), size):
    piece = samples[start : start + size]
    part, seconds = _timed(functools.partial(stream.accept, piece))
    segments += part.segments
    # Most pieces only wait for a chunk to be full; they are no measurement.
    if part.num_chunks:
      chunk_ms.append(1000 * seconds / part.num_chunks)
  segments += stream.finish()
  if endpoints:
    return transcript_lib.join(segments), tuple(chunk_ms)
  # Without endpoints the recording is one segment; too short a one is none.
  whole = segments[0].transcript if segments else transcript_lib.empty()
  return whole, tuple(chunk_ms)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
  begun = time.perf_counter()
  result = function()
  return result, time.perf_counter() - begun


def summarise(
  source: sources.Source, entries: Sequence[transcripts.Entry]
) -> Summary:
  """Corpus-level scores; both sides normalised the same way."""
  done = [each for each in entries if each.transcript is not None]
  pairs = [
    (
      scoring.normalise(source.utterances[each.index].txt),
      scoring.normalise(each.transcript.text),
    )
    for each in done
    if each.transcript is not None
  ]
  sound = sum(each.sound for each in done)
  return Summary(
    words=scoring.corpus_errors(pairs),
    characters=scoring.corpus_errors(pairs, unit='character'),
    utterances=len(done),
    # All may have failed; then there is no sound to divide by.
    rtf=sum(each.work for each in done) / max(sound, 1e-9),
    failed=len(entries) - len(done),
    chunk_ms=tuple(ms for each in done for ms in each.chunk_ms),
  )


def run(
  recognizer: recognizer_lib.Recognizer,
  source: sources.Source,
  *,
  streamed: bool = False,
  out: str | os.PathLike[str] | None = None,
  format_name: str = 'jsonl',
  shard: job_shard.Shard | None = None,
  identity: Mapping[str, Any] | None = None,
) -> tuple[Summary, list[Decoded]]:
  """Decodes and scores a source, or one shard of it.

  Args:
    recognizer: model and settings.
    source: utterances.
    streamed: take the cached, chunk-by-chunk path.
    out: file or folder for the transcripts. It is written at the end, in the
      order of the source; what is done lies beside it until then, and a run
      that was stopped goes on.
    format_name: of `out`, one of `transcripts.FORMATS`.
    shard: the part to do; the process that finishes the last one writes `out`.
    identity: what else must be the same for a stopped run to go on.

  Returns:
    The scores and every utterance: of all shards if this process finished
    last, else of its own.

  Raises:
    TranscriptError: if `out` cannot be continued by this run.
  """
  shard = shard or job_shard.Shard()
  transcripts.require_format(format_name, recognizer.config.mode)
  mine = _share(source, shard)
  parts, done = None, []
  if out is not None:
    identity = {**_identity(recognizer, streamed), **(identity or {})}
    parts = transcripts.Parts(out, identity, shard=shard, total=len(source))
    done = parts.read()
  seen = {entry.index for entry in done}
  left = [index for index in mine if index not in seen]
  path = decode_streaming if streamed else decode
  with _progress(len(mine), len(done)) as progress:
    for entries in path(recognizer, source, left):
      # At once, batch by batch: what is on disk need not be done again.
      if parts is not None and entries:
        parts.append(entries)
      done += entries
      progress.update(len(entries))
  entries = sorted(done, key=lambda entry: entry.index)
  if out is not None and parts is not None:
    # None until the last shard is done; whoever finishes it writes for all.
    merged = parts.finish()
    if merged is not None:
      entries = merged
      transcripts.write(out, entries, format_name=format_name)
      parts.remove()
  _tell_failed(entries)
  return summarise(source, entries), _decoded(source, entries)


def _share(source: sources.Source, shard: job_shard.Shard) -> list[int]:
  """The utterances of a shard; all shards get as many of each length."""
  if shard.count == 1:
    return list(range(len(source)))
  key = lambda index: (source.utterances[index].duration or 0.0, index)
  by_length = sorted(range(len(source)), key=key)
  # Dealt out like cards from the shortest to the longest.
  return sorted(by_length[shard.index :: shard.count])


def _identity(
  recognizer: recognizer_lib.Recognizer, streamed: bool
) -> dict[str, Any]:
  settings = config_lib.to_dict(recognizer.config)
  for name in _FREE_SETTINGS:
    settings.pop(name)
  provenance = dict(recognizer.description.provenance)
  # As text: it is only compared.
  return {**settings, 'streaming': streamed, 'model': str(provenance)}


def _progress(total: int, done: int) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=total, initial=done, unit='utt', disable=None, leave=False
  )


def _tell_failed(entries: Sequence[transcripts.Entry]) -> None:
  failed = [entry for entry in entries if entry.transcript is None]
  for entry in failed[:_MOST_NAMED]:
    logging.warning('left out: %s: %s', entry.key, entry.failed)


def _decoded(
  source: sources.Source, entries: Sequence[transcripts.Entry]
) -> list[Decoded]:
  return [
    Decoded(
      source.utterances[each.index],
      each.transcript,
      each.sound,
      each.chunk_ms,
    )
    for each in entries
    if each.transcript is not None
  ]
