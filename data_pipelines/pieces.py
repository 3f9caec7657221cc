"""Pieces of a data set in the making: some utterances, one file each.

A piece is a stretch of a split. It is written apart from all others, by any
process on any machine, and is there when its receipt is there: the receipt is
written last, and everything under a temporary name until it is whole. So an
interrupted run continues with the pieces that are missing, and jobs on
several machines need nothing in common but the folder.

  FOLDER/plan.json               what all pieces are, and of what
  FOLDER/speech-SPLIT.*-NUMBER   recordings, under their final name
  FOLDER/pieces/SPLIT-NUMBER.jsonl   their lines of the index
  FOLDER/pieces/SPLIT-NUMBER.json    the receipt
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import socket
from typing import Any

import numpy as np

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines import tfds_dataset
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import cmvn
from u2moe_jax.frontend import fbank

FOLDER = 'pieces'
PLAN_FILE = 'plan.json'
# Keys that say where sound was, which is no longer there.
_PLACES = ('duration', 'start', 'end', 'offset', 'size')


class PieceError(ValueError):
  """A piece that is not what its receipt says; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Piece:
  """Utterances `first` to `last - 1` of a split, in file `number`."""

  split: str
  number: int
  first: int
  last: int

  def __len__(self) -> int:
    return self.last - self.first

  @property
  def name(self) -> str:
    """What its receipt is called."""
    return f'{self.split}-{self.number:05d}'

  @property
  def file(self) -> str:
    """What its recordings are called."""
    return tfds_dataset.file_name(self.split, self.number)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How recordings are made of utterances.

  Attributes:
    sample_rate: Hz; everything is resampled to it.
    min_seconds: shorter utterances are left out.
    max_seconds: longer utterances are left out; 0 for no limit.
    cmvn_every: of each split, every so many utterances count for the CMVN
      statistics; a split that is not named gives none.
  """

  sample_rate: int = 16000
  min_seconds: float = 0.0
  max_seconds: float = 0.0
  cmvn_every: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a data set is made of, before anything is written.

  Attributes:
    identity: what it is made from, ready for JSON.
    counts: utterances of each split.
    per_file: utterances of each split that go into one file.
    settings: how recordings are made.
    fingerprint: of the lists of utterances.
  """

  identity: Mapping[str, Any]
  counts: Mapping[str, int]
  per_file: Mapping[str, int]
  settings: Settings
  fingerprint: str

  def pieces(self) -> list[Piece]:
    """All pieces, split by split."""
    return [
      Piece(split, number, first, min(first + self.per_file[split], count))
      for split, count in self.counts.items()
      for number, first in enumerate(range(0, count, self.per_file[split]))
    ]

  def to_text(self) -> str:
    """As JSON; equal plans give equal texts."""
    return json.dumps(dataclasses.asdict(self), indent=2) + '\n'

  @functools.cached_property
  def digest(self) -> str:
    """A name for this very plan."""
    return hashlib.sha256(self.to_text().encode()).hexdigest()[:16]


def read_plan(folder: pathlib.Path) -> Plan | None:
  """Reads the plan of a folder; None if it has none."""
  try:
    fields = json.loads((folder / PLAN_FILE).read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  settings = Settings(**fields.pop('settings'))
  return Plan(**fields, settings=settings)


@dataclasses.dataclass(frozen=True)
class Receipt:
  """What is to be known of a written piece.

  Attributes:
    plan: digest of the plan it belongs to.
    recordings: in its file; those left out are not.
    record_bytes: of the recordings before compression.
    seconds: of sound.
    file_bytes: size of its file.
    sha256: of its file.
    index_bytes: size of its lines of the index.
    index_sha256: of these lines.
    characters: all that occur in its transcripts, sorted.
    skipped: `key`, `reason` and `detail` of what was left out.
    cmvn_sum: see `cmvn.CmvnStats`.
    cmvn_sum_squares: the same.
    cmvn_count: the same.
  """

  plan: str
  recordings: int
  record_bytes: int
  seconds: float
  file_bytes: int
  sha256: str
  index_bytes: int
  index_sha256: str
  characters: str
  skipped: list[dict[str, str]]
  cmvn_sum: list[float]
  cmvn_sum_squares: list[float]
  cmvn_count: int

  @property
  def cmvn(self) -> cmvn.CmvnStats:
    """The CMVN statistics of its recordings."""
    return cmvn.CmvnStats(
      np.array(self.cmvn_sum), np.array(self.cmvn_sum_squares), self.cmvn_count
    )


def receipt_path(folder: pathlib.Path, piece: Piece) -> pathlib.Path:
  """Where the receipt of a piece is."""
  return folder / FOLDER / f'{piece.name}.json'


def index_path(folder: pathlib.Path, piece: Piece) -> pathlib.Path:
  """Where a piece's lines of the index are."""
  return folder / FOLDER / f'{piece.name}.jsonl'


def read_receipt(folder: pathlib.Path, piece: Piece, plan: str) -> Receipt:
  """Reads a receipt and looks at the sizes of what it stands for.

  Args:
    folder: of the data set in the making.
    piece: whose.
    plan: digest that it must have.

  Raises:
    PieceError: if the piece is not there, or not of this size or plan.
  """
  path = receipt_path(folder, piece)
  try:
    receipt = Receipt(**json.loads(path.read_text(encoding='utf-8')))
  except (FileNotFoundError, ValueError, TypeError) as error:
    raise PieceError(f'{path}: no receipt ({error})') from None
  if receipt.plan != plan:
    raise PieceError(f'{path}: of another data set')
  for file, size in (
    (folder / piece.file, receipt.file_bytes),
    (index_path(folder, piece), receipt.index_bytes),
  ):
    there = file.stat().st_size if file.is_file() else 'no'
    if there != size:
      raise PieceError(f'{file}: has {there} bytes, not {size}')
  return receipt


def is_whole(folder: pathlib.Path, piece: Piece, plan: str) -> bool:
  """Says whether a piece is there and has its checksums."""
  try:
    receipt = read_receipt(folder, piece, plan)
  except PieceError:
    return False
  return (
    checksum(folder / piece.file) == receipt.sha256
    and checksum(index_path(folder, piece)) == receipt.index_sha256
  )


def checksum(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def write(
  source: sources.Source,
  piece: Piece,
  folder: pathlib.Path,
  plan: Plan,
  *,
  on_utterance: Callable[[], None] = lambda: None,
) -> Receipt:
  """Writes a piece; what stood there of it before is replaced.

  Args:
    source: its utterances, and no others.
    piece: what it is called, and where in its split it is.
    folder: of the data set in the making.
    plan: its plan.
    on_utterance: called before each utterance; may raise to stop.

  Returns:
    The receipt, which has been written too.
  """
  # No two processes, on whatever machines, write to the same name.
  ending = f'{socket.gethostname()}-{os.getpid()}.partial'
  file = folder / f'{piece.name}.{ending}'
  index = folder / FOLDER / f'{piece.name}.{ending}'
  gathered = _Gathered(plan.settings, piece.split)
  try:
    writer = tfds_dataset.RecordWriter(file)
    try:
      with index.open('w', encoding='utf-8') as lines:
        found = _recordings(
          source, piece, plan.settings, gathered, on_utterance
        )
        for recording in found:
          writer.add(recording)
          lines.write(tfds_dataset.index_line(recording))
    finally:
      size = writer.close()
    receipt = gathered.receipt(plan.digest, size, file, index)
    # Without a receipt the piece counts as missing: so it is until the new one
    # is written, last of all.
    receipt_path(folder, piece).unlink(missing_ok=True)
    os.replace(file, folder / piece.file)
    os.replace(index, index_path(folder, piece))
  finally:
    file.unlink(missing_ok=True)
    index.unlink(missing_ok=True)
  text = json.dumps(dataclasses.asdict(receipt), ensure_ascii=False)
  manifest.write_text(receipt_path(folder, piece), text + '\n')
  return receipt


class _Gathered:
  """What is to be known of the recordings that went by."""

  def __init__(self, settings: Settings, split: str) -> None:
    self.skipped: list[dict[str, str]] = []
    # The default filterbank, whatever the rate of the data: its statistics
    # can be taken for training with the default features, and no others.
    self._features = config_lib.FeatureConfig()
    self._cmvn = cmvn.empty(self._features.num_mel_bins)
    self._every = settings.cmvn_every.get(split, 0)
    self._characters: set[str] = set()
    self._seconds = 0.0

  def add(self, index: int, recording: tfds_dataset.Recording) -> None:
    self._seconds += recording.duration
    self._characters.update(' '.join(recording.txt.split()))
    # By the number in the split, so the choice does not depend on how the split
    # is cut into pieces.
    if self._every and index % self._every == 0:
      samples = audio.as_mono(
        recording.audio,
        recording.sample_rate,
        sample_rate=self._features.sample_rate,
        name=recording.key,
      )
      frames = fbank.fbank(samples, self._features)
      self._cmvn = cmvn.accumulate(self._cmvn, frames)

  def skip(self, key: str, error: audio.AudioError) -> None:
    self.skipped.append(
      {'key': key, 'reason': error.reason, 'detail': str(error)}
    )

  def receipt(
    self,
    plan: str,
    size: tfds_dataset.FileSize,
    file: pathlib.Path,
    index: pathlib.Path,
  ) -> Receipt:
    return Receipt(
      plan=plan,
      recordings=size.num_recordings,
      record_bytes=size.num_bytes,
      seconds=self._seconds,
      file_bytes=file.stat().st_size,
      sha256=checksum(file),
      index_bytes=index.stat().st_size,
      index_sha256=checksum(index),
      characters=''.join(sorted(self._characters)),
      skipped=self.skipped,
      cmvn_sum=self._cmvn.sum.tolist(),
      cmvn_sum_squares=self._cmvn.sum_squares.tolist(),
      cmvn_count=self._cmvn.count,
    )


def _recordings(
  source: sources.Source,
  piece: Piece,
  settings: Settings,
  gathered: _Gathered,
  on_utterance: Callable[[], None],
) -> Iterator[tfds_dataset.Recording]:
  """Loads the utterances of a piece; leaves out what cannot be used."""
  for index, utterance in enumerate(source.utterances):
    on_utterance()
    try:
      recording = _record(source, index, utterance, settings)
    except audio.AudioError as error:
      gathered.skip(utterance.key, error)
      continue
    gathered.add(piece.first + index, recording)
    yield recording


def _record(
  source: sources.Source,
  index: int,
  utterance: manifest.Utterance,
  settings: Settings,
) -> tfds_dataset.Recording:
  if utterance.duration is not None:
    # An hour need not be decoded to know that it is too long.
    _require_length(utterance.key, utterance.duration, settings)
  samples = source.load(index)
  _require_length(utterance.key, len(samples) / settings.sample_rate, settings)
  extra = {k: v for k, v in utterance.extra.items() if k not in _PLACES}
  return tfds_dataset.Recording(
    utterance.key,
    utterance.txt,
    to_int16(samples),
    settings.sample_rate,
    extra,
  )


def _require_length(key: str, seconds: float, settings: Settings) -> None:
  if seconds < settings.min_seconds:
    raise audio.AudioError(
      'too_short',
      f'{key!r} has {seconds:g} s; --min_seconds={settings.min_seconds:g}',
    )
  if 0 < settings.max_seconds < seconds:
    raise audio.AudioError(
      'too_long',
      f'{key!r} has {seconds:g} s; --max_seconds={settings.max_seconds:g}',
    )


def to_int16(samples: np.ndarray) -> np.ndarray:
  """Rounds floats within [-1, 1] to int16; what is beyond is clipped."""
  limits = np.iinfo(np.int16)
  # The inverse of reading, which divides by 32768: 16-bit files stay as they
  # are.
  scaled = np.round(samples * (limits.max + 1.0))
  return np.clip(scaled, limits.min, limits.max).astype(np.int16)
