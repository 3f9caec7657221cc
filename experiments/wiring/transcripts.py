"""Transcripts on their way to disk: as they come, and in the end in order.

While a run goes on, its results lie in `OUT.parts`:

  config.json          what is decoded, and how
  shard-I-of-N.jsonl   one line per utterance that is done, in any order
  shard-I-of-N.done    the shard is complete

A run that was stopped goes on behind the last whole line. Whoever finishes the
last shard puts all of them together into OUT, in the order of the input.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any
import urllib.parse

import numpy as np

from data_pipelines import job_shard
from u2moe_jax.decoding import transcript as transcript_lib
from u2moe_jax.text import captions
from u2moe_jax.text import words as words_lib

FORMATS = ('jsonl', 'txt', 'srt', 'vtt', 'ctm')
# Formats that are one file per recording: OUT is a folder then.
FOLDER_FORMATS = ('srt', 'vtt')
_TIMED_FORMATS = ('srt', 'vtt', 'ctm')


class TranscriptError(ValueError):
  """Output that cannot be written or continued; says what to do."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """One utterance that is done.

  Attributes:
    index: its place in the input.
    key: its key.
    transcript: None if its sound could not be used.
    failed: the reason then.
    sound: its seconds.
    work: seconds it took, compilation apart.
    chunk_ms: milliseconds of each chunk, when streamed.
  """

  index: int
  key: str
  transcript: transcript_lib.Transcript | None
  failed: str = ''
  sound: float = 0.0
  work: float = 0.0
  chunk_ms: tuple[float, ...] = ()


def require_format(name: str, mode: str) -> None:
  """Refuses formats that need times where a mode knows none.

  Raises:
    TranscriptError: says which format or mode would do.
  """
  if name in _TIMED_FORMATS and mode == 'attention':
    raise TranscriptError(
      f'--format={name} needs times, which mode=attention does not know; use '
      'attention_rescoring or ctc_prefix_beam_search, or --format=jsonl'
    )


class Parts:
  """The folder in which a run gathers its results."""

  def __init__(
    self,
    out: str | os.PathLike[str],
    identity: Mapping[str, Any],
    *,
    shard: job_shard.Shard,
    total: int,
  ):
    """Opens or makes the folder.

    Args:
      out: the file or folder the run is to end in.
      identity: what makes results differ; JSON values.
      shard: the part this process does.
      total: utterances of all shards.

    Raises:
      TranscriptError: if the folder belongs to another run.
    """
    self._out = pathlib.Path(out)
    self._shard, self._total = shard, total
    self.folder = self._out.with_name(self._out.name + '.parts')
    self._merging = self._out.with_name(self._out.name + '.merging')
    if self._merging.is_dir() and not self.folder.exists():
      self._merging.rename(self.folder)  # a merge that was cut short
    self.folder.mkdir(parents=True, exist_ok=True)
    self._claim({**identity, 'shards': shard.count, 'utterances': total})
    self._file = self.folder / f'shard-{shard.stem}.jsonl'

  def _claim(self, identity: Mapping[str, Any]) -> None:
    file = self.folder / 'config.json'
    mine = json.loads(json.dumps(identity))  # as it will read
    if not file.exists():
      # A name for each shard, since several may begin at once. The last to
      # rename wins, and all compare with what stands there.
      unfinished = file.with_name(f'config-{self._shard.stem}.unfinished')
      unfinished.write_text(json.dumps(mine, indent=1), encoding='utf-8')
      os.replace(unfinished, file)
    theirs = json.loads(file.read_text(encoding='utf-8'))
    # Of both: another version may have written other keys.
    for key in [*mine, *theirs]:
      if mine.get(key) != theirs.get(key):
        raise TranscriptError(
          f'{self.folder} was begun with {key}={theirs.get(key)}, and this is '
          f'{key}={mine.get(key)}; run it as before, delete that folder, or '
          'choose another --out'
        )

  def read(self) -> list[Entry]:
    """What this shard has done; cuts off a line that was not finished."""
    if not self._file.exists():
      return []
    # A process that was killed leaves its last line without an end.
    data = self._file.read_bytes()
    whole = data.rfind(b'\n') + 1
    if whole < len(data):
      with self._file.open('r+b') as file:
        file.truncate(whole)
    return _entries(self._file)

  def append(self, entries: Sequence[Entry]) -> None:
    """Adds utterances that are done."""
    lines = ''.join(_to_line(entry) + '\n' for entry in entries)
    with self._file.open('a', encoding='utf-8') as file:
      file.write(lines)

  def finish(self) -> list[Entry] | None:
    """Marks the shard as complete, and takes all if it was the last.

    Returns:
      The entries of all shards in the order of the input; None if others are
      not done, or one of them has taken all.

    Raises:
      TranscriptError: if an utterance is missing.
    """
    # Before the look at the others: so of two that finish together at least one
    # sees both.
    (self.folder / f'shard-{self._shard.stem}.done').touch()
    shards = [
      job_shard.Shard(i, self._shard.count) for i in range(self._shard.count)
    ]
    try:
      if not all(
        (self.folder / f'shard-{s.stem}.done').exists() for s in shards
      ):
        return None
      # Of two that finish together, one gets to rename it.
      self.folder.rename(self._merging)
    except FileNotFoundError:
      return None
    found: dict[int, Entry] = {}
    for shard in shards:
      # A shard without utterances has no file.
      file = self._merging / f'shard-{shard.stem}.jsonl'
      found |= {e.index: e for e in (_entries(file) if file.exists() else [])}
    missing = self._total - len(found)
    if missing:
      raise TranscriptError(
        f'{self._merging}: {missing} of {self._total} utterances are missing; '
        'were the shards given different data? delete that folder and decode '
        'again'
      )
    return [found[index] for index in sorted(found)]

  def remove(self) -> None:
    """Deletes the folder, once all is written where it belongs."""
    shutil.rmtree(self._merging, ignore_errors=True)


def _entries(file: pathlib.Path) -> list[Entry]:
  lines = file.read_bytes().split(b'\n')
  return [_from_line(line) for line in lines if line.strip()]


def _to_line(entry: Entry) -> str:
  fields = {
    field.name: getattr(entry, field.name)
    for field in dataclasses.fields(entry)
    if field.name != 'transcript'
  }
  if entry.transcript is not None:
    fields['record'] = to_record(entry.key, entry.transcript)
  return json.dumps(fields, ensure_ascii=False)


def _from_line(line: bytes) -> Entry:
  fields = json.loads(line)
  record = fields.pop('record', None)
  transcript = None if record is None else from_record(record)
  fields['chunk_ms'] = tuple(fields['chunk_ms'])
  return Entry(**fields, transcript=transcript)


def to_record(
  key: str, transcript: transcript_lib.Transcript
) -> dict[str, Any]:
  """A transcript as JSON values, from which `from_record` makes it again."""
  record: dict[str, Any] = {
    'key': key,
    'text': transcript.text,
    'tokens': list(transcript.tokens),
    'score': _number(transcript.score),
    'times': list(transcript.times),
    'margin': _number(transcript.margin),
  }
  if transcript.confidence is not None:
    record['confidence'] = _number(transcript.confidence)
    record['token_confidence'] = list(map(_number, transcript.token_confidence))
  if transcript.words:
    record['words'] = [to_word(word) for word in transcript.words]
  if transcript.segments:
    record['segments'] = [
      {
        'start': round(span.start, 3),
        'end': round(span.end, 3),
        'text': span.text,
      }
      for span in transcript.segments
    ]
  # A list of one is the text itself; `from_record` makes it again.
  if len(transcript.nbest) > 1:
    record['nbest'] = [
      {'text': a.text, 'tokens': list(a.tokens), 'score': _number(a.score)}
      for a in transcript.nbest
    ]
  return record


def to_word(word: words_lib.TimedWord) -> dict[str, Any]:
  """A word with its times as JSON values."""
  record = {
    'word': word.text,
    'start': round(word.start, 3),
    'end': round(word.end, 3),
  }
  if word.confidence is not None:
    record['confidence'] = _number(word.confidence)
  return record


def from_record(record: Mapping[str, Any]) -> transcript_lib.Transcript:
  """Reads what `to_record` made."""
  best = {name: record[name] for name in ('text', 'tokens', 'score')}
  return transcript_lib.Transcript(
    text=record['text'],
    tokens=tuple(record['tokens']),
    score=_value(record['score'], -np.inf),
    times=tuple(record['times']),
    confidence=record.get('confidence'),
    margin=_value(record['margin'], np.inf),
    nbest=tuple(
      transcript_lib.Alternative(
        each['text'], tuple(each['tokens']), _value(each['score'], -np.inf)
      )
      for each in record.get('nbest', [best])
    ),
    token_confidence=tuple(record.get('token_confidence', ())),
    words=tuple(
      words_lib.TimedWord(
        each['word'], each['start'], each['end'], each.get('confidence')
      )
      for each in record.get('words', ())
    ),
    segments=tuple(
      transcript_lib.Span(each['start'], each['end'], each['text'])
      for each in record.get('segments', ())
    ),
  )


def _number(value: float) -> float | None:
  """Seven digits, as float32 has; JSON knows no infinity."""
  return float(f'{value:.7g}') if np.isfinite(value) else None


def _value(value: float | None, otherwise: float) -> float:
  return otherwise if value is None else value


def write(
  out: str | os.PathLike[str],
  entries: Sequence[Entry],
  *,
  format_name: str = 'jsonl',
) -> None:
  """Writes transcripts; those that failed are left out.

  Args:
    out: the file, or the folder for a format of `FOLDER_FORMATS`.
    entries: in the order in which they shall stand.
    format_name: one of `FORMATS`.
  """
  out = pathlib.Path(out)
  if format_name not in FOLDER_FORMATS:
    _write_text(out, ''.join(f'{x}\n' for x in _lines(entries, format_name)))
    return
  render = captions.srt if format_name == 'srt' else captions.vtt
  out.mkdir(parents=True, exist_ok=True)
  for entry in entries:
    if entry.transcript is not None:
      shown = captions.captions(entry.transcript.words)
      # A key may hold what no file name may.
      name = urllib.parse.quote(entry.key, safe=' ')
      _write_text(out / f'{name}.{format_name}', render(shown))


def _lines(entries: Sequence[Entry], format_name: str) -> Iterator[str]:
  for entry in entries:
    transcript = entry.transcript
    if transcript is None:
      continue
    if format_name == 'ctm':
      yield from captions.ctm(entry.key, transcript.words)
    elif format_name == 'txt':
      yield f'{entry.key} {transcript.text}'.rstrip()
    else:
      record = to_record(entry.key, transcript)
      yield json.dumps(record, ensure_ascii=False)


def _write_text(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + '.unfinished')
  unfinished.write_text(text, encoding='utf-8')
  os.replace(unfinished, path)
