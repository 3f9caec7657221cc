r"""Measures speed with random weights: no data needed.

  python -m experiments.benchmark --configs=dense_225m,moe_1b \
    --tasks=greedy,rescore,rescoring,stream,train,search,moe,data,wait \
    --seconds=10,20 --batch=1,16 --dtype=float32 --threads=2

One JSON object a line, or with --table a table a task; warm, medians,
compilation apart. Decoding is measured in the inference form
(docs/inference.md) unless --form says otherwise. A ratio is against the first
config without experts, so that goes first.
"""

import json
import os
import typing

from absl import flags

from experiments.wiring import command
from u2moe_jax import config as config_lib

_CONFIGS = flags.DEFINE_list('configs', ['quickstart'], 'Experiment names.')
_TASKS = flags.DEFINE_list('tasks', ['greedy'], 'What to measure.')
_SECONDS = flags.DEFINE_list('seconds', ['10'], 'Sound per utterance.')
_BATCH = flags.DEFINE_list('batch', ['1'], 'Utterances per batch.')
_FORM = flags.DEFINE_enum(
  'form', 'inference', ['training', 'inference'], 'Form of the parameters.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  '',
  ['', 'float32', 'bfloat16', 'int8'],
  'Type to compute in; int8: 8-bit weights; empty: that of the config.',
)
_TABLE = flags.DEFINE_bool('table', False, 'Tables instead of JSON lines.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls.', lower_bound=1)
_THREADS = flags.DEFINE_integer('threads', 0, 'CPU cores to use; 0: all.')


def main(_: list[str]) -> int:
  """Runs the tasks; exit codes in docs/exit_codes.md."""
  if _THREADS.value:
    # Before JAX starts: its thread pool has as many threads as cores it sees.
    cores = sorted(os.sched_getaffinity(0))[: _THREADS.value]
    os.sched_setaffinity(0, cores)
  from experiments.benchmarks import harness
  from experiments.benchmarks import records
  from experiments.benchmarks import tasks

  options = harness.Options(
    configs=tuple(_CONFIGS.value),
    seconds=tuple(map(float, _SECONDS.value)),
    batches=tuple(map(int, _BATCH.value)),
    repeats=_REPEATS.value,
    form=typing.cast(config_lib.Form, _FORM.value),
    dtype=_DTYPE.value,
  )
  # All names before the first task: a wrong one must not show after an hour.
  chosen = {name: tasks.get(name) for name in _TASKS.value}
  for name, task in chosen.items():
    found = records.complete(task(options))
    # A task is a generator: a JSON line appears as soon as it is measured, a
    # table needs all of them.
    if _TABLE.value:
      print(records.to_table(name, list(found)), flush=True)
    else:
      for record in found:
        print(json.dumps(record), flush=True)
  return command.OK


if __name__ == '__main__':
  command.run(main)
