"""Manifests: JSON lines `{"key", "wav", "txt"}`, one utterance a line.

Other keys (`speaker`, `duration` in seconds, ...) are kept. A relative `wav`
is relative to the manifest's folder.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

_REQUIRED = ('key', 'wav', 'txt')


class ManifestError(ValueError):
  """A manifest that cannot be used; the message names the file and line."""


@dataclasses.dataclass(frozen=True)
class Utterance:
  """One utterance: where its sound is and what was said.

  Attributes:
    key: its name, unique within a manifest.
    wav: path of the audio file; empty where the audio lies in a data set.
    txt: transcript.
    extra: everything else that is known, ready for JSON.
  """

  key: str
  wav: str
  txt: str
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

  @property
  def duration(self) -> float | None:
    """Length in seconds, or None where nobody has measured it."""
    duration = self.extra.get('duration')
    return None if duration is None else float(duration)


def read(
  path: str | os.PathLike[str], *, allow_empty_txt: bool = False
) -> list[Utterance]:
  """Reads a manifest.

  Args:
    path: JSON lines file; blank lines are skipped.
    allow_empty_txt: accept utterances without words.

  Returns:
    The utterances in the order of the file, with absolute `wav`.

  Raises:
    ManifestError: naming file and line, for whatever cannot be used.
  """
  path = pathlib.Path(path)
  utterances = []
  first_line: dict[str, int] = {}
  for number, line in enumerate(_read_lines(path), start=1):
    if not line.strip():
      continue
    utterance = _parse(line, path, number, allow_empty_txt)
    if utterance.key in first_line:
      raise ManifestError(
        f'{path}:{number}: the key {utterance.key!r} already stands in line '
        f'{first_line[utterance.key]}; keys must be unique'
      )
    first_line[utterance.key] = number
    utterances.append(utterance)
  if not utterances:
    raise ManifestError(f'{path}: no utterance in this manifest')
  return utterances


def _read_lines(path: pathlib.Path) -> list[str]:
  if not path.is_file():
    raise ManifestError(f'{path}: no such manifest')
  lines = []
  # Split as bytes: str.splitlines would also split at exotic characters that
  # may stand inside a transcript, and a bad byte is named with its line.
  for number, line in enumerate(path.read_bytes().split(b'\n'), start=1):
    try:
      lines.append(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
    except UnicodeDecodeError as error:
      raise ManifestError(
        f'{path}:{number}: not UTF-8 (byte {error.start + 1} of the line); '
        'convert the manifest to UTF-8'
      ) from None
  return lines


def _parse(
  line: str, path: pathlib.Path, number: int, allow_empty_txt: bool
) -> Utterance:
  """Turns one line into an utterance, or says what is wrong with it."""
  where = f'{path}:{number}'
  try:
    fields = json.loads(line)
  except (json.JSONDecodeError, RecursionError) as error:
    raise ManifestError(f'{where}: not JSON: {error}') from None
  if not isinstance(fields, dict):
    raise ManifestError(
      f'{where}: a JSON object is needed, not {line.strip()[:40]}'
    )
  for name in _REQUIRED:
    if name not in fields:
      raise ManifestError(f'{where}: {name!r} is missing')
    if not isinstance(fields[name], str):
      raise ManifestError(
        f'{where}: {name!r} must be a string, not {fields[name]!r}'
      )
  for name in ('key', 'wav'):
    if not fields[name].strip():
      raise ManifestError(f'{where}: {name!r} is empty')
  if not fields['txt'].strip() and not allow_empty_txt:
    raise ManifestError(
      f'{where}: the transcript of {fields["key"]!r} is empty'
    )
  extra = {k: v for k, v in fields.items() if k not in _REQUIRED}
  _check_duration(extra, where)
  wav = os.path.normpath(path.absolute().parent / fields['wav'])
  return Utterance(fields['key'], wav, fields['txt'], extra)


def _check_duration(extra: Mapping[str, Any], where: str) -> None:
  duration = extra.get('duration')
  if duration is None:
    return
  is_number = isinstance(duration, (int, float)) and not isinstance(
    duration, bool
  )
  # The chained comparison is False for NaN, which Python's JSON reads.
  if not is_number or not 0 <= duration < float('inf'):
    raise ManifestError(
      f"{where}: 'duration' must be seconds, not {duration!r}"
    )


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
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise
