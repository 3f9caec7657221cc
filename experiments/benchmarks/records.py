"""What is measured, as it is printed: a JSON object or a row of a table."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import os
import resource
from typing import Any

import jax

Record = Mapping[str, Any]

# In this order; a record has those that apply, and behind them its own.
FIELDS = (
  'impl',
  'config',
  'bench',
  'case',
  'form',
  'executor',
  'layout',
  'dtype',
  'threads',
  'batch',
  'audio_s',
  'wall_s',
  'wall_s_min',
  'wall_s_max',
  'compile_s',
  'rtf',
  'utt_per_s',
  'tokens',
  'ratio_to_dense',
  'chunk_ms_p50',
  'chunk_ms_p95',
  'params_m',
  'active_params_m',
  'gflop',
  'mfu',
  'peak_rss_gib',
  'load_average',
  'device',
)
# What two records must share for a ratio to say something.
_COMPARABLE = ('bench', 'case', 'form', 'dtype', 'batch', 'audio_s')
# They differ from line to line and say nothing of one.
_NOT_IN_TABLES = ('load_average', 'peak_rss_gib')


def complete(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
  """Adds the machine and ratios to the records of a task, and sorts keys.

  `ratio_to_dense`, where a task has not its own, is the wall time over that of
  the first config without experts that was measured alike, in this task.
  """
  dense: dict[tuple[Any, ...], float] = {}
  for record in records:
    added = {**record, **_machine()}
    if 'wall_s' in record and 'params_m' in record:
      key = tuple(record.get(name) for name in _COMPARABLE)
      # No experts: all parameters are active.
      if record['params_m'] == record['active_params_m']:
        dense.setdefault(key, record['wall_s'])
      if dense.get(key):
        ratio = round(record['wall_s'] / dense[key], 3)
        # A task's own ratio stays.
        added.setdefault('ratio_to_dense', ratio)
    yield _ordered(added)


def _machine() -> dict[str, Any]:
  """What a figure hangs on. The peak is that of the process so far."""
  # Linux tells KiB.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  return {
    'impl': 'u2moe_jax',
    'threads': len(os.sched_getaffinity(0)),
    'device': jax.devices()[0].device_kind,
    'peak_rss_gib': round(peak, 2),
    'load_average': round(os.getloadavg()[0], 2),
  }


def _ordered(record: Record) -> dict[str, Any]:
  names = [name for name in FIELDS if name in record]
  return {name: record[name] for name in [*names, *record]}


def to_table(title: str, records: Sequence[Record]) -> str:
  """A Markdown table, below a line of what all records have in common."""
  if not records:
    return f'## {title}\n\nnothing measured\n'
  names = list(dict.fromkeys(name for record in records for name in record))
  names = [name for name in names if name not in _NOT_IN_TABLES]
  same = {
    name: _cell(records[0].get(name))
    for name in names
    # Of a single record everything would be common, and no table left.
    if len(records) > 1 and len({_cell(r.get(name)) for r in records}) == 1
  }
  columns = [name for name in names if name not in same]
  rows = [[_cell(record.get(name)) for name in columns] for record in records]
  common = ', '.join(f'{name} {value}' for name, value in same.items())
  return '\n'.join(
    [
      f'## {title}',
      '',
      *([common, ''] if common else []),
      *_aligned([columns, *rows]),
      '',
    ]
  )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
  """Markdown with columns of one width each; the first row is the heading."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '| ' + ' | '.join(f'{cell:>{w}}' for cell, w in zip(row, widths)) + ' |'
    for row in rows
  ]
  rule = '| ' + ' | '.join('-' * (w - 1) + ':' for w in widths) + ' |'
  return iter([lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
  if value is None:
    return '-'
  return f'{value:.4g}' if isinstance(value, float) else str(value)
