r"""Prepares a corpus for training: data set, CMVN statistics, token table.

The built-in corpus (synthetic speech, needs the package espeakng-loader):

  python -m experiments.prepare_corpus --source=builtin --out=DIR

Your own recordings: manifests of JSON lines {"key", "wav", "txt"}, or any
other source of docs/data.md:

  python -m experiments.prepare_corpus --source=manifest:train.jsonl \
    --dev=dev.jsonl --test=test.jsonl --out=DIR
  python -m experiments.prepare_corpus --source=aishell:/data/aishell --out=DIR

A large corpus as an array of jobs on a cluster, in any order or at once:

  python -m experiments.prepare_corpus --source=... --out=DIR \
    --shard=$SLURM_ARRAY_TASK_ID/100

Train on it with --config.data.train=DIR:train --config.data.dev=DIR:dev. A
complete DIR is left as it is; until it is complete it is called
DIR.incomplete, and the same command continues an interrupted run. Exit codes:
docs/exit_codes.md.
"""

import re
import signal
import sys

from absl import flags

from data_pipelines import job_shard
from data_pipelines import prepare
from data_pipelines import sources
from experiments.wiring import command

_SOURCE = flags.DEFINE_string(
  'source',
  'builtin',
  'What to prepare: builtin, a manifest, or KIND:PATH[:SPLIT] (docs/data.md). '
  'A source that names no split is taken with all it has.',
)
_OUT = flags.DEFINE_string('out', None, 'Folder to write.', required=True)
_DEV = flags.DEFINE_string('dev', None, 'Source of the dev split.')
_TEST = flags.DEFINE_string('test', None, 'Source of the test split.')
_SPLITS = flags.DEFINE_multi_string(
  'split', [], 'NAME=SOURCE: a further split; may be given several times.'
)
_SHARD = flags.DEFINE_string(
  'shard', None, 'I/N: do the I-th of N shares of the work, I from 0 to N-1.'
)
_MERGE = flags.DEFINE_bool(
  'merge', False, 'Only put together what the jobs of --shard have written.'
)
_VERIFY = flags.DEFINE_bool(
  'verify', False, 'Only compare --out with its checksums.'
)
_SAMPLE_RATE = flags.DEFINE_integer(
  'sample_rate', 16000, 'Hz; everything is resampled to it.'
)
_MIN_SECONDS = flags.DEFINE_float(
  'min_seconds', 0.0, 'Shorter utterances are left out.'
)
_MAX_SECONDS = flags.DEFINE_float(
  'max_seconds', 0.0, 'Longer utterances are left out; 0: no limit.'
)
_WORKERS = flags.DEFINE_integer(
  'workers', None, 'Processes; one a core if not given, 0 for none but this.'
)
flags.DEFINE_alias('num_workers', 'workers')
_FORCE = flags.DEFINE_bool('force', False, 'Replace what is in --out.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the built-in corpus.')
_NUM_TRAIN = flags.DEFINE_integer('num_train', 4000, 'Built-in: train size.')
_NUM_DEV = flags.DEFINE_integer('num_dev', 300, 'Built-in: dev size.')
_NUM_TEST = flags.DEFINE_integer('num_test', 300, 'Built-in: test size.')


def _specs() -> dict[str, str]:
  """The source of each split."""
  try:
    found = sources.find_splits(_SOURCE.value)
  except sources.SourceError as error:
    raise prepare.PrepareError(
      f'--source={_SOURCE.value} is not known: {error}'
    ) from None
  specs = {split: _SOURCE.value for split in found}
  named = {'dev': _DEV.value, 'test': _TEST.value}
  for item in _SPLITS.value:
    name, is_given, spec = item.partition('=')
    if not is_given or not re.fullmatch(r'[\w-]+', name):
      raise prepare.PrepareError(
        f'--split={item} is not of the form NAME=SOURCE, NAME of letters, '
        'digits, - and _'
      )
    named[name] = spec
  # --dev, --test and --split win over what the source itself has.
  return specs | {split: spec for split, spec in named.items() if spec}


def _prepare() -> None:
  if _SOURCE.value == 'builtin':
    prepare.prepare_builtin(
      _OUT.value,
      seed=_SEED.value,
      num_train=_NUM_TRAIN.value,
      num_dev=_NUM_DEV.value,
      num_test=_NUM_TEST.value,
      shard=job_shard.parse(_SHARD.value),
      num_workers=_WORKERS.value,
      force=_FORCE.value,
    )
    return
  prepare.prepare(
    _OUT.value,
    _specs(),
    sample_rate=_SAMPLE_RATE.value,
    min_seconds=_MIN_SECONDS.value,
    max_seconds=_MAX_SECONDS.value,
    shard=job_shard.parse(_SHARD.value),
    num_workers=_WORKERS.value,
    force=_FORCE.value,
  )


def _stop(*_) -> None:
  raise KeyboardInterrupt


def main(argv: list[str]) -> int:
  """Prepares what the flags say; exit codes in docs/exit_codes.md."""
  # A flag whose dashes were forgotten would change nothing, unnoticed.
  if len(argv) > 1:
    raise prepare.PrepareError(f'unexpected argument {argv[1]!r}')
  # Clusters end jobs with SIGTERM; it shall unwind as Ctrl-C does.
  signal.signal(signal.SIGTERM, _stop)
  try:
    if _VERIFY.value:
      return command.OK if prepare.verify(_OUT.value) else command.FAILED
    if _MERGE.value:
      prepare.merge(_OUT.value)
    else:
      _prepare()
  except KeyboardInterrupt:
    print('stopped; the same command continues', file=sys.stderr)
    return command.INTERRUPTED
  return command.OK


if __name__ == '__main__':
  command.run(main)
