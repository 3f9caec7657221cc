"""The host loop: next batch, step, log, evaluate, save. No maths."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import signal
import time
import types
from typing import Any
from typing import Protocol

import jax
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.training import evaluate as evaluate_lib
from u2moe_jax.training import metrics as metrics_lib
from u2moe_jax.training import objective
from u2moe_jax.training import reporter as reporter_lib
from u2moe_jax.training import step as step_lib
from u2moe_jax.training.state import TrainState


class HostBatch(Protocol):
  """What the data side gives for one step (see data_pipelines.pipeline)."""

  @property
  def arrays(self) -> Mapping[str, np.ndarray]:
    """Fields of `objective.Batch`."""

  @property
  def keys(self) -> Sequence[str]:
    """Utterances of the rows."""

  @property
  def seconds(self) -> float:
    """Audio in the batch."""

  @property
  def skipped(self) -> Sequence[Any]:
    """Dataclasses with key, reason, detail."""


class StopRequest:
  """Turns the first SIGTERM or SIGINT into a flag; a second one kills."""

  def __init__(self) -> None:
    self.signal: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> 'StopRequest':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _: types.FrameType | None) -> None:
    self.signal = number
    for each, handler in self._previous.items():
      signal.signal(each, handler)


class TrainingError(RuntimeError):
  """Training cannot go on; the message says why."""


@dataclasses.dataclass
class _Window:
  """Metrics since the last line."""

  metrics: list[step_lib.Metrics] = dataclasses.field(default_factory=list)
  seconds: float = 0.0
  waited: float = 0.0
  begun: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass
class Trainer:
  """One run.

  Attributes:
    config: the experiment.
    workdir: where everything is written.
    state: the training state, placed.
    train_step: see `step.make_train_step`.
    place: host arrays to a placed `objective.Batch`.
    batches: number of the first batch to an endless iterator.
    evaluate: parameters and buffers to dev results; None for no dev set.
    store: checkpoints.
  """

  config: config_lib.Config
  workdir: str | os.PathLike[str]
  state: TrainState
  train_step: step_lib.StepFunction
  place: Callable[[Mapping[str, np.ndarray]], objective.Batch]
  batches: Callable[[int], Iterator[HostBatch]]
  evaluate: Callable[[Any, Any], evaluate_lib.Evaluation] | None
  store: store_lib.Store

  def run(self) -> bool:
    """Trains to `train.num_steps`, from wherever the state is.

    Returns:
      True when done, False when stopped by a signal; both save first.
    """
    config = self.config.train
    step = int(self.state.step)
    reporter = reporter_lib.Reporter(
      self.workdir, start=step, total=config.num_steps
    )
    try:
      step = self._run_steps(step, reporter)
    finally:
      reporter.close()
    return step >= config.num_steps

  def _run_steps(self, step: int, reporter: reporter_lib.Reporter) -> int:
    """Runs until done or stopped, and saves; returns the steps done."""
    config = self.config.train
    saved = step
    batches = self.batches(step)
    window = _Window()
    with StopRequest() as stop:
      while step < config.num_steps and stop.signal is None:
        step += 1
        self._advance(batches, window)
        reporter.advance(step)
        if step == 1 or step % config.log_every == 0:
          self._log(step, window, reporter)
          window = _Window()
        if step % config.save_every == 0 or step == config.num_steps:
          self._save(step, reporter)
          saved = step
          window = _Window()
    if saved != step:
      self._save(step, reporter, evaluate=False)
    self.store.wait()
    return step

  def _advance(self, batches: Iterator[HostBatch], window: _Window) -> None:
    """Dispatches one step; nothing is fetched, so the next can overlap."""
    before = time.monotonic()
    host = next(batches)
    window.waited += time.monotonic() - before
    self._note_skips(host)
    self.state, metrics = self.train_step(self.state, self.place(host.arrays))
    window.metrics.append(metrics)
    window.seconds += host.seconds

  def _note_skips(self, host: HostBatch) -> None:
    if not host.skipped:
      return
    path = pathlib.Path(self.workdir) / 'skipped.jsonl'
    with path.open('a', encoding='utf-8') as lines:
      for skip in host.skipped:
        lines.write(json.dumps(dataclasses.asdict(skip)) + '\n')

  def _log(
    self, step: int, window: _Window, reporter: reporter_lib.Reporter
  ) -> None:
    merged = None
    for metrics in window.metrics:
      merged = metrics_lib.merge(merged, jax.device_get(metrics))
    values: dict[str, Any] = dict(metrics_lib.compute(merged or {}))
    spent = time.monotonic() - window.begun
    values['audio_seconds_per_second'] = window.seconds / spent
    values['data_wait_share'] = window.waited / spent
    reporter.write(step, 'train', values)
    reporter.say(
      step,
      f'loss {values["loss"]:.3f} | ctc {values["loss_ctc"]:.3f} | '
      f'grad {values["gradient_norm"]:.2f} | '
      f'lr {values["learning_rate"]:.2e} | '
      f'{values["audio_seconds_per_second"]:.0f} audio-s/s',
    )
    if not np.isfinite(values['loss']) and not self.config.train.skip_nonfinite:
      raise TrainingError(
        f'the loss is {values["loss"]} at step {step}; lower '
        'optimizer.learning_rate or set train.skip_nonfinite'
      )

  def _save(
    self, step: int, reporter: reporter_lib.Reporter, *, evaluate: bool = True
  ) -> None:
    wer = None
    if evaluate and self.evaluate is not None:
      result = self.evaluate(self.state.params, self.state.buffers)
      wer = result.wer
      reporter.write(step, 'dev', {**result.losses, 'wer': wer})
      reporter.say(
        step, f'dev loss {result.losses["loss"]:.3f} | dev WER {wer:.2f} %'
      )
    self.store.save(
      step,
      params=self.state.params,
      buffers=self.state.buffers,
      opt_state=self.state.opt_state,
      progress={'step': step, 'batch': step},
      wer=wer,
    )
