"""From nothing to a trained, streaming U2++ MoE recogniser.

  python -m experiments.quickstart --workdir=runs/quickstart

Speaks the built-in corpus, trains `experiments/configs/quickstart.py`,
averages, decodes the test split in every mode and context, and writes a
report. A second run continues where the first stopped.
"""

import os
import pathlib
import time

from absl import flags
from ml_collections import config_flags

from experiments.wiring import command

_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/quickstart', 'Everything is written here.'
)
_CONFIG = config_flags.DEFINE_config_file(
  'config',
  str(pathlib.Path(__file__).parent / 'configs' / 'quickstart.py'),
  'Experiment file; --config.KEY=VALUE overrides a key.',
)
_NUM_TRAIN = flags.DEFINE_integer('num_train', 4000, 'Training utterances.')
_NUM_TEST = flags.DEFINE_integer('num_test', 300, 'Dev and test utterances.')
_STARTED = time.monotonic()


def _say(text: str) -> None:
  minutes, seconds = divmod(int(time.monotonic() - _STARTED), 60)
  print(f'[{minutes:2d}:{seconds:02d}] {text}', flush=True)


def _keep_caches_inside(workdir: pathlib.Path) -> None:
  """Points every library's cache into the work directory."""
  cache = workdir / 'cache'
  for variable, folder in {
    'XDG_CACHE_HOME': 'xdg',
    'MPLCONFIGDIR': 'matplotlib',
    'NUMBA_CACHE_DIR': 'numba',
    'TFDS_DATA_DIR': 'tfds',
    'JAX_COMPILATION_CACHE_DIR': 'jax',
  }.items():
    # What the user has set stays.
    os.environ.setdefault(variable, str(cache / folder))
    pathlib.Path(os.environ[variable]).mkdir(parents=True, exist_ok=True)


def main(_: list[str]) -> int:
  """Runs everything; exit codes in docs/exit_codes.md."""
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  _keep_caches_inside(workdir)
  # After the caches are set, since libraries read them when imported.
  from experiments.wiring import quickstart

  return quickstart.run(
    _CONFIG.value.to_dict(),
    workdir,
    num_train=_NUM_TRAIN.value,
    num_test=_NUM_TEST.value,
    say=_say,
  )


if __name__ == '__main__':
  command.run(main)
