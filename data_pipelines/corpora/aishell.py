"""AISHELL-1 as it is unpacked.

`aishell:DIR:SPLIT`, where DIR is `data_aishell` or the folder that holds it:
wav/{train,dev,test}/SPEAKER/*.wav and transcript/aishell_transcript_v0.8.txt.
The spaces between words are taken out, as in the published recipes.
"""

from collections.abc import Iterator
import pathlib

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines.corpora import keyed_lines

_SPLITS = ('train', 'dev', 'test')
_TOP = 'data_aishell'
_TRANSCRIPTS = 'transcript/aishell_transcript_v0.8.txt'


def find_splits(path: str) -> list[str]:
  """Lists which of train, dev and test are there."""
  wav = _root(path) / 'wav'
  found = [split for split in _SPLITS if (wav / split).is_dir()]
  return found or ['train']


def open_corpus(
  path: str, *, split: str, sample_rate: int, tolerant: bool
) -> sources.Source:
  """Opens a split."""
  del tolerant
  root = _root(path)
  table = manifest.table(_utterances(root, split))
  if not len(table):
    packed = any((root / 'wav').glob('*.tar.gz'))
    advice = '; unpack the archives in wav/' if packed else ''
    raise sources.SourceError(f'{root}: no wav/{split}/SPEAKER/*.wav{advice}')
  return sources.FileSource(table, sample_rate=sample_rate)


def _root(path: str) -> pathlib.Path:
  root = pathlib.Path(path).absolute()
  return root / _TOP if (root / _TOP).is_dir() else root


def _utterances(root: pathlib.Path, split: str) -> Iterator[manifest.Utterance]:
  """The recordings of a split; the transcripts are those of all splits."""
  texts = keyed_lines.read_unique(root / _TRANSCRIPTS)
  for wav in sorted((root / 'wav' / split).glob('*/*.wav')):
    extra = {'speaker': wav.parent.name}
    line = texts.get(wav.stem)
    if line is None:
      problem = keyed_lines.no_text(wav.stem, root / _TRANSCRIPTS)
      yield manifest.Utterance(wav.stem, str(wav), '', extra, problem)
    else:
      txt = ''.join(line.rest.split())
      yield keyed_lines.transcribed(line, str(wav), txt, extra)
