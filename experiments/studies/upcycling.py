r"""Does a dense model that grows experts do what the paper says? (UME)

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    python -m experiments.studies.upcycling --workdir=runs/upcycling
  python -m experiments.studies.upcycling --workdir=runs/upcycling_full \
    --form=full --an4=FOLDER

Six arms: (a) a dense model is trained, (b) trained on, (c) a Mixture-of-Experts
is trained from scratch with the updates of both, (d) the dense model grows
experts and all of it trains on, (e) only experts and routers do, (f) as (d)
without balance loss. The quick form takes the built-in corpus and one seed, in
under 90 minutes on 2 cores (on Linux the variable saves a seventh). The full
form trains longer, with two seeds, and with a folder of manifests (train.jsonl,
dev.jsonl, test.jsonl) also on those recordings, and from one corpus to the
other.

Writes study.json, study.md and plots/ after each arm. The same command goes on
where it was stopped, in as many sittings as it takes.
"""

import os
import pathlib
import sys
import time
import typing

from absl import flags
from ml_collections import config_flags

from experiments.wiring import command

_CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/upcycling', 'Everything is written here.'
)
_FORM = flags.DEFINE_enum(
  'form', 'quick', ['quick', 'full'], 'How long, and how many seeds.'
)
_AN4 = flags.DEFINE_string(
  'an4', None, 'Folder with train.jsonl, dev.jsonl, test.jsonl of recordings.'
)
_CORPUS = flags.DEFINE_string(
  'corpus', None, 'Prepared built-in corpus; without it, it is spoken.'
)
_STUDIES = flags.DEFINE_list(
  'studies', None, 'Of builtin, an4, shift; default: all that the form has.'
)
_SEEDS = flags.DEFINE_integer(
  'seeds', None, 'How many; default: 1, or 2 in the full form.', lower_bound=1
)
_DENSE_STEPS = flags.DEFINE_integer(
  'dense_steps', None, 'Updates of (a) instead of those of the form.'
)
_MORE_STEPS = flags.DEFINE_integer(
  'more_steps', None, 'Updates of what continues it, likewise.'
)
_EVERY = flags.DEFINE_integer(
  'every', 100, 'Updates between two points of a curve.', lower_bound=1
)
_NUM_EXPERTS = flags.DEFINE_integer('num_experts', 4, 'Experts per layer.')
_TOP_K = flags.DEFINE_integer('top_k', 2, 'Experts per frame.')
_WHERE = flags.DEFINE_string('where', 'all', 'As of experiments.upcycle.')
_NOISE = flags.DEFINE_float('noise', 0.0, 'As of experiments.upcycle.')
_DROP = flags.DEFINE_float('drop', 0.0, 'As of experiments.upcycle.')
_BALANCE = flags.DEFINE_float(
  'balance_loss_weight', 0.1, 'Of (c), (d) and (e).'
)
_RATE = flags.DEFINE_float(
  'rate', 0.5, "Peak rate of what continues, as a share of the dense one's."
)
_NUM_TRAIN = flags.DEFINE_integer('num_train', 4000, 'Utterances to speak.')
_NUM_TEST = flags.DEFINE_integer('num_test', 300, 'For dev, and for test.')
_CONFIG = config_flags.DEFINE_config_file(
  'config',
  str(_CONFIGS / 'quickstart_dense.py'),
  'The dense training on the built-in corpus.',
)
_AN4_CONFIG = config_flags.DEFINE_config_file(
  'an4_config', str(_CONFIGS / 'an4.py'), 'The dense training on --an4.'
)
_STARTED = time.monotonic()


def _say(text: str) -> None:
  minutes, seconds = divmod(int(time.monotonic() - _STARTED), 60)
  print(f'[{minutes:2d}:{seconds:02d}] {text}', flush=True)


def main(_: list[str]) -> int:
  """Runs the study; exit codes in docs/exit_codes.md."""
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  # JAX reads it when it is imported. A run that continues compiles nothing, and
  # arms with equal programs share them.
  os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(workdir / 'cache' / 'jax')
  )
  # Nothing is written outside of the work directory.
  os.environ.setdefault('MPLCONFIGDIR', str(workdir / 'cache' / 'matplotlib'))
  from experiments.studies import running
  from experiments.studies import study

  try:
    done = study.run(_request(), workdir, say=_say)
  except running.ReceiptError as error:
    # A check said no: neither bad input nor a defect of this script.
    print(f'error: {error}', file=sys.stderr, flush=True)
    return command.FAILED
  return command.OK if done else command.INTERRUPTED


def _request():
  """The flags as a `study.Request`."""
  from experiments.studies import study
  from experiments.wiring import upcycling

  return study.Request(
    form=typing.cast(study.Form, _FORM.value),
    studies=tuple(_STUDIES.value or ()),
    seeds=_SEEDS.value,
    dense_steps=_DENSE_STEPS.value,
    more_steps=_MORE_STEPS.value,
    every=_EVERY.value,
    config=_CONFIG.value.to_dict(),
    an4_config=_AN4_CONFIG.value.to_dict(),
    balance=_BALANCE.value,
    rate=_RATE.value,
    growth=upcycling.Request(
      num_experts=_NUM_EXPERTS.value,
      top_k=_TOP_K.value,
      where=_WHERE.value,
      noise=_NOISE.value,
      drop=_DROP.value,
    ),
    corpus=_CORPUS.value,
    an4=_AN4.value,
    num_train=_NUM_TRAIN.value,
    num_test=_NUM_TEST.value,
  )


if __name__ == '__main__':
  command.run(main)
