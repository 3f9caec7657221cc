"""Runs `experiments.train` many times in forks of one process; no test itself.

  python -m tests.experiments.killed_runs FOLDER

Importing JAX and Orbax takes longer than the small trainings of
`killed_run_test.py`, so it is done once. Each attempt is the script's own
`main`, with its flags, in a process of its own, which ends as a user's would:
by an exit code or a signal. They are written to FOLDER/attempts.json.
"""

from collections.abc import Callable
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import sys
import traceback

from absl import logging
import jax

from experiments import train
from experiments.wiring import command
from experiments.wiring import training  # so that no attempt imports it
from tests import chaos
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.training import evaluate
from u2moe_jax.training import loop

# More than the logs of a run, less than the arrays of a checkpoint.
_FILE_LIMIT = 24 * 1024


def _kill() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: object, name: str, act: Callable[..., None]) -> None:
  """Calls `act` with the arguments of a function before it runs."""
  original = getattr(owner, name)

  def replaced(*args, **kwargs):
    act(*args, **kwargs)
    return original(*args, **kwargs)

  setattr(owner, name, replaced)


def nothing() -> None:
  """Lets it run."""


def kill_in_step_5() -> None:
  """SIGKILL in a step."""
  _kill_in_step(5)


def kill_in_step_8() -> None:
  """SIGKILL in a step."""
  _kill_in_step(8)


def _kill_in_step(step: int) -> None:
  def act(self, dispatched):
    if dispatched.step == step:
      self.store.wait()  # or it is chance which save was the last
      _kill()

  _before(loop.Trainer, '_take', act)


def kill_in_save() -> None:
  """SIGKILL while step 6 is being saved: written, and not yet renamed."""

  def act(event, args):
    if event == 'os.rename' and str(args[1]).endswith('/checkpoints/6'):
      _kill()

  sys.addaudithook(act)


def term_in_evaluation() -> None:
  """SIGTERM after the first batch of an evaluation."""

  def act(*_):
    os.kill(os.getpid(), signal.SIGTERM)

  _before(evaluate, '_collapse', act)


def full_disk() -> None:
  """No file may grow beyond a limit once step 6 is being saved."""

  def act(self, step, **_):
    if step == 6:
      self.wait()
      limits = (_FILE_LIMIT, resource.RLIM_INFINITY)
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)

  _before(store_lib.Store, 'save', act)


_MODULES = (training,)


def start(
  folder: pathlib.Path, name: str, arguments: list[str], patch: Callable
) -> int:
  """Starts the script in a fork; returns its process."""
  sys.stdout.flush()
  child = os.fork()
  if child:
    return child
  code = 1
  try:
    log = os.open(folder / f'{name}.txt', os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    patch()
    sys.argv = ['train', *arguments]
    command.run(train.main)
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else 1
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    if jax.distributed.is_initialized():
      jax.distributed.shutdown()  # as JAX does when a script ends
    os._exit(code)


def end(child: int) -> int:
  """Waits for a process; returns its exit code, or minus its signal."""
  _, status = os.waitpid(child, 0)
  return os.waitstatus_to_exitcode(status)


def start_hosts(
  folder: pathlib.Path, name: str, arguments: list[str], *, count: int
) -> list[int]:
  """Starts the script as if on several hosts, which are processes here."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'

  def join(index):
    return lambda: jax.distributed.initialize(address, count, index)

  return [
    start(folder, f'{name}_{index}', arguments, join(index))
    for index in range(count)
  ]


def forget(workdir: pathlib.Path, step: int) -> None:
  """Takes a run back to before a step was saved."""
  shutil.rmtree(workdir / 'checkpoints' / str(step))
  shutil.rmtree(workdir / 'model')
  (workdir / 'keys.jsonl').unlink()


def truncate_newest(workdir: pathlib.Path) -> int:
  """Empties the files with arrays of the newest checkpoint; returns its step."""
  folders = (workdir / 'checkpoints').iterdir()
  newest = max(int(f.name) for f in folders if f.name.isdigit())
  params = workdir / 'checkpoints' / str(newest) / 'params'
  # All of them: some hold what was written twice, and are not missed.
  data = list((params / 'ocdbt.process_0' / 'd').iterdir())
  assert data
  for file in data:
    os.truncate(file, 0)
  return newest


def main(folder: pathlib.Path) -> None:
  """Runs all attempts, one after the other."""
  logging.use_absl_handler()
  manifest = chaos.write_corpus(folder / 'corpus')
  codes: dict[str, int] = {}

  def go(name, workdir, patch, **changes):
    arguments = chaos.train_flags(manifest, folder / workdir, **changes)
    codes[name] = end(start(folder, name, arguments, patch))

  go('undisturbed', 'reference', nothing)
  victim = folder / 'victim'
  for patch in (
    kill_in_step_5,
    kill_in_save,
    full_disk,
    term_in_evaluation,
    kill_in_step_8,
  ):
    go(patch.__name__, 'victim', patch)
  codes['truncated_step'] = truncate_newest(victim)
  go('after_truncation', 'victim', nothing)

  go('alone', 'alone', nothing, train__num_steps=6)
  shutil.copytree(folder / 'alone', folder / 'pair')
  forget(folder / 'pair', 6)
  arguments = chaos.train_flags(
    manifest, folder / 'pair', mesh__data=2, train__num_steps=6
  )
  hosts = start_hosts(folder, 'pair', arguments, count=2)
  for index, child in enumerate(hosts):
    codes[f'pair_{index}'] = end(child)
  text = json.dumps(codes, indent=1)
  (folder / 'attempts.json').write_text(text, encoding='utf-8')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
