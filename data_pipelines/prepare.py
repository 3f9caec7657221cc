"""From corpora to a folder that training can use.

The folder holds a TFDS data set (`tfds_dataset`), and of its train split the
CMVN statistics and the character table:

  OUT/dataset_info.json, features.json, speech-SPLIT.*   audio and transcripts
  OUT/index-SPLIT.jsonl                                  all but the audio
  OUT/global_cmvn.json                                   CMVN statistics
  OUT/tokens/                                            character table
  OUT/skipped.jsonl                                      what was unusable, why
  OUT/source.json                                        what it was made from
  OUT/summary.json                                       hours, skipped by reason
  OUT/checksums.json                                     of all other files

Until all of that is there the folder is called OUT.incomplete. It is written
piece by piece (`pieces`), by several processes, and by several jobs if need
be; an interrupted run continues where it stopped.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

import tqdm

from data_pipelines import assembly
from data_pipelines import job_shard
from data_pipelines import pieces
from data_pipelines import processes
from data_pipelines import sources
from data_pipelines import tfds_dataset
from data_pipelines.corpora import builtin
from data_pipelines.corpora import espeak

CMVN_FILE = assembly.CMVN_FILE
TOKENS_FOLDER = assembly.TOKENS_FOLDER
SKIPPED_FILE = assembly.SKIPPED_FILE
SOURCE_FILE = assembly.SOURCE_FILE
to_int16 = pieces.to_int16

# Files of a few hundred MB are cheap to copy and to shard; a small corpus is
# cut into some files all the same, so that several processes have work.
_MOST_PER_FILE = 2000
_LEAST_PER_FILE = 64
_FILES_OF_SMALL = 16
# Statistics of more utterances would be the same.
_CMVN_UTTERANCES = 100_000
# Starting processes takes as long as writing so many utterances.
_WORTH_PROCESSES = 200
_MOST_TOLD = 20  # utterances left out that are told one by one


class PrepareError(ValueError):
  """A corpus that cannot be prepared; the message says what to do."""


def prepare(
  out: str | os.PathLike[str],
  specs: Mapping[str, str],
  *,
  sample_rate: int = 16000,
  min_seconds: float = 0.0,
  max_seconds: float = 0.0,
  shard: job_shard.Shard | None = None,
  num_workers: int | None = None,
  force: bool = False,
) -> bool:
  """Packs the sound of sources into a folder, unless it is there already.

  What cannot be used is left out, told and listed in `skipped.jsonl`.

  Args:
    out: the folder; appears when it is complete.
    specs: of each split, what `sources.open_source` takes. Statistics and
      token table come from `train`.
    sample_rate: in Hz; everything is resampled to it.
    min_seconds: shorter utterances are left out.
    max_seconds: longer utterances are left out; 0 for no limit.
    shard: the part of the work that is this job's; all of it if not given.
    num_workers: processes; None for one a core, 0 for none but this one.
    force: make it anew even if it is there.

  Returns:
    True if the folder is complete; False if other jobs have yet to write
    their part.

  Raises:
    PrepareError: if `out` holds something else, or no audio is usable.
    ValueError: if a source cannot be opened.
  """
  specs = {split: _absolute(spec) for split, spec in specs.items()}
  settings = pieces.Settings(
    sample_rate=sample_rate, min_seconds=min_seconds, max_seconds=max_seconds
  )

  def open_all() -> dict[str, sources.Source]:
    print(f'reading {", ".join(specs.values())}', flush=True)
    return {
      split: sources.open_source(
        spec, split=split, sample_rate=sample_rate, measure=False
      )
      for split, spec in specs.items()
    }

  job = _Job(
    out=pathlib.Path(os.path.abspath(out)),
    identity=_identity(specs, settings),
    settings=settings,
    shard=shard or job_shard.Shard(),
    num_workers=num_workers,
    force=force,
  )
  return _run(job, open_all)


def prepare_builtin(
  out: str | os.PathLike[str],
  *,
  seed: int = 0,
  num_train: int = 4000,
  num_dev: int = 300,
  num_test: int = 300,
  shard: job_shard.Shard | None = None,
  num_workers: int | None = None,
  force: bool = False,
) -> bool:
  """Speaks the built-in corpus into a folder, unless it is there already.

  Args:
    out: the folder; appears when it is complete.
    seed: where chance comes from.
    num_train: utterances to train on.
    num_dev: utterances to choose checkpoints by.
    num_test: utterances to report on.
    shard: the part of the work that is this job's; all of it if not given.
    num_workers: processes; None for one a core, 0 for none but this one.
    force: make it anew even if it is there.

  Returns:
    True if the folder is complete, see `prepare`.

  Raises:
    PrepareError: if `out` holds something else.
    EngineError: if the speech engine is not installed.
  """
  sizes = {'num_train': num_train, 'num_dev': num_dev, 'num_test': num_test}
  for name, size in sizes.items():
    if size < 1:
      raise PrepareError(f'{name} is {size}; it must be positive')

  def open_all() -> dict[str, sources.Source]:
    print(f'speaking {sum(sizes.values())} utterances, seed {seed}', flush=True)
    scripts = espeak.write_scripts(seed=seed, **sizes)
    return {
      split: builtin.SpokenSource(scripts[split]) for split in builtin.SPLITS
    }

  job = _Job(
    out=pathlib.Path(os.path.abspath(out)),
    identity={'source': 'builtin', 'seed': seed, **sizes},
    settings=pieces.Settings(),
    shard=shard or job_shard.Shard(),
    num_workers=num_workers,
    force=force,
  )
  return _run(job, open_all)


def merge(out: str | os.PathLike[str]) -> None:
  """Makes a data set of the pieces that jobs have written.

  Args:
    out: the folder the jobs were given.

  Raises:
    PrepareError: if pieces are missing; says which, or there is none at all.
  """
  folder = pathlib.Path(os.path.abspath(out))
  staging = tfds_dataset.staging_folder(folder)
  plan = pieces.read_plan(staging)
  if plan is None:
    if tfds_dataset.is_dataset(folder):
      print(f'{folder}: already prepared, nothing to do')
      return
    raise PrepareError(f'{staging}: there is nothing to merge')
  lacking = assembly.missing(staging, plan)
  if lacking:
    raise PrepareError(
      f'{staging}: {len(lacking)} of {len(plan.pieces())} pieces are missing, '
      f'the first is {lacking[0].name}; run the jobs that have not finished'
    )
  _assemble(staging, folder, plan)


def verify(out: str | os.PathLike[str]) -> bool:
  """Compares a prepared folder with its checksums and says what differs.

  Args:
    out: the folder.

  Returns:
    Whether every file is what it was.

  Raises:
    AssemblyError: if there are no checksums.
  """
  differences = assembly.verify(out)
  for line in differences:
    print(line)
  if not differences:
    print(f'{os.fspath(out)}: every file is what it was')
  return not differences


@dataclasses.dataclass(frozen=True)
class _Job:
  """What one call has to do; see `prepare`."""

  out: pathlib.Path
  identity: Mapping[str, Any]
  settings: pieces.Settings
  shard: job_shard.Shard
  num_workers: int | None
  force: bool


def _absolute(spec: str) -> str:
  """The name of a source that means the same in any working directory."""
  found = []
  for part in sources.parse(spec):
    path = part.path
    if pathlib.Path(path).exists():
      path = os.path.abspath(path)
    found.append(str(dataclasses.replace(part, path=path)))
  return ','.join(found)


def _identity(
  specs: Mapping[str, str], settings: pieces.Settings
) -> dict[str, Any]:
  """What a data set is made from, as source.json has it."""
  defaults = pieces.Settings()
  changed = {
    name: value
    for name, value in dataclasses.asdict(settings).items()
    if value != getattr(defaults, name)
  }
  if all(spec.startswith('manifest:') for spec in specs.values()):
    paths = {s: spec.removeprefix('manifest:') for s, spec in specs.items()}
    return {'source': 'manifest', **paths, **changed}
  return {'source': 'sources', **specs, **changed}


def _run(job: _Job, open_all: Callable[[], dict[str, sources.Source]]) -> bool:
  """Does a job; see `prepare`."""
  if job.force and job.shard.count > 1:
    raise PrepareError(
      '--force would throw away what the other jobs of --shard have written; '
      f'remove {job.out} first'
    )
  # Before the sources are opened, which takes long.
  if _is_done(job):
    return True
  opened = open_all()
  plan = _plan(job, opened)
  staging = tfds_dataset.staging_folder(job.out)
  _enter(job, staging, plan)
  try:
    _write_own(job, opened, staging, plan)
    if assembly.missing(staging, plan):
      _tell_waiting(job, staging, plan)
      return False
    _assemble(staging, job.out, plan)
  except (FileNotFoundError, pieces.PieceError):
    # Another job has put everything together under our eyes.
    if not assembly.is_complete(job.out, job.identity):
      raise
    print(f'{job.out}: put together by another job')
  return True


def _is_done(job: _Job) -> bool:
  """Says whether all is there; refuses to write over anything else."""
  out = job.out
  if not out.exists():
    return False
  if not tfds_dataset.is_dataset(out):
    if out.is_dir() and not any(out.iterdir()):
      return False
    raise PrepareError(f'{out}: holds something else; give another --out')
  if job.force:
    return False
  if not assembly.is_complete(out, job.identity):
    path = out / SOURCE_FILE
    made_from = json.loads(path.read_text('utf-8')) if path.is_file() else None
    raise PrepareError(
      f'{out}: was prepared from {made_from}, not {dict(job.identity)}; give '
      'another --out, or --force to replace it'
    )
  print(f'{out}: already prepared, nothing to do')
  return True


def _plan(job: _Job, opened: Mapping[str, sources.Source]) -> pieces.Plan:
  counts = {split: len(source) for split, source in opened.items()}
  train = counts.get(assembly.TRAIN, 0)
  every = max(1, -(-train // _CMVN_UTTERANCES))
  settings = dataclasses.replace(
    job.settings, cmvn_every={assembly.TRAIN: every}
  )
  # A list that has changed since would give pieces that do not fit together.
  fingerprints = [sources.fingerprint(source) for source in opened.values()]
  return pieces.Plan(
    identity=job.identity,
    counts=counts,
    per_file={split: _per_file(count) for split, count in counts.items()},
    settings=settings,
    fingerprint=' '.join(fingerprints),
  )


def _per_file(count: int) -> int:
  """Utterances in a file; it must not depend on the number of processes."""
  return min(_MOST_PER_FILE, max(_LEAST_PER_FILE, -(-count // _FILES_OF_SMALL)))


def _enter(job: _Job, staging: pathlib.Path, plan: pieces.Plan) -> None:
  """Makes the folder of the pieces, or finds that of an earlier run."""
  there = pieces.read_plan(staging)
  if there is not None and there.digest != plan.digest and job.force:
    shutil.rmtree(staging)
  # Another job may write at the same moment: what is there in the end counts.
  assembly.write_plan(staging, plan)
  there = pieces.read_plan(staging)
  if there is None or there.digest != plan.digest:
    raise PrepareError(
      f'{staging}: holds the beginnings of another data set, or of one whose '
      'source has changed since; remove it, or give --force or another --out'
    )


def _write_own(
  job: _Job,
  opened: Mapping[str, sources.Source],
  staging: pathlib.Path,
  plan: pieces.Plan,
) -> None:
  """Writes this job's pieces, but for those that are there."""
  # Every N-th and not a stretch, so that each job has its share of every split.
  own = plan.pieces()[job.shard.index :: job.shard.count]
  whole = [p for p in own if pieces.is_whole(staging, p, plan.digest)]
  if whole:
    print(f'{len(whole)} of {len(own)} pieces are there and verified')
  todo = [piece for piece in own if piece not in set(whole)]
  told = _Told()
  begun = time.monotonic()
  with _bar(sum(map(len, own)), done=sum(map(len, whole))) as bar:
    for receipt in _write_all(
      _Work(staging, plan), opened, todo, job.num_workers, bar
    ):
      told.add(receipt)
  told.report(time.monotonic() - begun)


@dataclasses.dataclass(frozen=True)
class _Work:
  """What a process needs to write any piece, besides its utterances."""

  staging: pathlib.Path
  plan: pieces.Plan

  def __call__(
    self,
    item: tuple[pieces.Piece, sources.Source],
    tick: Callable[[], None],
  ) -> pieces.Receipt:
    piece, source = item
    return pieces.write(
      source, piece, self.staging, self.plan, on_utterance=tick
    )


class _Told:
  """Says what is left out, and in the end how fast it went."""

  def __init__(self) -> None:
    self._skipped = 0
    self._seconds = 0.0

  def add(self, receipt: pieces.Receipt) -> None:
    self._seconds += receipt.seconds
    for item in receipt.skipped:
      self._skipped += 1
      if self._skipped <= _MOST_TOLD:
        line = f'left out {item["key"]}: {item["reason"]}: {item["detail"]}'
        tqdm.tqdm.write(line, file=sys.stderr)
    if self._skipped > _MOST_TOLD >= self._skipped - len(receipt.skipped):
      tqdm.tqdm.write(f'more are listed in {SKIPPED_FILE}', file=sys.stderr)

  def report(self, wall: float) -> None:
    if self._seconds:
      print(
        f'wrote {self._seconds / 3600:.2f} hours of sound in {wall:.0f} s: '
        f'{self._seconds / max(wall, 1e-9):.0f} hours an hour'
      )


def _bar(total: int, *, done: int) -> tqdm.tqdm:
  # On a terminal a bar that moves; in a log a line now and then.
  return tqdm.tqdm(
    total=total,
    initial=done,
    unit='utt',
    mininterval=0.5 if sys.stderr.isatty() else 10.0,
    ascii=not sys.stderr.isatty(),
  )


def _write_all(
  work: _Work,
  opened: Mapping[str, sources.Source],
  todo: Sequence[pieces.Piece],
  num_workers: int | None,
  bar: tqdm.tqdm,
) -> Iterator[pieces.Receipt]:
  """Writes pieces, in this process or in others."""
  if num_workers is None:
    worth = sum(map(len, todo)) >= _WORTH_PROCESSES
    num_workers = processes.num_cores() if worth else 0
  before = bar.n
  # One by one, as the processes take them: each piece is sent its own part of
  # the list.
  items = (
    (piece, sources.select(opened[piece.split], piece.first, piece.last))
    for piece in todo
  )
  yield from processes.run(
    work,
    items,
    num_workers=min(num_workers, len(todo)),
    on_progress=lambda count: bar.update(before + count - bar.n) and None,
  )


def _tell_waiting(job: _Job, staging: pathlib.Path, plan: pieces.Plan) -> None:
  lacking, total = assembly.missing(staging, plan), len(plan.pieces())
  print(
    f'shard {job.shard} is done; {total - len(lacking)} of {total} pieces are '
    'there, and the job that writes the last one completes the data set'
  )


def _assemble(
  staging: pathlib.Path, out: pathlib.Path, plan: pieces.Plan
) -> None:
  try:
    summaries = assembly.assemble(staging, out, plan)
  except assembly.NothingUsableError as error:
    shutil.rmtree(staging, ignore_errors=True)
    raise PrepareError(f'{out}: {error}') from None
  except assembly.AssemblyError as error:
    raise PrepareError(f'{out}: {error}') from None
  with contextlib.suppress(BrokenPipeError):  # the reader has seen enough
    _report(out, summaries)


def _report(
  out: pathlib.Path, summaries: Mapping[str, assembly.SplitSummary]
) -> None:
  """Prints the size of each split, and what is not in it."""
  for split, each in summaries.items():
    mean = each.seconds / max(each.utterances, 1)
    print(
      f'{split}: {each.utterances} utterances, {each.seconds / 3600:.2f} hours, '
      f'{mean:.2f} s on average'
    )
    if each.unknown:
      print(
        f'{split}: {len(each.unknown)} characters do not occur in train '
        f'(unknown_tokens): {each.unknown[:50]}'
      )
  for split, each in summaries.items():
    if each.skipped:
      reasons = ', '.join(f'{n} {reason}' for reason, n in each.skipped.items())
      print(
        f'left out {sum(each.skipped.values())} utterances of {split}, see '
        f'{SKIPPED_FILE}: {reasons}'
      )
  print(f'prepared {out}')
