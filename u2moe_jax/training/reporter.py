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

from u2moe_jax.checkpoint import processes
from u2moe_jax.training import json_lines


class Reporter:
  """Writes metrics of a run; with several hosts, on the first one."""

  def __init__(
    self, workdir: str | os.PathLike[str], *, start: int, total: int
  ):
    """Opens the files, appending to what is there.

    Args:
      workdir: the work directory.
      start: updates done before.
      total: updates to do in all.
    """
    self._total, self._start = total, start
    self._begun = time.monotonic()
    self._bar = None
    self._is_silent = not processes.is_first()
    if self._is_silent:
      return
    workdir = pathlib.Path(workdir)
    json_lines.forget_torn_line(workdir / 'metrics.jsonl')
    self._lines = (workdir / 'metrics.jsonl').open('a', encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'))
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
    if self._is_silent:
      return
    record = {'step': step, 'kind': kind, 'time': round(time.time(), 3)}
    record |= {name: _plain(value) for name, value in values.items()}
    self._lines.write(json.dumps(record) + '\n')
    self._lines.flush()
    for name, value in values.items():
      if np.ndim(value) == 0:
        self._events.add_scalar(f'{kind}/{name}', float(value), step)

  def say(self, step: int, text: str) -> None:
    """Prints one line, with the share done and the time left."""
    if self._is_silent:
      return
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
    if self._is_silent:
      return
    if self._bar is not None:
      self._bar.close()
    self._lines.close()
    self._events.close()


def expert_load(values: Mapping[str, Any]) -> dict[str, float]:
  """Least and largest share of the frames that an expert of any layer got.

  Args:
    values: metrics, with a `load/LAYER` of shape (L, E) for each MoE layer.

  Returns:
    `expert_load_low` and `expert_load_high`; nothing for a dense model.
  """
  loads = [np.ravel(v) for name, v in values.items() if name[:5] == 'load/']
  if not loads:
    return {}
  shares = np.concatenate(loads)
  return {
    'expert_load_low': float(shares.min()),
    'expert_load_high': float(shares.max()),
  }


_PARTS = {'loss_ctc': 'ctc', 'loss_l2r': 'l2r', 'loss_r2l': 'r2l'}


def train_line(values: Mapping[str, Any]) -> str:
  """The metrics of some steps, in a line."""
  parts = [
    f'{word} {values[k]:.3f}' for k, word in _PARTS.items() if k in values
  ]
  if 'loss' in values:
    fields = [
      f'loss {values["loss"]:.3f} ({", ".join(parts)})',
      f'grad {values["gradient_norm"]:.2f}',
    ]
  else:
    fields = ['no update: no loss or gradient was finite']
  fields += [
    f'lr {values["learning_rate"]:.2e}',
    f'{values["audio_seconds_per_second"]:.0f} audio-h/h',
    f'data wait {100 * values["data_wait_share"]:.0f} %',
  ]
  if 'mfu' in values:
    fields.append(f'MFU {100 * values["mfu"]:.1f} %')
  if 'expert_load_low' in values:
    low, high = values['expert_load_low'], values['expert_load_high']
    fields.append(f'experts {100 * low:.0f}-{100 * high:.0f} %')
  updates, utterances = values['skipped_updates'], values['skipped_utterances']
  if updates or utterances:
    fields.append(f'skipped {updates} updates, {utterances} utterances')
  return ' | '.join(fields)


def _plain(value: Any) -> Any:
  """A JSON value of five significant digits."""
  array = np.asarray(value, np.float64)
  if array.ndim:
    return [_plain(item) for item in array]
  number = float(array)  # JSON has no NaN and no infinity: they become text
  return float(f'{number:.5g}') if math.isfinite(number) else str(number)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'
