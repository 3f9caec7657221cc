"""Work shared out among processes, whose results come as they are ready."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent import futures
import itertools
import multiprocessing
from multiprocessing import connection
import os
import signal
import threading
from typing import Any
from typing import TypeVar

_Item = TypeVar('_Item')
_Result = TypeVar('_Result')
_Tick = Callable[[], None]
_POLL_SECONDS = 0.5
_AHEAD = 2  # items that wait for each worker, so that none waits for an item


class WorkerError(ValueError):
  """A process died; the message says what to do."""


def num_cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # not everywhere
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def run(
  work: Callable[[_Item, _Tick], _Result],
  items: Iterable[_Item],
  *,
  num_workers: int,
  on_progress: Callable[[int], None],
) -> Iterator[_Result]:
  """Does work in processes, or in this one.

  Args:
    work: called with an item and with a function to call now and then, which
      counts progress and raises where nobody waits for the result any more.
      It travels to the processes once, so it must be possible to pickle it.
    items: what to do; taken only when their turn comes, or nearly.
    num_workers: processes; 0 or 1 for none but this one.
    on_progress: called with how often that function was called by all.

  Yields:
    The results, as they are ready.

  Raises:
    WorkerError: if a process dies. What `work` raises comes through.
  """
  if num_workers <= 1:
    yield from _run_here(work, items, on_progress)
    return
  # Spawned and not forked: this process may hold threads, JAX's among them.
  context = multiprocessing.get_context('spawn')
  # Shared memory, so that progress costs no messages.
  counter, stop = context.Value('q', 0), context.Event()
  pool = futures.ProcessPoolExecutor(
    num_workers,
    mp_context=context,
    initializer=_start,
    initargs=(work, counter, stop),
  )
  try:
    # Items may hold a part of the corpus, so they are made as they are needed.
    todo = iter(items)
    first = itertools.islice(todo, _AHEAD * num_workers)
    waiting = {pool.submit(_do, item) for item in first}
    while waiting:
      # The time limit is for the progress, which moves within an item too.
      done, waiting = futures.wait(
        waiting, timeout=_POLL_SECONDS, return_when=futures.FIRST_COMPLETED
      )
      on_progress(counter.value)
      following = itertools.islice(todo, len(done))
      waiting |= {pool.submit(_do, item) for item in following}
      for future in done:
        yield future.result()
  except futures.BrokenExecutor:
    raise WorkerError(
      'a worker process died, for want of memory perhaps; run the same '
      'command again with fewer --workers'
    ) from None
  finally:
    stop.set()  # what is half done is given up
    pool.shutdown(cancel_futures=True)


def _run_here(
  work: Callable[[_Item, _Tick], _Result],
  items: Iterable[_Item],
  on_progress: Callable[[int], None],
) -> Iterator[_Result]:
  count = 0

  def tick() -> None:
    nonlocal count
    count += 1
    on_progress(count)

  for item in items:
    yield work(item, tick)


class _StoppedError(Exception):
  """Nobody waits for the result any more."""


# What a worker process was started with.
_started: dict[str, Any] = {}


def _start(work: Any, counter: Any, stop: Any) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  _started.update(work=work, counter=counter, stop=stop)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Ends this process when its parent has been killed."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    # Of a parent that is killed nobody tells its children; the sentinel does.
    connection.wait([parent.sentinel])
    # Not sys.exit, which would end this thread only.
    os._exit(1)


def _do(item: Any) -> Any:
  return _started['work'](item, _tick)


def _tick() -> None:
  if _started['stop'].is_set():
    raise _StoppedError
  with _started['counter'].get_lock():
    _started['counter'].value += 1
