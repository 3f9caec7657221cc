"""Measures speed with random weights: no data needed.

  python -m experiments.benchmark --configs=dense_225m,moe_1b \
    --tasks=greedy,rescore,rescoring,stream,train,search,moe,data,wait --seconds=10 --threads=2

One JSON object a line; warm, medians, compilation apart.
"""

import json
import os

from absl import flags

from experiments.wiring import command

_CONFIGS = flags.DEFINE_list('configs', ['quickstart'], 'Experiment names.')
_TASKS = flags.DEFINE_list('tasks', ['greedy'], 'What to measure.')
_SECONDS = flags.DEFINE_list('seconds', ['10'], 'Sound per utterance.')
_BATCH = flags.DEFINE_list('batch', ['1'], 'Utterances per batch.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls.', lower_bound=1)
_THREADS = flags.DEFINE_integer('threads', 0, 'CPU cores to use; 0: all.')


def main(_) -> int:
  """Runs the tasks; exit codes in docs/exit_codes.md."""
  if _THREADS.value:
    # Before JAX starts: its thread pool has as many threads as cores it sees.
    cores = sorted(os.sched_getaffinity(0))[: _THREADS.value]
    os.sched_setaffinity(0, cores)
  from experiments.benchmarks import harness
  from experiments.benchmarks import tasks

  options = harness.Options(
    configs=tuple(_CONFIGS.value),
    seconds=tuple(map(float, _SECONDS.value)),
    batches=tuple(map(int, _BATCH.value)),
    repeats=_REPEATS.value,
  )
  for name in _TASKS.value:
    for record in tasks.get(name)(options):
      print(json.dumps(harness.with_machine(record)), flush=True)
  return command.OK


if __name__ == '__main__':
  command.run(main)
