"""Being asked to stop: signals, and the preemption notice of a cluster.

SIGTERM (every scheduler), SIGINT (Ctrl-C) and SIGUSR1 (SLURM, with
`--signal=USR1@120`) ask; the step, or the batch of an evaluation, is finished
and everything is saved. A second signal ends the process at once, whatever it
is doing.

With several hosts all must stop behind the same step. JAX agrees on one when
any of them gets SIGTERM, the notice of Cloud TPU and SLURM; the other signals
are passed on as SIGTERM.
"""

import os
import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
  """Turns the first signal into a flag; a second one ends the process.

  Attributes:
    signal: the number of the first one; None before.
  """

  def __init__(self) -> None:
    self.signal: int | None = None
    self._previous: dict[int, Any] = {}
    self._ends: tuple[int, int] | None = None
    self._previous_fd = -1

  def __enter__(self) -> 'StopRequest':
    for number in _SIGNALS:
      if number == signal.SIGTERM and jax.process_count() > 1:
        continue  # JAX's own handler agrees with the other hosts
      self._previous[number] = signal.signal(number, self._handle)
    self._watch()
    return self

  def _watch(self) -> None:
    """Starts a thread that sees signals even while Python does not run.

    Python calls handlers between two of its instructions, and compiling is
    one instruction that takes a minute.
    """
    reader, writer = os.pipe()
    # Python writes the number of each signal as one byte, and insists on an end
    # that does not block.
    os.set_blocking(writer, False)
    self._ends = reader, writer
    self._previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=self._read, args=(reader,), daemon=True).start()

  def _read(self, reader: int) -> None:
    seen = 0
    while number := os.read(reader, 1):
      if number[0] not in self._previous:
        continue
      seen += 1
      self.signal = self.signal or number[0]
      # Not an exception, which would wait for Python; the code is that of a
      # process which a signal has ended.
      if seen == 2:
        os._exit(128 + number[0])
    os.close(reader)

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._previous_fd)
    if self._ends is not None:
      os.close(self._ends[1])  # the thread reads an end, and ends

  def _handle(self, number: int, _: types.FrameType | None) -> None:
    self.signal = self.signal or number
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  @property
  def name(self) -> str:
    """What asked, in words."""
    if self.signal is None:
      return 'another host'
    return signal.Signals(self.signal).name

  @property
  def is_local(self) -> bool:
    """Whether this process may act on a signal without asking others."""
    return jax.process_count() == 1

  def asked(self) -> bool:
    """Whether to stop now, in the middle of something that can be repeated."""
    return self.is_local and self.signal is not None

  def asked_after(self, step: int) -> bool:
    """Whether to stop behind a step; each host must ask after each step."""
    if self.is_local:
      return self.signal is not None
    return multihost_utils.reached_preemption_sync_point(step)
