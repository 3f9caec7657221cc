"""The tasks by name."""

from collections.abc import Callable
from collections.abc import Iterator
import functools
from typing import Any

from experiments.benchmarks import data
from experiments.benchmarks import data_wait
from experiments.benchmarks import decode
from experiments.benchmarks import harness
from experiments.benchmarks import moe
from experiments.benchmarks import rescoring
from experiments.benchmarks import search
from experiments.benchmarks import train
from u2moe_jax import config as config_lib

Task = Callable[[harness.Options], Iterator[dict[str, Any]]]

_TASKS: dict[str, Task] = {
  'greedy': functools.partial(decode.run, mode='ctc_greedy_search'),
  'rescore': functools.partial(decode.run, mode='attention_rescoring'),
  'rescoring': rescoring.run,
  'stream': decode.stream,
  'train': train.run,
  'search': search.run,
  'moe': moe.run,
  'data': data.run,
  'wait': data_wait.run,
}


def get(name: str) -> Task:
  """Returns a task.

  Raises:
    config_lib.ConfigError: if there is none of that name.
  """
  if name not in _TASKS:
    raise config_lib.ConfigError(
      f'no benchmark task {name!r}; there are {", ".join(_TASKS)}'
    )
  return _TASKS[name]
