"""LibriSpeech folders, and others of the same form.

`librispeech:DIR:SUBSET`, with SUBSET/SPEAKER/CHAPTER/*.flac beside a
*.trans.txt of `KEY TEXT` lines. Without SUBSET the splits are all subsets
whose names begin with train, dev or test; `+` joins some of them
(`train-clean-100+train-clean-360`). DIR may also be a subset itself.
"""

from collections.abc import Iterator
import os
import pathlib

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines.corpora import keyed_lines

_ENDINGS = ('.flac', '.wav', '.mp3', '.ogg', '.opus')
_TRANSCRIPT = '.trans.txt'


def find_splits(path: str) -> list[str]:
  """Lists which of train, dev and test have a subset."""
  names = _folders(pathlib.Path(path))
  found = [
    split
    for split in ('train', 'dev', 'test')
    if any(name.startswith(split) for name in names)
  ]
  return found or ['train']


def open_corpus(
  path: str, *, split: str, sample_rate: int, tolerant: bool
) -> sources.Source:
  """Opens one or several subsets."""
  del tolerant
  subsets = _subsets(pathlib.Path(path), split)
  utterances = (
    utterance
    for subset in subsets
    for speaker in _folders(subset)
    for chapter in _folders(subset / speaker)
    for utterance in _chapter(subset / speaker / chapter, speaker)
  )
  table = manifest.table(utterances)
  if not len(table):
    raise sources.SourceError(
      f'{path}: no *{_TRANSCRIPT} in SPEAKER/CHAPTER folders of '
      f'{", ".join(subset.name for subset in subsets)}'
    )
  return sources.FileSource(table, sample_rate=sample_rate)


def _subsets(root: pathlib.Path, split: str) -> list[pathlib.Path]:
  """The folders a split stands for."""
  if not root.is_dir():
    raise sources.SourceError(f'{root}: no such folder')
  names = _folders(root)
  wanted = split.split('+')
  if all(name in names for name in wanted):
    return [root / name for name in wanted]
  found = [name for name in names if name.startswith(split)]
  if found:
    return [root / name for name in found]
  if any(root.glob(f'*/*/*{_TRANSCRIPT}')):
    return [root]  # a subset itself
  raise sources.SourceError(
    f'{root}: no subset {split!r}; there is {", ".join(names) or "no folder"}'
  )


def _folders(folder: pathlib.Path) -> list[str]:
  if not folder.is_dir():
    return []
  with os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if entry.is_dir())


def _chapter(
  folder: pathlib.Path, speaker: str
) -> Iterator[manifest.Utterance]:
  """The utterances of a folder, in the order of its transcripts."""
  names = sorted(os.listdir(folder))
  sounds = {
    name[: -len(ending)]: str(folder.absolute() / name)
    for name in names
    for ending in _ENDINGS
    if name.lower().endswith(ending)
  }
  extra = {'speaker': speaker}
  for name in names:
    if not name.endswith(_TRANSCRIPT):
      continue
    for line in keyed_lines.read(folder / name):
      wav = sounds.pop(line.key, None)
      if wav is None:
        problem = keyed_lines.no_audio(line.key, line.where)
        yield manifest.Utterance(line.key, '', line.rest, extra, problem)
      else:
        yield keyed_lines.transcribed(line, wav, line.rest, extra)
  # What no transcript has taken.
  for key, wav in sounds.items():
    problem = keyed_lines.no_text(key, folder)
    yield manifest.Utterance(key, wav, '', extra, problem)
