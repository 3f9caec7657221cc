"""What a user sees of a run: progress, metrics.jsonl, TensorBoard events."""

from collections.abc import Mapping
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
import tensorboardX
import tqdm


class Reporter:
  """Writes metrics of a run; only the first process should make one."""

  def __init__(
    self, workdir: str | os.PathLike[str], *, start: int, total: int
  ):
    """Opens the files, appending to what is there.

    Args:
      workdir: the work directory.
      start: updates done before.
      total: updates to do in all.
    """
    workdir = pathlib.Path(workdir)
    self._lines = (workdir / 'metrics.jsonl').open('a', encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'))
    self._total, self._start = total, start
    self._begun = time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        initial=start, total=total, unit='step', dynamic_ncols=True
      )

  def advance(self, step: int) -> None:
    """Moves the progress bar, if there is one."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """Appends one line and the scalars among it as events.

    Args:
      step: updates done.
      kind: `train` or `dev`.
      values: numbers, or arrays such as expert loads.
    """
    record = {'step': step, 'kind': kind, 'time': round(time.time(), 3)}
    record |= {name: _plain(value) for name, value in values.items()}
    self._lines.write(json.dumps(record) + '\n')
    self._lines.flush()
    for name, value in values.items():
      if np.ndim(value) == 0:
        self._events.add_scalar(f'{kind}/{name}', float(value), step)

  def say(self, step: int, text: str) -> None:
    """Prints one line, with the share done and the time left."""
    done = step - self._start
    spent = time.monotonic() - self._begun
    left = spent / done * (self._total - step) if done else math.nan
    eta = '' if math.isnan(left) else f' | {_clock(left)} left'
    line = f'step {step}/{self._total} | {text}{eta}'
    if self._bar is not None:
      self._bar.write(line, file=sys.stderr)
    else:
      print(line, flush=True)

  def close(self) -> None:
    """Flushes and closes."""
    if self._bar is not None:
      self._bar.close()
    self._lines.close()
    self._events.close()


def _plain(value: Any) -> Any:
  """A JSON value of five significant digits."""
  array = np.asarray(value, np.float64)
  if array.ndim:
    return [_plain(item) for item in array]
  number = float(array)
  return float(f'{number:.5g}') if math.isfinite(number) else str(number)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'
