"""WeNet shards: a list of tar files with KEY.wav (.flac, ...) and KEY.txt.

`shards:LIST`, a text file with one tar a line; relative paths are looked for
beside the list, then in the working directory. Nothing is unpacked: an index
of where each recording lies is made once and kept beside the list, as
LIST.index, where that folder can be written to. A tar file whose size or time
has changed is indexed again.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import contextlib
import json
import os
import pathlib
import sys
import tarfile
from typing import Any

import tqdm

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines.corpora import keyed_lines
from u2moe_jax.frontend import audio

_SOUNDS = ('wav', 'flac', 'mp3', 'm4a', 'ogg', 'opus', 'wma', 'aac')
_INDEX_ENDING = '.index'
_INDEX_VERSION = 1
_BLOCK = 512  # bytes, the unit of a tar file
_PACKED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ')  # gzip, bzip2, xz
_THREADS = 8  # reading tar headers is waiting for the disk


def open_corpus(
  path: str, *, split: str, sample_rate: int, tolerant: bool
) -> sources.Source:
  """Opens a list of shards; it has one split, whatever that is called."""
  del split
  tars = _read_list(pathlib.Path(path))
  entries = _load_index(path, tars)
  changed = [tar for tar in tars if _stamp(tar) != entries.get(tar, [None])[0]]
  if changed:
    entries |= _scan_all(changed)
    _save_index(path, {tar: entries[tar] for tar in tars})
  table = manifest.table(_utterances(tars, entries))
  return sources.FileSource(_unique(table, tolerant), sample_rate=sample_rate)


# For each tar file its stamp and its utterances, as JSON keeps them.
_Entry = list[Any]


def _read_list(path: pathlib.Path) -> list[str]:
  if not path.is_file():
    raise sources.SourceError(f'{path}: no such list of tar files')
  if tarfile.is_tarfile(path):
    return [os.fspath(path.absolute())]  # one shard and no list
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except UnicodeDecodeError:
    raise sources.SourceError(
      f'{path}: neither a tar file nor a UTF-8 list of tar files'
    ) from None
  names = [line.strip() for line in lines if line.strip()]
  for name in names:
    if name.startswith('{'):
      raise sources.SourceError(
        f'{path}: lines of JSON, not of tar files; this is a manifest: '
        f'manifest:{path}'
      )
  return [sources.resolve(name, path.parent) for name in names]


def _stamp(tar: str) -> list[int]:
  """What changes when the file does; of a file that is not there, zeros."""
  try:
    status = os.stat(tar)
  except OSError:
    return [0, 0]
  return [status.st_size, status.st_mtime_ns]


def _scan_all(tars: Sequence[str]) -> dict[str, _Entry]:
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    scans = tqdm.tqdm(
      pool.map(_scan, tars),
      total=len(tars),
      unit='tar',
      desc='indexing',
      mininterval=0.5 if sys.stderr.isatty() else 30.0,
      disable=len(tars) < 50,
    )
    return dict(zip(tars, scans, strict=True))


def _scan(tar: str) -> _Entry:
  """Reads the headers and transcripts of a tar file."""
  # The stamp comes first: of a file that changes meanwhile it is too old, and
  # the file is indexed again.
  stamp, members = _stamp(tar), _Members(tar)
  try:
    # Not `r:*`: a compressed archive has no random access.
    with tarfile.open(tar, 'r:') as archive:
      for member in archive:
        if member.isfile():
          members.add(archive, member)
      members.require_end(archive)
  except FileNotFoundError:
    members.refuse('missing', 'no such tar file; check the list')
  except (tarfile.TarError, OSError, EOFError) as error:
    advice = (
      'unpack it to a plain .tar' if _is_packed(tar) else 'write it again'
    )
    members.refuse('broken_tar', f'{error}; {advice}')
  return [stamp, members.rows()]


def _is_packed(tar: str) -> bool:
  with open(tar, 'rb') as file:
    return file.read(6).startswith(_PACKED)


class _Members:
  """What was found in a tar file so far."""

  def __init__(self, tar: str):
    self._tar = tar
    self._size = _stamp(tar)[0]
    self._sounds: dict[str, tuple[int, int]] = {}
    self._texts: dict[str, str | None] = {}  # None for what is not UTF-8
    self._refused: list[tuple[str, str]] = []

  def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Takes note of a file."""
    key, _, ending = member.name.rpartition('.')
    # (`tar -c .` writes such names.)
    key = key.removeprefix('./')
    if ending == 'txt':
      file = archive.extractfile(member)
      assert file is not None  # it is for folders and links
      try:
        self._texts[key] = file.read().decode('utf-8-sig').strip()
      except UnicodeDecodeError:
        self._texts[key] = None
    elif ending.lower() in _SOUNDS:
      self._sounds[key] = (member.offset_data, member.size)

  def require_end(self, archive: tarfile.TarFile) -> None:
    """Raises if there is something else behind the last member than an end.

    The library stops reading there, and tells nobody.
    """
    with open(self._tar, 'rb') as file:
      file.seek(archive.offset)
      block = file.read(_BLOCK)
    if any(block) or len(block) < _BLOCK:
      raise tarfile.ReadError(f'no member and no end at byte {archive.offset}')

  def refuse(self, reason: str, detail: str) -> None:
    """Takes note of a problem of the whole file."""
    self._refused.append((reason, f'{self._tar}: {detail}'))

  def rows(self) -> list[_Entry]:
    """[key, txt, offset, size, seconds, reason, detail] of each utterance."""
    rows: list[_Entry] = []
    for key, (offset, size) in self._sounds.items():
      txt = self._texts.get(key, '')
      rows.append([key, txt or '', offset, size, None, *self._problem(key)])
      if rows[-1][5] is None:
        rows[-1][4] = self._seconds(offset, size)
    for key, txt in self._texts.items():
      if key not in self._sounds:
        problem = keyed_lines.no_audio(key, self._tar)
        rows.append([key, txt or '', 0, 0, None, 'no_audio', problem.detail])
    for reason, detail in self._refused:
      rows.append([self._tar, '', 0, 0, None, reason, detail])
    return rows

  def _problem(self, key: str) -> tuple[str | None, str | None]:
    if self._texts.get(key, '') is None:
      return 'bad_encoding', f'{self._tar}: {key}.txt is not UTF-8; convert it'
    if not self._texts.get(key):
      return 'no_text', keyed_lines.no_text(key, self._tar).detail
    return None, None

  def _seconds(self, offset: int, size: int) -> float | None:
    part = audio.Part(offset=offset, size=size)
    try:
      return audio.read_header(self._tar, part=part).seconds
    except audio.AudioError:
      return None  # loading it will say again what is wrong


def _utterances(
  tars: Sequence[str], entries: dict[str, _Entry]
) -> Iterator[manifest.Utterance]:
  for tar in tars:
    for key, txt, offset, size, seconds, reason, detail in entries[tar][1]:
      extra = {'offset': offset, 'size': size}
      if seconds is not None:
        extra['duration'] = seconds
      problem = manifest.Problem(reason, detail) if reason else None
      yield manifest.Utterance(key, tar, txt, extra, problem)


def _unique(table: manifest.Table, tolerant: bool) -> manifest.Table:
  """Refuses keys that come twice, or takes note of them."""
  hashes = [hash(item.key) for item in table]
  repeats = manifest.repeated(hashes, lambda i: table[i].key)
  if not repeats:
    return table
  problems = {
    index: manifest.Problem(
      'duplicate_key',
      f'{table[index].wav}: the key {table[index].key!r} is also in '
      f'{table[first].wav}; keys must be unique',
    )
    for index, first in repeats.items()
  }
  if not tolerant:
    raise sources.SourceError(next(iter(problems.values())).detail)
  return table.with_problems(problems)


def _load_index(path: str, tars: Sequence[str]) -> dict[str, _Entry]:
  """The index beside the list; empty if there is none that can be used."""
  try:
    with open(path + _INDEX_ENDING, encoding='utf-8') as file:
      if json.loads(next(file, '')) != {'version': _INDEX_VERSION}:
        return {}
      entries = {tar: entry for tar, *entry in map(json.loads, file)}
  except (OSError, ValueError, TypeError):
    return {}
  return {tar: entries[tar] for tar in tars if tar in entries}


def _save_index(path: str, entries: dict[str, _Entry]) -> None:
  lines = [json.dumps({'version': _INDEX_VERSION})]
  lines += [json.dumps([tar, *entry]) for tar, entry in entries.items()]
  # In a folder that only others write to it is made again next time.
  with contextlib.suppress(OSError):
    manifest.write_text(
      pathlib.Path(path + _INDEX_ENDING), '\n'.join(lines) + '\n'
    )
