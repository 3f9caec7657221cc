"""Sources of utterances with random access, whatever form the data has.

A source is named by a text, `KIND:PATH` or `KIND:PATH:SPLIT`. Each kind is a
file of `data_pipelines/corpora`, named as the kind, with a function

  open_corpus(path, *, split, sample_rate, tolerant) -> Source

and, where one path holds several splits, `find_splits(path) -> list[str]`.
Whoever adds such a file has added a kind. Without a kind, a file is a
manifest, a folder with `wav.scp` and `text` is a Kaldi data directory, and
any other folder a prepared data set. Commas join several sources.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import re
import sys
import types
from typing import Protocol

from jaxtyping import Float
import numpy as np
import tqdm

from data_pipelines import corpora
from data_pipelines import manifest
from u2moe_jax.frontend import audio

# Reading a header is waiting for the disk, or for the network.
_HEADER_THREADS = 16
_KIND = re.compile('[a-z][a-z0-9_]*')
_MANY = 5000  # files; to open so many takes long enough to show progress


class SourceError(ValueError):
  """A source that cannot be opened; the message says what was looked for."""


class Source(Protocol):
  """Utterances in a fixed order, and their audio by number.

  Attributes:
    utterances: all of them. `wav` may be empty; `duration` is None only where
      `load` would raise, or nobody has measured it yet.
  """

  utterances: Sequence[manifest.Utterance]

  def __len__(self) -> int:
    """Number of utterances."""

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """Returns the mono float32 samples of utterance `index`.

    Raises AudioError, which has a `reason`, for what cannot be used.
    """

  def header(self, index: int) -> audio.Header:
    """Returns length, rate and channels as recorded; AudioError as `load`."""


class FileSource:
  """Utterances whose sound lies in files, or in parts of files."""

  def __init__(
    self, utterances: Sequence[manifest.Utterance], *, sample_rate: int = 16000
  ):
    """Remembers where the sound is; opens nothing.

    Args:
      utterances: with `wav`, and with `problem` where they cannot be used.
      sample_rate: Hz of what `load` gives.
    """
    self.utterances = utterances
    self._sample_rate = sample_rate

  def __len__(self) -> int:
    return len(self.utterances)

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """See `Source`."""
    utterance = require_usable(self.utterances[index])
    return audio.load_audio(
      utterance.wav, sample_rate=self._sample_rate, part=utterance.part
    )

  def header(self, index: int) -> audio.Header:
    """See `Source`."""
    utterance = require_usable(self.utterances[index])
    return audio.read_header(utterance.wav, part=utterance.part)

  def select(self, first: int, last: int) -> 'FileSource':
    """Utterances `first` to `last - 1`."""
    chosen = select_utterances(self.utterances, first, last)
    return FileSource(chosen, sample_rate=self._sample_rate)


def select_utterances(
  utterances: Sequence[manifest.Utterance], first: int, last: int
) -> Sequence[manifest.Utterance]:
  """Some utterances that follow each other, as a table if they were one."""
  if isinstance(utterances, manifest.Table):
    return utterances.select(first, last)
  return utterances[first:last]


def select(source: Source, first: int, last: int) -> Source:
  """Utterances `first` to `last - 1` of a source.

  What travels to another process should be no more than it needs: a source
  that can do without the rest has a method `select`.
  """
  own = getattr(source, 'select', None)
  return own(first, last) if own else _Selected(source, first, last)


class _Selected:
  """Some utterances of a source that follow each other."""

  def __init__(self, source: Source, first: int, last: int):
    self._source, self._first = source, first
    self.utterances: Sequence[manifest.Utterance] = manifest.OnDemand(
      last - first, self._utterance
    )

  def _utterance(self, index: int) -> manifest.Utterance:
    return self._source.utterances[self._first + index]

  def __len__(self) -> int:
    return len(self.utterances)

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    return self._source.load(self._first + index)

  def header(self, index: int) -> audio.Header:
    return self._source.header(self._first + index)


def require_usable(utterance: manifest.Utterance) -> manifest.Utterance:
  """Returns an utterance, or raises its problem as AudioError."""
  if utterance.problem is not None:
    raise audio.AudioError(utterance.problem.reason, utterance.problem.detail)
  return utterance


class JoinedSource:
  """Several sources, one behind the other."""

  def __init__(self, parts: Sequence[Source]):
    """Joins; SourceError if two parts have a key in common."""
    self._parts = list(parts)
    self._ends = np.cumsum([len(part) for part in parts])
    self.utterances: Sequence[manifest.Utterance] = _Joined(
      self._parts, self._ends
    )
    # Hashes: a set of the keys would take more than ten times the memory.
    hashes = np.fromiter(
      (hash(item.key) for item in self.utterances), np.int64, len(self)
    )
    repeats = manifest.repeated(hashes, lambda i: self.utterances[i].key)
    for index in repeats:
      raise SourceError(
        f'the key {self.utterances[index].key!r} occurs in two of the joined '
        'sources; keys must be unique'
      )

  def __len__(self) -> int:
    return len(self.utterances)

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """See `Source`."""
    part, own = _locate(self._parts, self._ends, index)
    return part.load(own)

  def header(self, index: int) -> audio.Header:
    """See `Source`."""
    part, own = _locate(self._parts, self._ends, index)
    return part.header(own)

  def select(self, first: int, last: int) -> Source:
    """Utterances `first` to `last - 1`."""
    chosen: list[Source] = []
    for part, end in zip(self._parts, self._ends.tolist(), strict=True):
      begin = end - len(part)
      if first < end and begin < last:
        low, high = max(first - begin, 0), min(last - begin, len(part))
        chosen.append(select(part, low, high))
    return chosen[0] if len(chosen) == 1 else JoinedSource(chosen)


class _Joined(manifest.OnDemand):
  """The utterances of several sources."""

  def __init__(self, parts: Sequence[Source], ends: np.ndarray):
    super().__init__(int(ends[-1]), self._utterance)
    self._parts, self._ends = parts, ends

  def _utterance(self, index: int) -> manifest.Utterance:
    part, own = _locate(self._parts, self._ends, index)
    return part.utterances[own]

  def __iter__(self) -> Iterator[manifest.Utterance]:
    # In turn, without looking for the part of each number.
    for part in self._parts:
      yield from part.utterances

  def fingerprint(self) -> str:
    return '+'.join(fingerprint(part) for part in self._parts)


def fingerprint(source: Source) -> str:
  """A name for the list of utterances of a source, as far as it has one."""
  found = getattr(source.utterances, 'fingerprint', None)
  return found() if found is not None else str(len(source))


def _locate(
  parts: Sequence[Source], ends: np.ndarray, index: int
) -> tuple[Source, int]:
  """The part an utterance is in, and its number there."""
  if not 0 <= index < ends[-1]:
    raise IndexError(f'{index} is not in [0, {ends[-1]})')
  # `right`: the end of a part is the first number of the next.
  number = int(np.searchsorted(ends, index, side='right'))
  part = parts[number]
  return part, index - int(ends[number]) + len(part)


@dataclasses.dataclass(frozen=True)
class Spec:
  """The name of one source, taken apart.

  Attributes:
    kind: a file of `data_pipelines/corpora`.
    path: what that kind makes of it.
    split: None if the name has none.
  """

  kind: str
  path: str
  split: str | None = None

  def __str__(self) -> str:
    parts = (self.kind, self.path, self.split)
    return ':'.join(part for part in parts if part)


def parse(spec: str) -> list[Spec]:
  """Takes the name of a source apart.

  Args:
    spec: see the module's docstring.

  Returns:
    One entry for each of the sources that commas join.

  Raises:
    SourceError: if no source is named, or there is no such path or kind.
  """
  names = [name.strip() for name in spec.split(',') if name.strip()]
  if not names:
    raise SourceError(
      'no data is named; give a manifest, the folder of a prepared data set, '
      'or KIND:PATH'
    )
  return [_parse_one(name) for name in names]


def _parse_one(name: str) -> Spec:
  # The whole name comes first: a path may have a colon in it.
  if pathlib.Path(name).exists():
    return Spec(_kind_of(name), name)
  kind, colon, rest = name.partition(':')
  if _module(kind) is not None:
    return Spec(kind, *_cut_split(rest))
  path, split = _cut_split(name)
  if split is not None:
    return Spec(_kind_of(path), path, split)
  if colon and _KIND.fullmatch(kind):
    raise SourceError(
      f'{name}: no such path, and {kind!r} is no kind of source; there is '
      f'{", ".join(kinds())}'
    )
  path, colon, split = name.rpartition(':')
  looked_for = f'{path} (for the split {split!r})' if colon else name
  raise SourceError(
    f'{looked_for}: no such manifest (a file) or prepared data set (a folder)'
  )


def _cut_split(name: str) -> tuple[str, str | None]:
  """Cuts `PATH:SPLIT` where PATH is there; the rest is up to the kind."""
  path, colon, split = name.rpartition(':')
  if colon and not pathlib.Path(name).exists() and pathlib.Path(path).exists():
    return path, split
  return name, None


def _kind_of(path: str) -> str:
  folder = pathlib.Path(path)
  if not folder.is_dir():
    return 'manifest'
  is_kaldi = (folder / 'wav.scp').is_file() and (folder / 'text').is_file()
  return 'kaldi' if is_kaldi else 'prepared'


def kinds() -> list[str]:
  """Returns the kinds of sources there are."""
  names = [info.name for info in pkgutil.iter_modules(corpora.__path__)]
  return [name for name in names if _module(name) is not None]


def _module(kind: str) -> types.ModuleType | None:
  """The file of a kind, or None if there is no such kind."""
  if not _KIND.fullmatch(kind):
    return None
  name = f'{corpora.__name__}.{kind}'
  if importlib.util.find_spec(name) is None:
    return None
  module = importlib.import_module(name)
  return module if hasattr(module, 'open_corpus') else None


def find_splits(spec: str) -> list[str]:
  """Lists the splits a name stands for.

  Args:
    spec: see the module's docstring.

  Returns:
    The splits its path holds; only `train` if it names its split, joins
    several, or is of a kind that knows no splits.

  Raises:
    SourceError: if there is no such source.
  """
  parts = parse(spec)
  module = _module(parts[0].kind)
  find = getattr(module, 'find_splits', None)
  if len(parts) > 1 or parts[0].split or find is None:
    return ['train']
  return find(parts[0].path)


def open_source(
  spec: str,
  *,
  split: str = 'train',
  sample_rate: int = 16000,
  measure: bool = True,
  tolerant: bool = False,
) -> Source:
  """Opens what a configuration or a flag names.

  Args:
    spec: see the module's docstring.
    split: taken where the name has none.
    sample_rate: Hz of the samples that `load` gives.
    measure: read the headers of what has no duration yet.
    tolerant: give lines of lists that cannot be understood as utterances with
      a `problem`, instead of raising.

  Returns:
    The source; no audio has been decoded yet, but for formats whose header
    does not tell the duration.

  Raises:
    SourceError: if there is no such source, or a joined key is not unique.
    ManifestError: if a manifest cannot be used.
    DatasetError: if a folder is not a data set or lacks the split.
  """
  opened = [
    _open_one(part, split, sample_rate, measure, tolerant)
    for part in parse(spec)
  ]
  return opened[0] if len(opened) == 1 else JoinedSource(opened)


def _open_one(
  spec: Spec, split: str, sample_rate: int, measure: bool, tolerant: bool
) -> Source:
  module = _module(spec.kind)
  assert module is not None  # `parse` has looked
  source = module.open_corpus(
    spec.path,
    split=spec.split or split,
    sample_rate=sample_rate,
    tolerant=tolerant,
  )
  if not len(source):
    raise SourceError(f'{spec}: there is no utterance in it')
  if measure:
    _measure(source)
  return source


def _measure(source: Source) -> None:
  """Fills in durations from headers, as far as they can be read."""
  table = source.utterances
  if not isinstance(table, manifest.Table):
    # As a table, which keeps durations as an array that can be filled in.
    table = source.utterances = manifest.table(table)
  unknown = table.unmeasured()
  if not unknown:
    return
  durations = table.durations.copy()
  with futures.ThreadPoolExecutor(_HEADER_THREADS) as pool:
    headers = pool.map(lambda index: _seconds(source, index), unknown)
    bar = tqdm.tqdm(
      headers,
      total=len(unknown),
      unit='file',
      desc='measuring',
      mininterval=0.5 if sys.stderr.isatty() else 30.0,
      disable=len(unknown) < _MANY,
    )
    durations[unknown] = list(bar)
  source.utterances = table.with_durations(durations)


def _seconds(source: Source, index: int) -> float:
  try:
    # Of no length at all is as good as unknown: loading it will say why.
    return source.header(index).seconds or float('nan')
  except audio.AudioError:
    return float('nan')  # loading it will say again what is wrong


def resolve(name: str, folder: str | os.PathLike[str]) -> str:
  """Finds a file that a list names: by the list's folder, else by this one.

  Args:
    name: absolute or relative path.
    folder: of the list.

  Returns:
    The absolute path; beside the list if it is in neither place.
  """
  beside = os.path.join(os.path.abspath(folder), name)
  if not os.path.isabs(name) and not os.path.exists(beside):
    here = os.path.abspath(name)
    if os.path.exists(here):
      return here
  return os.path.normpath(beside)
