"""Prepares a corpus for training: data set, CMVN statistics, token table.

The built-in corpus (synthetic speech, needs the package espeakng-loader):

  python -m experiments.prepare_corpus --source=builtin --out=DIR

Your own recordings, listed in manifests of JSON lines {"key", "wav", "txt"}:

  python -m experiments.prepare_corpus --source=manifest:train.jsonl \
    --dev=dev.jsonl --test=test.jsonl --out=DIR

Train on it with --config.data.train=DIR:train --config.data.dev=DIR:dev. A
complete DIR is left as it is; an interrupted run leaves no DIR. Bad input ends
with one line and exit code 2.
"""

from collections.abc import Sequence
import sys

from absl import app
from absl import flags

from data_pipelines import prepare

_SOURCE = flags.DEFINE_string(
  'source', 'builtin', 'builtin, or manifest:PATH for the train split.'
)
_OUT = flags.DEFINE_string('out', None, 'Folder to write.', required=True)
_DEV = flags.DEFINE_string('dev', None, 'Manifest of the dev split.')
_TEST = flags.DEFINE_string('test', None, 'Manifest of the test split.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the built-in corpus.')
_NUM_TRAIN = flags.DEFINE_integer('num_train', 4000, 'Built-in: train size.')
_NUM_DEV = flags.DEFINE_integer('num_dev', 300, 'Built-in: dev size.')
_NUM_TEST = flags.DEFINE_integer('num_test', 300, 'Built-in: test size.')
_NUM_WORKERS = flags.DEFINE_integer(
  'num_workers', None, 'Built-in: processes; one a core if not given.'
)
_FORCE = flags.DEFINE_bool('force', False, 'Replace what is in --out.')


def _prepare() -> None:
  kind, _, path = _SOURCE.value.partition(':')
  if kind == 'builtin' and not path:
    prepare.prepare_builtin(
      _OUT.value,
      seed=_SEED.value,
      num_train=_NUM_TRAIN.value,
      num_dev=_NUM_DEV.value,
      num_test=_NUM_TEST.value,
      num_workers=_NUM_WORKERS.value,
      force=_FORCE.value,
    )
  elif kind == 'manifest' and path:
    prepare.prepare_manifest(
      _OUT.value,
      train=path,
      dev=_DEV.value,
      test=_TEST.value,
      force=_FORCE.value,
    )
  else:
    raise prepare.PrepareError(
      f'--source={_SOURCE.value} is not known; use builtin or manifest:PATH'
    )


def main(argv: Sequence[str]) -> None:
  """Prepares what the flags say."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  try:
    _prepare()
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  app.run(main)
