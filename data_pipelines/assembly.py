"""Puts the pieces of a data set together, and checks what was put together.

Everything that is more than a sum of pieces is made under temporary names and
moved into place, the metadata last; then the folder gets its final name. Two
jobs may do it at once: both make the same files, and who comes second finds
that the folder is complete.
"""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from data_pipelines import manifest
from data_pipelines import pieces
from data_pipelines import tfds_dataset
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import cmvn
from u2moe_jax.text import tokenizer

CMVN_FILE = 'global_cmvn.json'
TOKENS_FOLDER = 'tokens'
SKIPPED_FILE = 'skipped.jsonl'
SOURCE_FILE = 'source.json'
SUMMARY_FILE = 'summary.json'
CHECKSUMS_FILE = 'checksums.json'
TRAIN = 'train'
_METADATA_FILE = 'dataset_info.json'
_CHECK_THREADS = 4  # hashing lets other threads run


class AssemblyError(ValueError):
  """Pieces that do not make a data set; the message says why."""


class NothingUsableError(AssemblyError):
  """No recording at all, or none to train on."""


@dataclasses.dataclass(frozen=True)
class SplitSummary:
  """What became of a split.

  Attributes:
    utterances: recordings in it.
    seconds: of sound.
    skipped: how many utterances were left out, by reason.
    unknown: characters that the token table, made from train, has not.
  """

  utterances: int
  seconds: float
  skipped: Mapping[str, int]
  unknown: str = ''


def is_complete(folder: pathlib.Path, identity: Mapping[str, Any]) -> bool:
  """Says whether a folder is a data set that was made from `identity`."""
  if not tfds_dataset.is_dataset(folder):
    return False
  try:
    text = (folder / SOURCE_FILE).read_text(encoding='utf-8')
  except FileNotFoundError:
    return False
  return json.loads(text) == identity


def missing(folder: pathlib.Path, plan: pieces.Plan) -> list[pieces.Piece]:
  """The pieces that have no receipt yet."""
  there = set(os.listdir(folder / pieces.FOLDER))
  return [p for p in plan.pieces() if f'{p.name}.json' not in there]


def assemble(
  staging: pathlib.Path, folder: pathlib.Path, plan: pieces.Plan
) -> dict[str, SplitSummary]:
  """Makes a data set of pieces.

  Args:
    staging: the folder of the pieces; it becomes `folder`.
    folder: where the data set goes; replaced if it is there.
    plan: what the pieces are.

  Returns:
    What became of each split.

  Raises:
    NothingUsableError: if nothing is usable, or nothing of train.
    AssemblyError: if a key comes twice.
    PieceError: if a piece is not there or not whole.
    FileNotFoundError: if another job has just done the same.
  """
  receipts = {
    piece: pieces.read_receipt(staging, piece, plan.digest)
    for piece in plan.pieces()
  }
  if not any(receipt.recordings for receipt in receipts.values()):
    raise NothingUsableError('there is no utterance to write')
  # A folder of this job's own: another one may be doing the same.
  own = pathlib.Path(tempfile.mkdtemp(prefix='assembly-', dir=staging))
  summaries = _write_common(own, staging, plan, receipts)
  _move_into(own, staging)
  tfds_dataset.replace_folder(staging, folder)
  _tidy(folder)
  return summaries


_Receipts = Mapping[pieces.Piece, pieces.Receipt]


def _write_common(
  own: pathlib.Path,
  staging: pathlib.Path,
  plan: pieces.Plan,
  receipts: _Receipts,
) -> dict[str, SplitSummary]:
  """Writes all files that belong to no single piece."""
  table = _write_statistics(own, receipts)
  splits: dict[str, list[pieces.Piece]] = {}
  for piece in receipts:
    splits.setdefault(piece.split, []).append(piece)
  # A split without a usable utterance is none.
  used = {
    split: parts
    for split, parts in splits.items()
    if any(receipts[part].recordings for part in parts)
  }
  for split, parts in used.items():
    _write_index(own / tfds_dataset.index_name(split), staging, parts)
  summaries = {
    split: _summarise([receipts[part] for part in parts], table)
    for split, parts in splits.items()
  }
  _write_lists(own, plan, receipts, summaries)
  sizes = {
    split: [
      tfds_dataset.FileSize(receipts[p].recordings, receipts[p].record_bytes)
      for p in parts
    ]
    for split, parts in used.items()
  }
  tfds_dataset.write_metadata(own, sizes)
  _write_checksums(own, [p for parts in used.values() for p in parts], receipts)
  return summaries


def _write_statistics(
  own: pathlib.Path, receipts: _Receipts
) -> tokenizer.Tokenizer:
  """Writes the CMVN statistics and the character table of train."""
  stats = cmvn.empty(config_lib.FeatureConfig().num_mel_bins)
  characters: set[str] = set()
  for piece, receipt in receipts.items():
    if piece.split == TRAIN:
      stats = cmvn.merge(stats, receipt.cmvn)
      characters.update(receipt.characters)
  if stats.count == 0:
    raise NothingUsableError(
      f'the split {TRAIN!r} has no usable audio; CMVN statistics and the '
      'character table come from it'
    )
  cmvn.save(own / CMVN_FILE, stats)
  # One text with all the characters; the space counts only inside a text.
  between = ' ' if ' ' in characters else ''
  text = between.join(sorted(characters - {' '}))
  table = tokenizer.build_char_tokenizer([text])
  table.save(own / TOKENS_FOLDER)
  return table


def _write_index(
  path: pathlib.Path, staging: pathlib.Path, parts: Sequence[pieces.Piece]
) -> None:
  with path.open('wb') as index:
    for part in parts:
      with pieces.index_path(staging, part).open('rb') as lines:
        shutil.copyfileobj(lines, index)
  with path.open(encoding='utf-8') as index:
    # 8 bytes a key; equal hashes are looked into.
    hashes = np.array([hash(json.loads(line)['key']) for line in index])
  if len(np.unique(hashes)) < len(hashes):
    _require_unique(path)


def _require_unique(path: pathlib.Path) -> None:
  """Looks for a key that really comes twice, and does not only seem to."""
  keys: set[str] = set()
  with path.open(encoding='utf-8') as index:
    for line in index:
      key = json.loads(line)['key']
      if key in keys:
        raise AssemblyError(
          f'the key {key!r} occurs twice in {path.name}; keys must be unique'
        )
      keys.add(key)


def _summarise(
  receipts: Sequence[pieces.Receipt], table: tokenizer.Tokenizer
) -> SplitSummary:
  reasons = Counter(item['reason'] for r in receipts for item in r.skipped)
  characters = sorted({c for r in receipts for c in r.characters})
  unknown = [c for c in characters if table.unknown_characters(c)]
  return SplitSummary(
    utterances=sum(r.recordings for r in receipts),
    seconds=sum(r.seconds for r in receipts),
    skipped=dict(reasons.most_common()),
    unknown=''.join(unknown),
  )


def _write_lists(
  own: pathlib.Path,
  plan: pieces.Plan,
  receipts: _Receipts,
  summaries: Mapping[str, SplitSummary],
) -> None:
  with (own / SKIPPED_FILE).open('w', encoding='utf-8') as file:
    for piece, receipt in receipts.items():
      for item in receipt.skipped:
        line = json.dumps({**item, 'split': piece.split}, ensure_ascii=False)
        file.write(line + '\n')
  (own / SOURCE_FILE).write_text(json.dumps(plan.identity), encoding='utf-8')
  summary = {
    'sample_rate': plan.settings.sample_rate,
    'splits': {
      split: {
        **dataclasses.asdict(each),
        'hours': round(each.seconds / 3600, 4),
      }
      for split, each in summaries.items()
    },
  }
  text = json.dumps(summary, indent=2, ensure_ascii=False)
  (own / SUMMARY_FILE).write_text(text + '\n', encoding='utf-8')


def _write_checksums(
  own: pathlib.Path, used: Sequence[pieces.Piece], receipts: _Receipts
) -> None:
  """Writes size and checksum of every file but this one."""
  files = {
    piece.file: {
      'bytes': receipts[piece].file_bytes,
      'sha256': receipts[piece].sha256,
    }
    for piece in used
  }
  for path in sorted(own.rglob('*')):
    if path.is_file():
      files[path.relative_to(own).as_posix()] = {
        'bytes': path.stat().st_size,
        'sha256': pieces.checksum(path),
      }
  text = json.dumps({'algorithm': 'sha256', 'files': files}, indent=1)
  (own / CHECKSUMS_FILE).write_text(text + '\n', encoding='utf-8')


def _move_into(own: pathlib.Path, staging: pathlib.Path) -> None:
  """Moves files to where they belong, those that make it a data set last."""
  files = [path for path in sorted(own.rglob('*')) if path.is_file()]
  for path in sorted(files, key=lambda path: path.name == _METADATA_FILE):
    target = staging / path.relative_to(own)
    target.parent.mkdir(exist_ok=True)
    os.replace(path, target)
  shutil.rmtree(own)


def _tidy(folder: pathlib.Path) -> None:
  """Removes what only the making needed, and what killed jobs left."""
  # What has a checksum belongs to the data set; nothing else does.
  keep = set(_read_checksums(folder)) | {CHECKSUMS_FILE}
  for path in folder.iterdir():
    if path.is_dir():
      if path.name != TOKENS_FOLDER:
        shutil.rmtree(path, ignore_errors=True)
    elif path.name not in keep:
      path.unlink(missing_ok=True)


def _read_checksums(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  text = (folder / CHECKSUMS_FILE).read_text(encoding='utf-8')
  return json.loads(text)['files']


def verify(folder: str | os.PathLike[str]) -> list[str]:
  """Compares a data set with its checksums.

  Args:
    folder: the data set.

  Returns:
    One line for each file that is missing or not what it was.

  Raises:
    AssemblyError: if there are no checksums to compare with.
  """
  folder = pathlib.Path(folder)
  if not (folder / CHECKSUMS_FILE).is_file():
    raise AssemblyError(
      f'{folder}: no {CHECKSUMS_FILE} here; is it a prepared data set?'
    )
  files = _read_checksums(folder)
  with futures.ThreadPoolExecutor(_CHECK_THREADS) as pool:
    found = pool.map(
      lambda name: _difference(folder / name, files[name]), files
    )
    return [line for line in found if line]


def _difference(path: pathlib.Path, expected: Mapping[str, Any]) -> str | None:
  if not path.is_file():
    return f'{path}: is missing'
  size = path.stat().st_size
  if size != expected['bytes']:
    return f'{path}: has {size} bytes, not {expected["bytes"]}'
  if pieces.checksum(path) != expected['sha256']:
    return f'{path}: is damaged; its checksum is another'
  return None


def write_plan(staging: pathlib.Path, plan: pieces.Plan) -> None:
  """Makes the folder of a data set in the making, if it is not there."""
  (staging / pieces.FOLDER).mkdir(parents=True, exist_ok=True)
  if not (staging / pieces.PLAN_FILE).is_file():
    manifest.write_text(staging / pieces.PLAN_FILE, plan.to_text())
