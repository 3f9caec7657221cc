"""Kaldi data directories: wav.scp, text, and segments, utt2spk, utt2dur.

`kaldi:DIR`, where DIR holds these files or has a folder of each split. A path
in wav.scp may be relative to DIR or to the working directory, and may be a
WAV file inside an archive, `FILE.ark:OFFSET`. Commands (`... |`) are refused:
they would run for every utterance in every epoch.
"""

from collections.abc import Iterator
import math
import os
import pathlib
import re
from typing import Any

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines.corpora import keyed_lines

_LIST, _SEGMENTS, _TEXT = 'wav.scp', 'segments', 'text'
_IN_ARCHIVE = re.compile(r'(.+):([0-9]+)')
_RIFF_HEADER = 8  # bytes: the mark, and the size of all that follows


def find_splits(path: str) -> list[str]:
  """Lists the folders that are data directories; `train` for DIR itself."""
  folder = pathlib.Path(path)
  if (folder / _LIST).is_file():
    return ['train']
  found = sorted(file.parent.name for file in folder.glob(f'*/{_LIST}'))
  return sorted(found, key=lambda name: name != 'train') or ['train']


def open_corpus(
  path: str, *, split: str, sample_rate: int, tolerant: bool
) -> sources.Source:
  """Opens a data directory."""
  del tolerant  # lists with a malformed line are not Kaldi's any more
  folder = pathlib.Path(path)
  if (folder / split / _LIST).is_file():
    folder = folder / split
  if not (folder / _LIST).is_file():
    raise sources.SourceError(
      f'{folder}: not a Kaldi data directory; there is no {_LIST}, neither '
      f'here nor in {split}/'
    )
  table = manifest.table(_utterances(folder))
  return sources.FileSource(table, sample_rate=sample_rate)


def _utterances(folder: pathlib.Path) -> Iterator[manifest.Utterance]:
  texts = keyed_lines.read_unique(folder / _TEXT)
  speakers = _optional(folder / 'utt2spk')
  durations = _optional(folder / 'utt2dur')
  for key, wav, extra, problem in _sounds(folder):
    # What is left in the end has no sound.
    line = texts.pop(key, None)
    if key in speakers:
      extra['speaker'] = speakers[key].rest
    if key in durations:
      extra['duration'] = _number(durations[key], durations[key].rest)
    if line is None:
      problem = problem or keyed_lines.no_text(key, folder / _TEXT)
      yield manifest.Utterance(key, wav, '', extra, problem)
    elif problem is not None:
      yield manifest.Utterance(key, wav, line.rest, extra, problem)
    else:
      yield keyed_lines.transcribed(line, wav, line.rest, extra)
  for key, line in texts.items():
    problem = keyed_lines.no_audio(key, line.where)
    yield manifest.Utterance(key, '', line.rest, {}, problem)


_Sound = tuple[str, str, dict[str, Any], manifest.Problem | None]


def _sounds(folder: pathlib.Path) -> Iterator[_Sound]:
  """Key, file, what part of it, and the problem if there is one."""
  recordings = {
    key: _recording(line, folder)
    for key, line in keyed_lines.read_unique(folder / _LIST).items()
  }
  if not (folder / _SEGMENTS).is_file():
    for key, (wav, extra) in recordings.items():
      yield key, wav, dict(extra), None
    return
  for key, line in keyed_lines.read_unique(folder / _SEGMENTS).items():
    recording, times, problem = _segment(line)
    if recording not in recordings:
      yield key, '', {}, _bad_segment(line, f'{recording!r} is not in {_LIST}')
    else:
      wav, extra = recordings[recording]
      yield key, wav, {**extra, **times}, problem


def _recording(
  line: keyed_lines.KeyedLine, folder: pathlib.Path
) -> tuple[str, dict[str, Any]]:
  """File of a line of wav.scp, and where in it the sound is."""
  if not line.rest:
    raise sources.SourceError(f'{line.where}: {line.key!r} has no path')
  if line.rest.endswith('|'):
    raise sources.SourceError(
      f'{line.where}: a command ({line.rest[:60]!r}) instead of a file; write '
      'its output to files once, for example with wav-copy scp:wav.scp '
      'ark,scp:wav.ark,new.scp, and put new.scp in its place'
    )
  match = _IN_ARCHIVE.fullmatch(line.rest)
  # A name may really have a colon and digits in it.
  if match is None or os.path.exists(line.rest):
    return sources.resolve(line.rest, folder), {}
  return _in_archive(match, line, folder)


def _in_archive(
  match: re.Match[str], line: keyed_lines.KeyedLine, folder: pathlib.Path
) -> tuple[str, dict[str, Any]]:
  path, offset = sources.resolve(match[1], folder), int(match[2])
  try:
    with open(path, 'rb') as file:
      file.seek(offset)
      header = file.read(_RIFF_HEADER)
  except OSError:
    return path, {'offset': offset}  # loading it will say what is wrong
  if header[:4] != b'RIFF':
    raise sources.SourceError(
      f'{line.where}: there is no WAV file at byte {offset} of {path}; write '
      'the archive with wav-copy, without compression'
    )
  # An archive does not say where a file in it ends; the file itself does.
  size = int.from_bytes(header[4:], 'little') + _RIFF_HEADER
  return path, {'offset': offset, 'size': size}


def _segment(
  line: keyed_lines.KeyedLine,
) -> tuple[str, dict[str, float], manifest.Problem | None]:
  """Recording, times and problem of a line of segments."""
  words = line.rest.split()
  # Some have a channel behind the times; only the first one is read.
  if len(words) != 3 and (len(words) != 4 or words[3] not in ('0', '-1')):
    raise sources.SourceError(
      f'{line.where}: a segment is KEY RECORDING START END, of channel 0, not '
      f'{line.key} {line.rest}'
    )
  start, end = _number(line, words[1]), _number(line, words[2])
  times = {'start': start, 'end': end}
  if end == -1:  # Kaldi's way to say: to the end of the recording
    del times['end']
  elif not 0 <= start < end:
    problem = _bad_segment(line, f'it starts at {start} s and ends at {end} s')
    return words[0], times, problem
  return words[0], times, None


def _bad_segment(line: keyed_lines.KeyedLine, detail: str) -> manifest.Problem:
  return manifest.Problem(
    'bad_segment', f'{line.where}: the segment {line.key!r}: {detail}'
  )


def _number(line: keyed_lines.KeyedLine, word: str) -> float:
  try:
    number = float(word)
  except ValueError:
    number = math.nan
  if not math.isfinite(number):
    raise sources.SourceError(
      f'{line.where}: {word!r} is not a number of seconds'
    )
  return number


def _optional(path: pathlib.Path) -> dict[str, keyed_lines.KeyedLine]:
  return keyed_lines.read_unique(path) if path.is_file() else {}
