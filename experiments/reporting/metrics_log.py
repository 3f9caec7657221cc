"""Reads metrics.jsonl, as a run that was stopped and continued leaves it."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

KINDS = ('train', 'dev')


@dataclasses.dataclass(frozen=True)
class Series:
  """A quantity over training.

  Attributes:
    steps: updates done, ascending, shape (N,).
    values: shape (N, ...).
  """

  steps: np.ndarray
  values: np.ndarray

  def __len__(self) -> int:
    return len(self.steps)

  def finite(self) -> 'Series':
    """Leaves out the entries with a value that is not finite."""
    axes = tuple(range(1, self.values.ndim))
    kept = np.isfinite(self.values).all(axis=axes)
    return Series(self.steps[kept], self.values[kept])


@dataclasses.dataclass(frozen=True)
class MetricsLog:
  """What a run logged.

  Attributes:
    records: kind to lines, steps ascending.
    num_unreadable: lines that were no record, such as one cut off.
  """

  records: Mapping[str, Sequence[Mapping[str, Any]]]
  num_unreadable: int = 0

  def series(self, kind: str, name: str) -> Series:
    """Picks one quantity; its shape is that of the newest line.

    Args:
      kind: `train` or `dev`.
      name: such as `loss_ctc` or `load/encoder.final`.

    Returns:
      Its values where it was logged; empty if it never was.
    """
    found = [
      (record['step'], np.asarray(record[name], np.float64))
      for record in self.records[kind]
      if name in record
    ]
    if not found:
      return Series(np.zeros(0, int), np.zeros(0))
    shape = found[-1][1].shape
    found = [(step, value) for step, value in found if value.shape == shape]
    steps, values = zip(*found, strict=True)
    return Series(np.asarray(steps), np.stack(values))

  def names(self, prefix: str) -> list[str]:
    """Quantities of training whose name starts so, without the prefix."""
    found = {name for record in self.records['train'] for name in record}
    return sorted(
      name.removeprefix(prefix) for name in found if name.startswith(prefix)
    )


def read(path: str | os.PathLike[str]) -> MetricsLog:
  """Reads a metrics file.

  Lines that are no record are counted and left out. Where a run went back to
  a checkpoint, what it had logged behind that point is forgotten.

  Raises:
    OSError: if there is no such file.
  """
  records: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in KINDS}
  num_unreadable = 0
  # A line may have been cut off in the middle of a character.
  text = pathlib.Path(path).read_bytes().decode('utf-8', errors='replace')
  for line in text.splitlines():
    record = _parse(line)
    if record is None:
      num_unreadable += bool(line.strip())
      continue
    kind, step = record['kind'], record['step']
    # The log only grows; a step that comes again tells of a restart.
    if records[kind] and records[kind][-1]['step'] >= step:
      for name, kept in records.items():
        records[name] = [each for each in kept if each['step'] < step]
    records[kind].append(record)
  return MetricsLog(records, num_unreadable)


def _parse(line: str) -> Mapping[str, Any] | None:
  try:
    record = json.loads(line)
  except ValueError:
    return None
  if not isinstance(record, dict) or record.get('kind') not in KINDS:
    return None
  return record if isinstance(record.get('step'), int) else None


def smooth(values: np.ndarray) -> np.ndarray:
  """Averages over a centred window that grows with the root of the run.

  Args:
    values: finite, shape (N, ...).

  Returns:
    The same shape. Near the start the window shrinks, because the fall there
    is steep; near the end only its second half does, because noise is not.
  """
  # Long runs have more windows and take more smoothing, if less than in
  # proportion.
  half = int(len(values) ** 0.5 / 2.5)
  # The sum of a window is the difference of two running sums.
  padded = np.cumsum(values, axis=0)
  padded = np.concatenate([np.zeros_like(values[:1]), padded])  # [N + 1, ...]
  index = np.arange(len(values))
  back = np.minimum(half, index)
  ahead = np.minimum(back, index[::-1])
  count = (back + ahead + 1).reshape(-1, *(1,) * (values.ndim - 1))
  return (padded[index + ahead + 1] - padded[index - back]) / count
