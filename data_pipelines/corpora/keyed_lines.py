"""Files of `KEY REST` lines, as Kaldi, LibriSpeech and AISHELL have them."""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import pathlib

from data_pipelines import manifest
from data_pipelines import sources


@dataclasses.dataclass(frozen=True, slots=True)
class KeyedLine:
  """One line.

  Attributes:
    path: the file.
    number: of the line, from 1.
    key: its first word.
    rest: what follows, without blanks around it.
    problem: set if it is not UTF-8; bad bytes are replaced then.
  """

  path: pathlib.Path
  number: int
  key: str
  rest: str
  problem: manifest.Problem | None = None

  @property
  def where(self) -> str:
    """File and line, for messages."""
    return f'{self.path}:{self.number}'


def read(path: pathlib.Path) -> Iterator[KeyedLine]:
  """Reads the lines that are not blank.

  Args:
    path: the file.

  Raises:
    SourceError: if there is no such file.
  """
  if not path.is_file():
    raise sources.SourceError(f'{path}: no such file')
  # As bytes: other line separators may stand inside a transcript.
  for number, data in enumerate(path.read_bytes().split(b'\n'), start=1):
    problem = None
    try:
      line = data.decode('utf-8-sig' if number == 1 else 'utf-8')
    except UnicodeDecodeError as error:
      line = data.decode('utf-8', errors='replace')
      problem = manifest.Problem(
        'bad_encoding',
        f'{path}:{number}: not UTF-8 (byte {error.start + 1} of the line); convert '
        'the file to UTF-8',
      )
    words = line.split(maxsplit=1)
    if words:
      rest = words[1].strip() if len(words) > 1 else ''
      yield KeyedLine(path, number, words[0], rest, problem)


def read_unique(path: pathlib.Path) -> dict[str, KeyedLine]:
  """Reads the lines by their keys.

  Raises:
    SourceError: if there is no such file, or a key stands there twice.
  """
  lines: dict[str, KeyedLine] = {}
  for line in read(path):
    if line.key in lines:
      raise sources.SourceError(
        f'{line.where}: {line.key!r} already stands in '
        f'{lines[line.key].where}; keys must be unique'
      )
    lines[line.key] = line
  return lines


def transcribed(
  line: KeyedLine, wav: str, txt: str, extra: Mapping[str, object]
) -> manifest.Utterance:
  """An utterance with the transcript of a line."""
  problem = line.problem
  if problem is None and not txt:
    problem = no_text(line.key, line.where)
  return manifest.Utterance(line.key, wav, txt, extra, problem)


def no_text(key: str, where: object) -> manifest.Problem:
  """The problem of sound without a transcript."""
  return manifest.Problem(
    'no_text', f'{where}: {key!r} has no transcript; add it, or leave it out'
  )


def no_audio(key: str, where: object) -> manifest.Problem:
  """The problem of a transcript without sound."""
  return manifest.Problem(
    'no_audio', f'{where}: {key!r} has no sound; add it, or leave it out'
  )
