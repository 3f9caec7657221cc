"""Warm timing: what a call costs once everything is compiled."""

from collections.abc import Callable
import functools
import time
from typing import TypeVar

import jax

_T = TypeVar('_T')
# JAX reports it whenever the backend has made a program.
_COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'
_MOST_CALLS = 5
_compilations = 0


def _count(event: str, duration: float, **_: object) -> None:
  global _compilations
  del duration
  _compilations += event == _COMPILE_EVENT


@functools.cache
def _listen() -> None:
  # Once a process, hence the cache: a second listener would count twice.
  jax.monitoring.register_event_duration_secs_listener(_count)


def num_compilations() -> int:
  """Programs compiled since the first call of this function."""
  _listen()
  return _compilations


def warm(function: Callable[[], _T]) -> tuple[_T, float]:
  """Calls a function; again if the call compiled something.

  Args:
    function: without side effects, returning host values.

  Returns:
    Its result, and the seconds of a call that compiled nothing; of the last
    one if each compiled something.
  """
  # As a rule twice: the second call finds all programs made. What compiles in
  # every call has no warm time, and must not be called for ever.
  for _ in range(_MOST_CALLS):
    before = num_compilations()
    begun = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - begun
    if num_compilations() == before:
      break
  return result, seconds
