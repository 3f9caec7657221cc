"""A profiler trace of some steps, for TensorBoard or Perfetto."""

import os
import pathlib
import re

import jax


class Profiler:
  """Traces steps A to B, both included, into WORKDIR/profile."""

  def __init__(
    self, workdir: str | os.PathLike[str], steps: tuple[int, int] | None
  ):
    """Does nothing yet; with None it never will."""
    self._folder = pathlib.Path(workdir) / 'profile'
    self._steps = steps
    self._running = False

  def before(self, step: int) -> None:
    """Starts the trace, if this is the first step of it."""
    if self._steps and not self._running and step == self._steps[0]:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, metrics: object) -> None:
    """Ends the trace, if this was the last step of it.

    Args:
      step: the step that was dispatched.
      metrics: its results, which are waited for.
    """
    if self._running and self._steps and step >= self._steps[1]:
      # Steps are dispatched ahead: else the trace would end before they run.
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    """Ends the trace, if there is one."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      print(f'wrote a profiler trace of steps to {self._folder}', flush=True)


def parse_steps(text: str) -> tuple[int, int] | None:
  """Parses `A:B`; an empty text is None.

  Raises:
    ValueError: for anything else.
  """
  if not text:
    return None
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if match is None or not 1 <= int(match[1]) <= int(match[2]):
    raise ValueError(
      f'--profile_steps={text}: give first and last step, such as 20:24'
    )
  return int(match[1]), int(match[2])
