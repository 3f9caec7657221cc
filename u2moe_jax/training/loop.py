"""The host loop: next batch, step, log, evaluate, save. No maths."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from typing import Any
from typing import Protocol

import jax
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import processes
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.training import errors
from u2moe_jax.training import evaluate as evaluate_lib
from u2moe_jax.training import idle_experts
from u2moe_jax.training import json_lines
from u2moe_jax.training import memory
from u2moe_jax.training import metrics as metrics_lib
from u2moe_jax.training import objective
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import profiling
from u2moe_jax.training import programs as programs_lib
from u2moe_jax.training import reporter as reporter_lib
from u2moe_jax.training import skips as skips_lib
from u2moe_jax.training import step as step_lib
from u2moe_jax.training import stopping
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
  def skipped(self) -> Sequence[skips_lib.Skip]:
    """Utterances whose rows stayed empty."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What is asked of one call, and is no part of the experiment.

  Attributes:
    profile_steps: first and last step of a profiler trace.
    log_keys: write the utterances of every step to keys.jsonl.
  """

  profile_steps: tuple[int, int] | None = None
  log_keys: bool = False


@dataclasses.dataclass
class Counters:
  """Sums over a whole run, restarts included; saved with each step.

  Attributes:
    skipped_updates: steps whose loss or gradient was not finite.
    audio_seconds: sound trained on.
    seconds: time spent on steps, neither evaluating nor saving.
  """

  skipped_updates: int = 0
  audio_seconds: float = 0.0
  seconds: float = 0.0

  @classmethod
  def of(cls, progress: Mapping[str, Any]) -> 'Counters':
    """Picks them out of what was saved; 0 where an old run had none."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: progress[name] for name in names if name in progress})


@dataclasses.dataclass
class _Window:
  """What happened since the last line."""

  metrics: step_lib.Metrics | None = None
  seconds: float = 0.0
  waited: float = 0.0
  num_flops: float = 0.0
  num_steps: int = 0
  begun: float = dataclasses.field(default_factory=time.monotonic)
  counted: float = 0.0  # of its time, in `Counters.seconds` already

  @property
  def spent(self) -> float:
    return time.monotonic() - self.begun


@dataclasses.dataclass
class _Rows:
  """What this host knows of its rows, and the others do not yet."""

  seconds: float = 0.0
  skipped: list[skips_lib.Skip] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Dispatched:
  """A step whose results nobody has looked at yet."""

  step: int
  keys: Sequence[str]
  shape: programs_lib.Shape | None
  metrics: step_lib.Metrics


@dataclasses.dataclass
class Trainer:
  """One run.

  Attributes:
    config: the experiment.
    workdir: where everything is written.
    state: the training state, placed.
    train_step: see `step.make_train_step`, or `programs.Programs` of it.
    place: host arrays to a placed `objective.Batch`.
    batches: number of the first batch to an endless iterator.
    evaluate: parameters, buffers and a function that says whether to stop, to
      dev results, or None if stopped; None for no dev set.
    store: checkpoints.
    skips: where utterances are noted that are left out; None for nowhere.
    counters: sums so far.
    options: of this call.
    num_flops: operations of a step by batch shape; None if unknown.
    peak_flops: operations a second of all devices at best; None if unknown.
  """

  config: config_lib.Config
  workdir: str | os.PathLike[str]
  state: TrainState
  train_step: step_lib.StepFunction
  place: Callable[[Mapping[str, np.ndarray]], objective.Batch]
  batches: Callable[[int], Iterator[HostBatch]]
  evaluate: (
    Callable[[Any, Any, Callable[[], bool]], evaluate_lib.Evaluation | None]
    | None
  )
  store: store_lib.Store
  skips: skips_lib.SkipLog | None = None
  counters: Counters = dataclasses.field(default_factory=Counters)
  options: Options = Options()
  num_flops: Callable[[programs_lib.Shape], float] | None = None
  peak_flops: float | None = None

  def __post_init__(self) -> None:
    self._pending: _Dispatched | None = None
    self._nonfinite: list[_Dispatched] = []
    self._window = _Window()
    self._rows = _Rows()
    self._stop = stopping.StopRequest()
    self._idle_experts = idle_experts.IdleExperts(0)

  def run(self, stop: stopping.StopRequest | None = None) -> bool:
    """Trains to `train.num_steps`, from wherever the state is.

    Args:
      stop: listens already; None listens only while this runs.

    Returns:
      True when done, False when asked to stop; both save first.

    Raises:
      errors.NonfiniteError: if numbers stay no numbers.
      skips_lib.BadDataError: if too much data cannot be used; saves first.
      errors.OutOfMemoryError: if a step needs more than there is.
      store_lib.SaveError: if a checkpoint cannot be written.
    """
    step = int(self.state.step)
    reporter = reporter_lib.Reporter(
      self.workdir, start=step, total=self.config.train.num_steps
    )
    # Of a run that was killed in the middle of a line.
    json_lines.forget_torn_line(self._own_path('keys.jsonl'))
    profiler = profiling.Profiler(self.workdir, self.options.profile_steps)
    context = stop or stopping.StopRequest()
    with (
      contextlib.closing(reporter),
      contextlib.closing(profiler),
      context if stop is None else contextlib.nullcontext(),
    ):
      self._stop = context
      return self._run_steps(step, reporter, profiler)

  def _run_steps(
    self,
    step: int,
    reporter: reporter_lib.Reporter,
    profiler: profiling.Profiler,
  ) -> bool:
    """Runs until done, stopped or out of data, saves; returns whether done."""
    try:
      return self._run_until_stopped(step, reporter, profiler)
    except skips_lib.BadDataError:
      # The parameters are good: whoever allows more goes on from here.
      self._take_pending()
      self.store.wait()
      trained = int(self.state.step)
      if trained and trained != self.store.latest_step():
        self._save(trained)
        self.store.wait()
      raise

  def _run_until_stopped(
    self,
    step: int,
    reporter: reporter_lib.Reporter,
    profiler: profiling.Profiler,
  ) -> bool:
    """`_run_steps` while the data lasts."""
    config = self.config.train
    if self._owes_evaluation(step):
      self._catch_up(step, reporter)
    saved = step
    self._idle_experts = idle_experts.IdleExperts(
      config.idle_expert_steps,
      start=step,
      blocks=self.config.model.expert_blocks,
    )
    batches = self.batches(step)
    self._window = _Window()
    while step < config.num_steps and not self._stop.asked_after(step):
      step += 1
      profiler.before(step)
      self._advance(step, batches)
      profiler.after(step, self.state.step)
      reporter.advance(step)
      if step == 1 or step % config.log_every == 0:
        self._log(step, reporter)
      if self._is_save(step):
        # Its results belong to the counters that are saved with it.
        self._take_pending()
        before = time.monotonic()
        self._save(step, wer=self._evaluate(step, reporter))
        saved = step
        # Neither evaluating nor saving is training.
        self._window.begun += time.monotonic() - before
    self._take_pending()
    if saved != step:
      self._save(step)
    self.store.wait()
    # A signal during the last evaluation leaves that to the next run.
    return step >= config.num_steps and not self._owes_evaluation(step)

  def _is_save(self, step: int) -> bool:
    config = self.config.train
    return step % config.save_every == 0 or step == config.num_steps

  def _owes_evaluation(self, step: int) -> bool:
    """Whether a step was saved without the evaluation it should have."""
    if self.evaluate is None or not step or not self._is_save(step):
      return False
    return self.store.wer(step) is None

  def _catch_up(self, step: int, reporter: reporter_lib.Reporter) -> None:
    wer = self._evaluate(step, reporter)
    if wer is not None:
      self.store.set_wer(step, wer)

  def _advance(self, step: int, batches: Iterator[HostBatch]) -> None:
    """Dispatches one step, then looks at the results of the one before."""
    before = time.monotonic()
    host = next(batches)
    self._window.waited += time.monotonic() - before
    self._rows.seconds += host.seconds
    self._rows.skipped += host.skipped
    # With several hosts this is a message among them, too dear for each step:
    # they share when a line is logged and when a step is saved.
    if jax.process_count() == 1:
      self._share_rows()
    if self.options.log_keys:
      record = {'step': step, 'keys': list(host.keys)}
      json_lines.append(self._own_path('keys.jsonl'), [record])
    batch = self.place(host.arrays)
    shape = None
    if self.num_flops is not None:
      shape = programs_lib.Shape.of(batch.features, batch.labels)
      self._window.num_flops += self.num_flops(shape)
    with _explained(shape):
      self.state, metrics = self.train_step(self.state, batch)
    # Dispatched is not done. To fetch these results now would leave the device
    # idle until the next step comes; those of the step before are there soon.
    previous = self._pending
    self._pending = _Dispatched(step, host.keys, shape, metrics)
    if previous is not None:
      self._take(previous)

  def _own_path(self, name: str) -> pathlib.Path:
    return processes.own_path(pathlib.Path(self.workdir) / name)

  def _share_rows(self) -> None:
    """Adds up what the hosts know; each must come here behind the same step.

    Every process then has the same counters, and stops for the same reason.
    """
    own, self._rows = self._rows, _Rows()
    seconds = sum(processes.gather(own.seconds))
    self._window.seconds += seconds
    self.counters.audio_seconds += seconds
    if self.skips is not None:
      self.skips.add(skips_lib.shared(own.skipped))

  def _take_pending(self) -> None:
    """Waits for the step that was dispatched last; the counters are whole."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self._take(pending)
    spent = self._window.spent
    self.counters.seconds += spent - self._window.counted
    self._window.counted = spent

  def _take(self, dispatched: _Dispatched) -> None:
    """Fetches the results of a step, and counts what is not finite."""
    with _explained(dispatched.shape):
      metrics = jax.device_get(dispatched.metrics)
    window = self._window
    window.metrics = metrics_lib.merge(window.metrics, metrics)
    window.num_steps += 1
    if not _is_nonfinite(metrics):
      self._nonfinite.clear()
      return
    self.counters.skipped_updates += 1
    self._nonfinite.append(dispatched)
    config = self.config.train
    # Updates that are not skipped have spoiled the parameters with the first.
    most = config.max_nonfinite if config.skip_nonfinite else 1
    if most and len(self._nonfinite) >= most:
      self._give_up()

  def _give_up(self) -> None:
    """Saves which utterances it was, and stops."""
    path = self._own_path('nonfinite.json')
    batches = [
      {'step': each.step, 'keys': list(each.keys)} for each in self._nonfinite
    ]
    path.write_text(json.dumps(batches, indent=1) + '\n', encoding='utf-8')
    first, last = self._nonfinite[0].step, self._nonfinite[-1].step
    steps = f'step {first}' if first == last else f'steps {first} to {last}'
    raise errors.NonfiniteError(
      f'the loss or the gradient of {steps} is not finite; the utterances are '
      f'named in {path}; lower optimizer.learning_rate or '
      'optimizer.clip_norm, or look at those utterances '
      '(train.skip_nonfinite, train.max_nonfinite)'
    )

  def _log(self, step: int, reporter: reporter_lib.Reporter) -> None:
    self._take_pending()
    self._share_rows()
    # Saves run in the background: a full disk shows here, not at the end.
    self.store.check()
    window, self._window = self._window, _Window()
    spent = window.counted  # all of it: `_take_pending` has just counted
    values: dict[str, Any] = dict(metrics_lib.compute(window.metrics or {}))
    values |= reporter_lib.expert_load(values)
    values['audio_seconds_per_second'] = window.seconds / spent
    values['data_wait_share'] = window.waited / spent
    values['steps_per_second'] = window.num_steps / spent
    values['skipped_updates'] = self.counters.skipped_updates
    values['skipped_utterances'] = self.skips.total if self.skips else 0
    if window.num_flops:
      values['flops_per_second'] = window.num_flops / spent
      if self.peak_flops:
        values['mfu'] = window.num_flops / spent / self.peak_flops
    reporter.write(step, 'train', values)
    reporter.say(step, reporter_lib.train_line(values))
    # Where every update was skipped nothing was counted, loads neither.
    if values.get('skipped', 0.0) < 1.0:
      alarm = self._idle_experts.update(step, values)
      if alarm is not None:
        reporter.say(step, alarm)

  def _evaluate(
    self, step: int, reporter: reporter_lib.Reporter
  ) -> float | None:
    """The dev WER; None without a dev set, or if asked to stop."""
    if self.evaluate is None:
      return None
    params, _ = self._to_decode()
    result = self.evaluate(params, self.state.buffers, self._stop.asked)
    if result is None:
      reporter.say(step, 'evaluation stopped; it is done when continuing')
      return None
    reporter.write(step, 'dev', {**result.losses, 'wer': result.wer})
    reporter.say(
      step,
      f'dev loss {result.losses["loss"]:.3f} | dev WER {result.wer:.2f} %',
    )
    return result.wer

  def _to_decode(self) -> tuple[Any, Any]:
    """Parameters to decode with, and the state with the others in it."""
    return optimizer_lib.swap_average(self.state.params, self.state.opt_state)

  def _save(self, step: int, *, wer: float | None = None) -> None:
    self._share_rows()
    params, opt_state = self._to_decode()
    counters = dataclasses.asdict(self.counters)
    self.store.save(
      step,
      params=params,
      buffers=self.state.buffers,
      opt_state=opt_state,
      progress={'step': step, 'batch': step, **counters},
      wer=wer,
    )


def _is_nonfinite(metrics: step_lib.Metrics) -> bool:
  # A skipped step has a loss of 0 with a count of 0, so the loss cannot tell.
  if 'skipped' in metrics and float(metrics['skipped'].total) > 0:
    return True
  return not np.isfinite(float(metrics['loss'].total))


@contextlib.contextmanager
def _explained(shape: programs_lib.Shape | None) -> Iterator[None]:
  """Says which bucket it was, if memory runs out."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    # Without operations to count nobody has noted the shape.
    if shape is None:
      raise
    raise memory.explain(error, 'train', shape) from error
