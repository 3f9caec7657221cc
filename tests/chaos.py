"""Kills a training again and again; what it computes must not change.

  python -m tests.chaos --kills=20 --workdir=DIR     (or: make chaos)

A small model is trained once without disturbance, and once killed at random
moments: while it starts, compiles, steps, saves, evaluates or tidies up. Then
the final parameters must be equal bit for bit, the averaged model too, and
every step must have seen the same utterances.
"""

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
_NUM_UTTERANCES = 16
_STEPS_PER_KILL = 30


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
  """Writes a corpus of tones; returns its manifest."""
  from data_pipelines import synthetic

  return synthetic.write_corpus(folder, num_utterances=_NUM_UTTERANCES, seed=1)


def train_flags(
  manifest: pathlib.Path, workdir: pathlib.Path, **changes: object
) -> list[str]:
  """Flags of `experiments.train` for a model that trains in seconds.

  Args:
    manifest: of training and dev.
    workdir: of the run.
    changes: config keys, with `__` for the dots.
  """
  keys = {
    'data.train': manifest,
    'data.dev': manifest,
    'model.encoder.num_blocks': 1,
    'model.encoder.moe.num_experts': 0,
    'model.decoder.moe.num_experts': 0,
    'model.decoder.num_blocks': 0,
    'model.decoder.num_reverse_blocks': 0,
    'train.num_steps': 12,
    'train.save_every': 3,
    'train.log_every': 3,
    **{key.replace('__', '.'): value for key, value in changes.items()},
  }
  return [
    '--config=experiments/configs/tiny.py',
    f'--workdir={workdir}',
    '--log_keys',
    *(f'--config.{key}={value}' for key, value in keys.items()),
  ]


def keys_by_step(
  workdir: pathlib.Path, name: str = 'keys.jsonl'
) -> dict[int, list[str]]:
  """The utterances of each step.

  Args:
    workdir: of the run.
    name: of the file; each host has its own.

  Raises:
    AssertionError: if a step was done twice, with different utterances.
  """
  found: dict[int, list[str]] = {}
  for line in (workdir / name).read_text('utf-8').splitlines():
    record = json.loads(line)
    step, keys = record['step'], record['keys']
    assert found.setdefault(step, keys) == keys, f'step {step} differs'
  return dict(sorted(found.items()))


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
  """What differs between two finished runs; empty if nothing does."""
  from u2moe_jax.checkpoint import directory

  wrong = []
  if keys_by_step(a) != keys_by_step(b):
    wrong.append('the utterances of the steps')
  newest = [directory.step_folders(workdir)[-1] for workdir in (a, b)]
  if newest[0].name != newest[1].name:
    wrong.append(f'the last step, {newest[0].name} and {newest[1].name}')
  pairs = {'the parameters': newest, 'the model': [a / 'model', b / 'model']}
  for name, folders in pairs.items():
    if not _equal(*(directory.restore(directory.find(f)) for f in folders)):
      wrong.append(name)
  return wrong


def _equal(a: object, b: object) -> bool:
  import jax
  import numpy as np

  same = jax.tree.map(
    # As bytes: not even the sign of a zero may differ.
    lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(),
    a,
    b,
  )
  return all(jax.tree.leaves(same))


def _start(arguments: Sequence[str], folder: pathlib.Path) -> subprocess.Popen:
  environment = {
    **os.environ,
    # One cache for all starts, of small programs too; else most kills would hit
    # compilation.
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  with (folder / 'log.txt').open('a', encoding='utf-8') as log:
    return subprocess.Popen(
      [sys.executable, '-m', 'experiments.train', *arguments],
      cwd=ROOT,
      env=environment,
      stdout=log,
      stderr=subprocess.STDOUT,
    )


def _last_step(workdir: pathlib.Path) -> int:
  steps = keys_by_step(workdir) if (workdir / 'keys.jsonl').exists() else {}
  return max(steps, default=0)


def _finish(arguments: Sequence[str], folder: pathlib.Path) -> float:
  """Trains to the end; returns the seconds."""
  begun = time.monotonic()
  code = _start(arguments, folder).wait()
  if code:
    raise RuntimeError(f'exit code {code}; see {folder / "log.txt"}')
  return time.monotonic() - begun


def _kill_at_first_step(
  arguments: Sequence[str], folder: pathlib.Path, workdir: pathlib.Path
) -> float:
  """Kills a training as soon as it steps; returns the seconds until then."""
  begun = time.monotonic()
  process = _start(arguments, folder)
  while process.poll() is None and not (workdir / 'keys.jsonl').exists():
    time.sleep(0.01)
  process.kill()
  process.wait()
  return time.monotonic() - begun


def run(folder: pathlib.Path, *, kills: int, seed: int) -> list[str]:
  """Does it all in a folder; returns the differences."""
  manifest = write_corpus(folder / 'corpus')
  num_steps = _STEPS_PER_KILL * kills
  long = {'train__num_steps': num_steps, 'train__save_every': 20}
  reference, victim = folder / 'reference', folder / 'victim'
  whole = _finish(train_flags(manifest, reference, **long), folder)
  print(f'undisturbed: {num_steps} steps in {whole:.1f} s', flush=True)
  arguments = train_flags(manifest, victim, **long)
  startup = _kill_at_first_step(arguments, folder, victim)
  print(f'1: killed at the first step, after {startup:.1f} s', flush=True)
  # While it starts, or steps, and seldom so late that nothing is left to do.
  stepping = max(whole - startup, 1.0) * 1.5 / kills
  rng = random.Random(seed)
  for number in range(2, kills + 1):
    delay = rng.uniform(0.3 * startup, startup + stepping)
    process = _start(arguments, folder)
    try:
      code = process.wait(delay)
      print(f'{number}: ended with {code} before it could be killed')
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      print(
        f'{number}: killed after {delay:.1f} s, at step {_last_step(victim)}',
        flush=True,
      )
  _finish(arguments, folder)
  return differences(reference, victim)


def main() -> None:
  """Exit code 0 if nothing differs, 1 otherwise."""
  # Not absl: `experiments.train`, whose flags are tested, has a --workdir too.
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--workdir', help='folder; a temporary one if not given')
  options = parser.parse_args()
  folder = options.workdir or tempfile.mkdtemp(prefix='chaos-')
  path = pathlib.Path(folder).absolute()
  path.mkdir(parents=True, exist_ok=True)
  wrong = run(path, kills=options.kills, seed=options.seed)
  print(f'{path}: ' + ('different: ' + ', '.join(wrong) if wrong else 'equal'))
  sys.exit(bool(wrong))


if __name__ == '__main__':
  main()
