"""Work in processes: every result once, and no waiting for the dead."""

import importlib

import pytest

from data_pipelines import processes

# Other processes import what they do by its name.
_WORK = """
import os

def double(item, tick):
  tick()
  tick()
  return 2 * item

def fail(item, tick):
  raise KeyError(item)

def die(item, tick):
  os._exit(9)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
  (tmp_path / 'processes_test_work.py').write_text(_WORK)
  monkeypatch.syspath_prepend(tmp_path)
  return importlib.import_module('processes_test_work')


@pytest.mark.parametrize('num_workers', [0, 2])
def test_every_item_has_its_result(work, num_workers):
  counts = []
  results = processes.run(
    work.double, range(9), num_workers=num_workers, on_progress=counts.append
  )
  assert sorted(results) == [2 * item for item in range(9)]
  assert counts == sorted(counts)
  assert counts[-1] <= 18
  if not num_workers:
    assert counts == list(range(1, 19))


def _run(work, num_workers=2):
  return list(
    processes.run(
      work, range(4), num_workers=num_workers, on_progress=lambda _: None
    )
  )


def test_an_error_comes_through(work):
  with pytest.raises(KeyError):
    _run(work.fail)
  with pytest.raises(KeyError):
    _run(work.fail, num_workers=0)


def test_a_process_that_dies_is_noticed(work):
  with pytest.raises(processes.WorkerError, match='died'):
    _run(work.die)


def test_who_stops_listening_stops_the_work(work):
  results = processes.run(
    work.double, range(50), num_workers=2, on_progress=lambda _: None
  )
  assert next(results) % 2 == 0
  results.close()  # returns, and leaves no process behind
