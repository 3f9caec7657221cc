"""Looks through a source before anything is trained on it.

Each utterance gets at most one reason not to use it, the first that applies:
what its source says, its sound, the limits of training, and whether it was
there before. Everything else is counted.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
import math
import os
import pathlib
import sys
from typing import Any

import numpy as np
import tqdm

from data_pipelines import manifest
from data_pipelines import plan
from data_pipelines import processes
from data_pipelines import sources
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.text import tokenizer as tokenizer_lib

# -60 dB of full scale: the five lowest bits of 16.
_SILENT_PEAK = 1e-3
_CHUNK = 64  # utterances that go to a process at once
_MOST_EXAMPLES = 3
_BAR_WIDTH = 40
_MOST_CHARACTERS = 120  # of a line that lists characters


class CheckError(ValueError):
  """A check that cannot be made; the message says why."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to look for.

  Attributes:
    config: limits and features of training.
    rate: subsampling rate of the encoder.
    min_input: feature frames the encoder needs for one output frame.
    tokenizer: token table; None takes every character for a token.
    decode: decode all sound; otherwise only headers are read.
  """

  config: config_lib.DataConfig
  rate: int
  min_input: int
  tokenizer: tokenizer_lib.Tokenizer | None = None
  decode: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
  """What was found of one utterance.

  Attributes:
    seconds: duration, NaN if it is not known.
    sample_rate: as recorded, 0 if it is not known.
    channels: as recorded, 0 if it is not known.
    reason: why it cannot be used; None if it can.
    detail: the same in words.
    sound: digest of its samples; empty if they were not decoded.
    unknown: characters that the token table lacks.
  """

  seconds: float = math.nan
  sample_rate: float = 0
  channels: int = 0
  reason: str | None = None
  detail: str = ''
  sound: bytes = b''
  unknown: str = ''


@dataclasses.dataclass
class Report:
  """What was found of a source.

  Attributes:
    utterances: in it.
    usable: those without a reason not to use them.
    seconds: durations of all that have one, in the source's order.
    sample_rates: how many recordings have which.
    channels: the same.
    characters: how often each occurs.
    unknown: characters the token table lacks, and in how many utterances.
    reasons: how many utterances cannot be used, by reason.
    examples: some of them, by reason: key and detail.
    same_sound: utterances with the sound, but not the text, of an earlier one.
    good: numbers of the usable ones.
    durations: seconds of each utterance, NaN if not known.
  """

  utterances: int = 0
  usable: int = 0
  sample_rates: Counter = dataclasses.field(default_factory=Counter)
  channels: Counter = dataclasses.field(default_factory=Counter)
  characters: Counter = dataclasses.field(default_factory=Counter)
  unknown: Counter = dataclasses.field(default_factory=Counter)
  reasons: Counter = dataclasses.field(default_factory=Counter)
  examples: dict[str, list[tuple[str, str]]] = dataclasses.field(
    default_factory=dict
  )
  same_sound: int = 0
  good: list[int] = dataclasses.field(default_factory=list)
  durations: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

  @property
  def hours(self) -> float:
    """Sound in all utterances whose duration is known."""
    return float(np.nansum(self.durations)) / 3600

  def to_json(self) -> dict[str, Any]:
    """Counts, for one line of JSON."""
    known = self.durations[~np.isnan(self.durations)]
    lengths = known if len(known) else np.zeros(1)
    return {
      'utterances': self.utterances,
      'usable': self.usable,
      'hours': round(self.hours, 4),
      'usable_hours': round(float(self.durations[self.good].sum()) / 3600, 4),
      'seconds': {
        'min': round(float(lengths.min()), 3),
        'mean': round(float(lengths.mean()), 3),
        'max': round(float(lengths.max()), 3),
      },
      'sample_rates': {f'{k:g}': n for k, n in self.sample_rates.items()},
      'channels': {str(k): n for k, n in self.channels.items()},
      'characters': len(self.characters),
      'unknown_characters': ''.join(sorted(self.unknown)),
      'same_sound_other_text': self.same_sound,
      'reasons': dict(self.reasons.most_common()),
    }


def check(
  source: sources.Source,
  settings: Settings,
  *,
  num_workers: int | None = None,
) -> Report:
  """Looks through a source.

  Args:
    source: opened tolerantly, so that bad lines are found and not raised.
    settings: what to look for.
    num_workers: processes; None for one a core, 0 for none but this one.

  Returns:
    What was found; the same for any number of processes.
  """
  chunks = [
    range(first, min(first + _CHUNK, len(source)))
    for first in range(0, len(source), _CHUNK)
  ]
  if num_workers is None:
    # A few chunks are done before the processes have started.
    num_workers = processes.num_cores() if len(chunks) > 4 else 0
  with tqdm.tqdm(
    total=len(source),
    unit='utt',
    mininterval=0.5 if sys.stderr.isatty() else 10.0,
    ascii=not sys.stderr.isatty(),
  ) as bar:
    found = processes.run(
      _Look(settings),
      (
        (chunk.start, sources.select(source, chunk.start, chunk.stop))
        for chunk in chunks
      ),
      num_workers=num_workers,
      on_progress=lambda count: bar.update(count - bar.n) and None,
    )
    return _gather(source, chunks, found)


def _gather(
  source: sources.Source,
  chunks: Sequence[range],
  found: Iterable[tuple[int, list[Finding]]],
) -> Report:
  """Adds up findings in the order of the source, as soon as may be."""
  gatherer = _Gatherer(source)
  # Processes finish in any order, but which of two equal utterances is the
  # duplicate must not depend on that.
  early: dict[int, list[Finding]] = {}
  waiting = iter(chunks)
  chunk = next(waiting, None)
  for first, findings in found:
    early[first] = findings
    while chunk is not None and chunk.start in early:
      gatherer.add(chunk, early.pop(chunk.start))
      chunk = next(waiting, None)
  return gatherer.report


@dataclasses.dataclass(frozen=True)
class _Look:
  """Looks at some utterances; travels to the processes that do so."""

  settings: Settings

  def __call__(
    self, item: tuple[int, sources.Source], tick: Callable[[], None]
  ) -> tuple[int, list[Finding]]:
    first, source = item
    findings = []
    for index in range(len(source)):
      tick()
      findings.append(_look(source, index, self.settings))
    return first, findings


def _look(source: sources.Source, index: int, settings: Settings) -> Finding:
  """Looks at one utterance by itself."""
  utterance = source.utterances[index]
  unknown = ''
  if settings.tokenizer is not None:
    unknown = ''.join(settings.tokenizer.unknown_characters(utterance.txt))
  found = Finding(unknown=unknown)
  try:
    # The header first: what is told of a file that cannot be decoded is kept.
    header = source.header(index)
    found = Finding(
      header.seconds, header.sample_rate, header.channels, unknown=unknown
    )
    # (Undecoded sound has no peak; 1 is not silent.)
    sound, peak = _listen(source, index) if settings.decode else (b'', 1.0)
  except audio.AudioError as error:
    return dataclasses.replace(found, reason=error.reason, detail=str(error))
  found = dataclasses.replace(found, sound=sound)
  if peak < _SILENT_PEAK:
    detail = f'the loudest sample is {peak:.2g}'
    return dataclasses.replace(found, reason='silent', detail=detail)
  reason, detail = _limit(utterance, found, settings)
  return dataclasses.replace(found, reason=reason, detail=detail)


def _listen(source: sources.Source, index: int) -> tuple[bytes, float]:
  """Digest and peak of the sound."""
  samples = source.load(index)
  digest = hashlib.blake2b(samples.tobytes(), digest_size=16).digest()
  return digest, float(np.abs(samples).max(initial=0.0))


def _limit(
  utterance: manifest.Utterance, found: Finding, settings: Settings
) -> tuple[str | None, str]:
  """Which limit of training an utterance does not keep."""
  labels = _labels(utterance.txt, settings.tokenizer)
  repeats = sum(a == b for a, b in itertools.pairwise(labels))
  item = plan.Item(
    utterance.key, found.seconds, len(labels), len(labels) + repeats
  )
  reason = plan.rejection(
    item, settings.config, rate=settings.rate, min_input=settings.min_input
  )
  if reason is None and found.unknown and settings.config.skip_unknown:
    return 'unknown_tokens', f'not in the token table: {found.unknown}'
  return reason, f'{found.seconds:.3f} s, {len(labels)} tokens' * bool(reason)


def _labels(
  txt: str, tokenizer: tokenizer_lib.Tokenizer | None
) -> Sequence[int] | str:
  return ' '.join(txt.split()) if tokenizer is None else tokenizer.encode(txt)


class _Gatherer:
  """Adds up findings in the order of the source."""

  def __init__(self, source: sources.Source) -> None:
    self.report = Report(
      utterances=len(source), durations=np.full(len(source), np.nan)
    )
    self._source = source
    self._texts_of: dict[bytes, set[int]] = {}  # of each sound so far

  def add(self, chunk: range, findings: Sequence[Finding]) -> None:
    """Adds the findings of some utterances that follow each other."""
    for index, found in zip(chunk, findings, strict=True):
      self._add(index, self._source.utterances[index], found)

  def _add(
    self, index: int, utterance: manifest.Utterance, found: Finding
  ) -> None:
    report = self.report
    report.durations[index] = found.seconds
    report.characters.update(' '.join(utterance.txt.split()))
    report.unknown.update(found.unknown)
    if found.sample_rate:
      report.sample_rates[found.sample_rate] += 1
      report.channels[found.channels] += 1
    reason, detail = found.reason, found.detail
    if reason is None and self._was_there(utterance, found):
      reason, detail = 'duplicate', 'the same sound and text came before'
    if reason is None:
      report.usable += 1
      report.good.append(index)
      return
    report.reasons[reason] += 1
    examples = report.examples.setdefault(reason, [])
    if len(examples) < _MOST_EXAMPLES:
      examples.append((utterance.key, detail))

  def _was_there(self, utterance: manifest.Utterance, found: Finding) -> bool:
    """Says whether sound and text came before; counts other texts."""
    if not found.sound:
      return False
    texts = self._texts_of.setdefault(found.sound, set())
    # (8 bytes of a text; two of the same sound hardly share them by chance.)
    text = hash(utterance.txt)
    if text in texts:
      return True
    self.report.same_sound += bool(texts)
    texts.add(text)
    return False


def describe(report: Report) -> Iterator[str]:
  """Yields a report as lines of text."""
  yield f'{report.utterances} utterances, {report.hours:.2f} hours'
  yield from _histogram(report.durations[~np.isnan(report.durations)])
  rates = ', '.join(
    f'{n} x {rate:g} Hz' for rate, n in report.sample_rates.most_common()
  )
  channels = ', '.join(
    f'{n} x {count}' for count, n in report.channels.most_common()
  )
  yield f'sample rates: {rates or "none"}; channels: {channels or "none"}'
  characters = ''.join(c for c, _ in report.characters.most_common())
  yield f'{len(characters)} characters: {_shorten(characters)}'
  if report.unknown:
    unknown = ''.join(c for c, _ in report.unknown.most_common())
    yield (
      f'{len(unknown)} characters are not in the token table and become '
      f'<unk>: {_shorten(unknown)}'
    )
  if report.same_sound:
    yield (
      f'{report.same_sound} utterances have the sound of an earlier one, but '
      'another text'
    )
  for reason, count in report.reasons.most_common():
    yield f'{count} {reason}'
    for key, detail in report.examples[reason]:
      yield f'  {key}: {detail}'
  yield f'{report.usable} of {report.utterances} utterances can be used'


def _shorten(characters: str) -> str:
  if len(characters) <= _MOST_CHARACTERS:
    return characters
  return characters[:_MOST_CHARACTERS] + '...'


def _histogram(seconds: np.ndarray) -> Iterator[str]:
  """Durations as bars of text."""
  if not len(seconds):
    return
  counts, edges = np.histogram(seconds, bins=min(12, 1 + len(seconds) // 4))
  for count, low, high in zip(counts, edges, edges[1:], strict=False):
    bar = '#' * round(_BAR_WIDTH * count / counts.max())
    yield f'{low:8.2f} - {high:6.2f} s {count:8d} {bar}'


def write_cleaned(
  path: str | os.PathLike[str], source: sources.Source, report: Report
) -> None:
  """Writes a manifest of what can be used, with durations.

  Args:
    path: where to; paths of audio below its folder are written relative.
    source: what was checked.
    report: of it.

  Raises:
    CheckError: if the sound does not lie in files, or nothing can be used.
  """
  if not report.good:
    raise CheckError(f'{path}: nothing to write, no utterance can be used')
  folder = pathlib.Path(os.path.abspath(path)).parent
  cleaned = (
    _cleaned(source.utterances[index], report.durations[index], folder)
    for index in report.good
  )
  manifest.write(path, cleaned)


def require_files(source: sources.Source) -> None:
  """Refuses a source that no manifest can list.

  Raises:
    CheckError: if the sound does not lie in files.
  """
  first = source.utterances[0]
  if not first.wav and first.problem is None:
    raise CheckError(
      'a manifest lists audio files, and this source has none; make a prepared '
      'data set of it with prepare_corpus, which leaves out what is bad'
    )


def _cleaned(
  utterance: manifest.Utterance, seconds: float, folder: pathlib.Path
) -> manifest.Utterance:
  wav = pathlib.Path(utterance.wav)
  if wav.is_relative_to(folder):
    wav = wav.relative_to(folder)
  extra = {**utterance.extra, 'duration': round(float(seconds), 6)}
  return dataclasses.replace(utterance, wav=wav.as_posix(), extra=extra)
