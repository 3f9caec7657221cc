"""Manifests: JSON lines `{"key", "wav", "txt"}`, one utterance a line.

Other keys (`speaker`, ...) are kept; some of them mean something:

  duration       seconds, so that the audio need not be opened to know them
  start, end     seconds; the utterance is this segment of the recording
  offset, size   bytes; the recording is this part of a larger file (a tar)

A relative `wav` is relative to the manifest's folder. WeNet's `data.list` is
of the same form.
"""

import array
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import tempfile
from typing import Any
from typing import overload

from jaxtyping import Float
import numpy as np

from u2moe_jax.frontend import audio

_REQUIRED = ('key', 'wav', 'txt')
_SECONDS = ('duration', 'start', 'end')
_BYTES = ('offset', 'size')


class ManifestError(ValueError):
  """A manifest that cannot be used; the message names the file and line."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """Why an utterance cannot be used, known before its audio is opened.

  Attributes:
    reason: one of `reasons.REASONS`.
    detail: one line: what, where, and what to do.
  """

  reason: str
  detail: str


@dataclasses.dataclass(frozen=True)
class Utterance:
  """One utterance: where its sound is and what was said.

  Attributes:
    key: its name, unique within a manifest.
    wav: path of the audio file; empty where the audio lies in a data set.
    txt: transcript.
    extra: everything else that is known, ready for JSON.
    problem: set if it cannot be used; loading it raises just that.
  """

  key: str
  wav: str
  txt: str
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  problem: Problem | None = None

  @property
  def duration(self) -> float | None:
    """Length in seconds; None if it is not known, or of no use."""
    if self.problem is not None:
      return None
    duration, end = self.extra.get('duration'), self.extra.get('end')
    if duration is not None:
      return float(duration)
    return None if end is None else end - (self.extra.get('start') or 0.0)

  @property
  def part(self) -> audio.Part:
    """What of the file `wav` is its sound."""
    extra = self.extra
    if not any(name in extra for name in ('start', 'end', *_BYTES)):
      return audio.WHOLE
    return audio.Part(
      start=extra.get('start') or 0.0,
      end=extra.get('end'),
      offset=extra.get('offset') or 0,
      size=extra.get('size'),
    )


class OnDemand(Sequence[Utterance]):
  """Utterances that are read when they are asked for."""

  def __init__(self, count: int, read: Callable[[int], Utterance]) -> None:
    """Takes how many there are, and what reads one by its number."""
    self._count, self._read = count, read

  def __len__(self) -> int:
    return self._count

  @overload
  def __getitem__(self, index: int) -> Utterance: ...

  @overload
  def __getitem__(self, index: slice) -> list[Utterance]: ...

  def __getitem__(self, index: int | slice) -> Utterance | list[Utterance]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(f'{index} is not in [0, {len(self)})')
    return self._read(index % len(self))


class Table(OnDemand):
  """Many utterances in little memory: their lines, parsed when asked for.

  A million utterances take about as much as their manifest; as objects they
  would take five times that, and travel slowly to another process.
  """

  def __init__(
    self,
    data: bytes,
    rows: Sequence[tuple[int, int]] | np.ndarray,
    parse: Callable[[str], Utterance],
    *,
    durations: Float[np.ndarray, 'N'] | None = None,
    problems: Mapping[int, Problem] | None = None,
  ):
    """Wraps lines that were found to be good.

    Args:
      data: the lines, UTF-8.
      rows: first byte of each line, and the one behind its last.
      parse: one line to an utterance.
      durations: seconds, NaN where unknown; they stand in for missing ones.
      problems: of some of the utterances, by number.
    """
    self._data = data
    self._rows = np.asarray(rows, np.int64).reshape(-1, 2)
    super().__init__(len(self._rows), self._utterance)
    self._parse = parse
    if durations is None:
      durations = np.full(len(self._rows), np.nan)
    self.durations = np.asarray(durations, np.float64)
    self._problems = dict(problems or {})

  def _utterance(self, index: int) -> Utterance:
    first, last = self._rows[index].tolist()
    utterance = self._parse(self._data[first:last].decode('utf-8'))
    return self._complete(utterance, index)

  def _complete(self, utterance: Utterance, index: int) -> Utterance:
    """Adds what is known besides the line."""
    problem = self._problems.get(index)
    if problem is not None:
      return dataclasses.replace(utterance, problem=problem)
    seconds = self.durations[index]
    if utterance.extra.get('duration') is None and not math.isnan(seconds):
      extra = {**utterance.extra, 'duration': float(seconds)}
      return dataclasses.replace(utterance, extra=extra)
    return utterance

  def select(self, first: int, last: int) -> 'Table':
    """Utterances `first` to `last - 1`, without the memory of the others."""
    lines = [self._data[a:b] for a, b in self._rows[first:last].tolist()]
    # The lines stand closely here, so their places are counted anew.
    ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
    rows = np.stack([ends - [len(line) for line in lines], ends], axis=1)
    return Table(
      b''.join(lines),
      rows,
      self._parse,
      durations=self.durations[first:last],
      problems={
        index - first: problem
        for index, problem in self._problems.items()
        if first <= index < last
      },
    )

  def fingerprint(self) -> str:
    """A name for just these lines."""
    digest = hashlib.blake2b(self._data, digest_size=16)
    digest.update(self._rows)
    return digest.hexdigest()

  def unmeasured(self) -> list[int]:
    """Numbers of the utterances whose duration can and should be measured."""
    unknown = np.flatnonzero(np.isnan(self.durations)).tolist()
    return [index for index in unknown if index not in self._problems]

  def with_durations(self, durations: Float[np.ndarray, 'N']) -> 'Table':
    """The same utterances, with durations where there were none."""
    return self._replace(durations, self._problems)

  def with_problems(self, problems: Mapping[int, Problem]) -> 'Table':
    """The same utterances, of which some more cannot be used."""
    durations = self.durations.copy()
    # What cannot be used has no duration, see `Utterance.duration`.
    durations[list(problems)] = np.nan
    return self._replace(durations, {**self._problems, **problems})

  def _replace(
    self, durations: np.ndarray, problems: Mapping[int, Problem]
  ) -> 'Table':
    return Table(
      self._data,
      self._rows,
      self._parse,
      durations=durations,
      problems=problems,
    )


class TableBuilder:
  """Gathers utterances for a `Table`, one by one."""

  def __init__(self) -> None:
    self._data = bytearray()
    # Arrays of numbers, since a list would hold an object for each of them.
    self._rows = array.array('q')
    self._durations = array.array('d')
    self._problems: dict[int, Problem] = {}

  def add(self, utterance: Utterance) -> None:
    """Adds one; its `wav` should be absolute."""
    if utterance.problem is not None:
      self._problems[len(self._durations)] = utterance.problem
    self._rows.append(len(self._data))
    self._data += to_line(utterance).encode('utf-8')
    self._rows.append(len(self._data))
    duration = utterance.duration
    self._durations.append(math.nan if duration is None else duration)

  def build(self) -> Table:
    """The table of all that was added."""
    return Table(
      bytes(self._data),
      np.array(self._rows),
      _from_line,
      durations=np.array(self._durations),
      problems=self._problems,
    )


def table(utterances: Iterable[Utterance]) -> Table:
  """Stores utterances compactly; their order stays."""
  builder = TableBuilder()
  for utterance in utterances:
    builder.add(utterance)
  return builder.build()


def _from_line(line: str, folder: str = '') -> Utterance:
  """Parses a line that is known to be good."""
  fields = json.loads(line)
  key, wav, txt = (fields.pop(name) for name in _REQUIRED)
  return Utterance(key, _resolve(wav, folder), txt, fields)


def _resolve(wav: str, folder: str) -> str:
  return os.path.normpath(os.path.join(folder, wav)) if folder else wav


def read(
  path: str | os.PathLike[str], *, allow_empty_txt: bool = False
) -> list[Utterance]:
  """Reads a manifest, every line of which must be good.

  Args:
    path: JSON lines file; blank lines are skipped.
    allow_empty_txt: accept utterances without words.

  Returns:
    The utterances in the order of the file, with absolute `wav`. A segment
    that ends before it starts has its `problem` set.

  Raises:
    ManifestError: naming file and line, for whatever cannot be used.
  """
  utterances = list(read_table(path, allow_empty_txt=allow_empty_txt))
  for utterance in utterances:
    problem = utterance.problem
    if problem is not None and problem.reason == 'bad_encoding':
      raise ManifestError(problem.detail)
  return utterances


def read_table(
  path: str | os.PathLike[str],
  *,
  allow_empty_txt: bool = False,
  tolerant: bool = False,
) -> Table:
  """Reads a manifest of any size.

  Args:
    path: JSON lines file; blank lines are skipped.
    allow_empty_txt: accept utterances without words.
    tolerant: give lines that cannot be used as utterances with a `problem`,
      instead of raising.

  Returns:
    The utterances in the order of the file, with absolute `wav`. Text that is
    not UTF-8 and segments that end before they start have their `problem`
    set, tolerant or not.

  Raises:
    ManifestError: naming file and line, for whatever cannot be used.
  """
  path = pathlib.Path(path)
  reader = _Reader(path, allow_empty_txt, tolerant)
  # Split as bytes: str.splitlines would also split at exotic characters that
  # may stand inside a transcript, and a bad byte is named with its line.
  for number, begin, end in _lines(reader.data):
    reader.add(number, begin, end)
  return reader.finish()


def _lines(data: bytes) -> Iterator[tuple[int, int, int]]:
  """Number, first byte and end of each line that is not blank."""
  # A byte order mark belongs to no line.
  begin, number = (3 if data.startswith(b'\xef\xbb\xbf') else 0), 0
  while begin < len(data):
    number += 1
    end = data.find(b'\n', begin)
    end = len(data) if end < 0 else end
    if data[begin:end].strip():
      yield number, begin, end
    begin = end + 1


class _Reader:
  """A manifest on its way into a table; the lines stay as they are."""

  def __init__(
    self, path: pathlib.Path, allow_empty_txt: bool, tolerant: bool
  ) -> None:
    if not path.is_file():
      raise ManifestError(f'{path}: no such manifest')
    self.data = path.read_bytes()
    self._path = path
    self._folder = os.fspath(path.absolute().parent)
    self._allow_empty_txt = allow_empty_txt
    self._tolerant = tolerant
    self._rows = array.array('q')
    self._durations = array.array('d')
    self._problems: dict[int, Problem] = {}
    self._replaced = bytearray()  # lines that could not stay as they are
    self._hashes = array.array('q')  # of the keys
    self._numbers = array.array('q')  # of the lines

  def add(self, number: int, begin: int, end: int) -> None:
    """Takes the line `data[begin:end]`."""
    problem = None
    try:
      line = self.data[begin:end].decode('utf-8')
    except UnicodeDecodeError as error:
      line = self.data[begin:end].decode('utf-8', errors='replace')
      problem = Problem(
        'bad_encoding',
        f'{self._path}:{number}: not UTF-8 (byte {error.start + 1} of the '
        'line); convert the manifest to UTF-8',
      )
    try:
      fields = _check_line(line, self._allow_empty_txt)
    except ManifestError as error:
      self._refuse(number, f'{self._path}:{number}: {error}')
      return
    problem = problem or _segment_problem(fields, self._path, number)
    if problem is not None:
      self._problems[len(self._durations)] = problem
      begin, end = self._replace(fields)
    seconds = math.nan if problem else _known_seconds(fields)
    self._append(number, begin, end, fields['key'], seconds)

  def _append(
    self,
    number: int,
    begin: int,
    end: int,
    key: str,
    seconds: float = math.nan,
  ) -> None:
    self._rows.append(begin)
    self._rows.append(end)
    self._durations.append(seconds)
    # 8 bytes instead of the key; `repeated` looks again at what is equal.
    self._hashes.append(hash(key))
    self._numbers.append(number)

  def _refuse(self, number: int, message: str) -> None:
    """Raises, or takes note of a line that cannot be used."""
    if not self._tolerant:
      raise ManifestError(message)
    # It needs a name to be told by, and its own may be what is wrong with it.
    key = f'{self._path.name}:{number}'
    self._problems[len(self._durations)] = Problem('bad_line', message)
    begin, end = self._replace({'key': key, 'wav': '', 'txt': ''})
    self._append(number, begin, end, key)

  def _replace(self, fields: Mapping[str, Any]) -> tuple[int, int]:
    """Stores a line behind the file's own."""
    # Where it will be once `finish` has put the two together.
    begin = len(self.data) + len(self._replaced)
    self._replaced += json.dumps(fields).encode('utf-8')
    return begin, len(self.data) + len(self._replaced)

  def finish(self) -> Table:
    """The table; raises if there is nothing in it, or a key comes twice."""
    if not self._rows:
      raise ManifestError(f'{self._path}: no utterance in this manifest')
    rows = np.array(self._rows).reshape(-1, 2)
    parse = functools.partial(_from_line, folder=self._folder)
    data = self.data + bytes(self._replaced) if self._replaced else self.data
    durations = np.array(self._durations)
    found = Table(
      data, rows, parse, durations=durations, problems=self._problems
    )
    repeats = repeated(self._hashes, lambda i: found[i].key)
    problems = {}
    for index, first in repeats.items():
      message = (
        f'{self._path}:{self._numbers[index]}: the key {found[index].key!r} '
        f'already stands in line {self._numbers[first]}; keys must be unique'
      )
      if not self._tolerant:
        raise ManifestError(message)
      problems[index] = Problem('duplicate_key', message)
    return found.with_problems(problems) if problems else found


def repeated(
  hashes: Sequence[int] | np.ndarray, key: Callable[[int], str]
) -> dict[int, int]:
  """Finds keys that come twice, with 8 bytes a key.

  Args:
    hashes: `hash` of each key.
    key: gives the key of a number.

  Returns:
    For every number whose key stood there before, the number where it stood
    first; in rising order.
  """
  values = np.asarray(hashes, np.int64)
  order = np.argsort(values, kind='stable')
  same = values[order[1:]] == values[order[:-1]]
  suspects = np.unique(np.concatenate([order[1:][same], order[:-1][same]]))
  first: dict[str, int] = {}
  found = {}
  # Two keys may share a hash without being the same.
  for index in suspects.tolist():
    name = key(index)
    if name in first:
      found[index] = first[name]
    else:
      first[name] = index
  return found


def _check_line(line: str, allow_empty_txt: bool) -> dict[str, Any]:
  """Returns the fields of a line; ManifestError says what is wrong with it."""
  try:
    fields = json.loads(line)
  except (json.JSONDecodeError, RecursionError) as error:
    raise ManifestError(f'not JSON: {error}') from None
  if not isinstance(fields, dict):
    raise ManifestError(f'a JSON object is needed, not {line.strip()[:40]}')
  for name in _REQUIRED:
    if name not in fields:
      raise ManifestError(f'{name!r} is missing')
    if not isinstance(fields[name], str):
      raise ManifestError(f'{name!r} must be a string, not {fields[name]!r}')
  for name in ('key', 'wav'):
    if not fields[name].strip():
      raise ManifestError(f'{name!r} is empty')
  # Only an escape can make half a pair: the line itself was UTF-8.
  if '\\u' in line and not _is_unicode(fields):
    raise ManifestError('half of a surrogate pair; write the character itself')
  if not allow_empty_txt and not fields['txt'].strip():
    raise ManifestError(f'the transcript of {fields["key"]!r} is empty')
  if len(fields) > len(_REQUIRED):
    _check_numbers(fields)
  return fields


def _is_unicode(fields: Mapping[str, Any]) -> bool:
  try:
    ''.join(fields[name] for name in _REQUIRED).encode('utf-8')
  except UnicodeEncodeError:
    return False
  return True


def _check_numbers(fields: Mapping[str, Any]) -> None:
  for name, unit in (
    *zip(_SECONDS, ['seconds'] * 3),
    *zip(_BYTES, ['bytes'] * 2),
  ):
    value = fields.get(name)
    if value is None:
      continue
    kinds = (int, float) if unit == 'seconds' else int
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    # The chained comparison is False for NaN, which Python's JSON reads; a
    # negative start is a bad segment, and said of the utterance.
    least = -math.inf if name in ('start', 'end') else 0
    if not is_number or not least <= value < math.inf:
      raise ManifestError(f'{name!r} must be {unit}, not {value!r}')


def _segment_problem(
  fields: Mapping[str, Any], path: pathlib.Path, number: int
) -> Problem | None:
  start, end = fields.get('start') or 0.0, fields.get('end')
  if start >= 0 and (end is None or start < end):
    return None
  return Problem(
    'bad_segment',
    f'{path}:{number}: the segment of {fields["key"]!r} starts at {start:g} s '
    f'and ends at {end} s; correct start and end',
  )


def _known_seconds(fields: Mapping[str, Any]) -> float:
  """Duration as a line tells it, or NaN."""
  if fields.get('duration') is not None:
    return fields['duration']
  if fields.get('end') is not None:
    return fields['end'] - (fields.get('start') or 0.0)
  return math.nan


def to_line(utterance: Utterance) -> str:
  """Returns the utterance as one line of JSON, without a newline."""
  fields = {name: getattr(utterance, name) for name in _REQUIRED}
  return json.dumps({**fields, **utterance.extra}, ensure_ascii=False)


def write(
  path: str | os.PathLike[str], utterances: Iterable[Utterance]
) -> None:
  """Writes a manifest; whoever looks sees the old file or all of the new.

  Args:
    path: where to; missing folders are made.
    utterances: what to write; `wav` is written as it stands.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, ''.join(f'{to_line(item)}\n' for item in utterances))


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a text file in one step, through a temporary one beside it."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(handle, 'w', encoding='utf-8') as file:
      file.write(text)
    os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner reads
    # In one step: whoever reads finds the old text or the new one.
    os.replace(temporary, path)
  # Also when the user interrupts.
  except BaseException:
    os.unlink(temporary)
    raise
