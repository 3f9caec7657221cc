"""The launch script, with stand-ins for SLURM's programs."""

import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / 'launch' / 'slurm.sh'


def _start(tmp_path, *arguments, code=0, job='77'):
  """Runs the script where `srun` ends with a code; returns what was called."""
  log = tmp_path / 'calls'
  log.touch()
  for name, result in (('srun', code), ('scontrol', 0)):
    program = tmp_path / name
    program.write_text(
      f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >> {log}\nexit {result}\n'
    )
    program.chmod(0o755)
  environment = {
    **os.environ,
    'PATH': f'{tmp_path}:{os.environ["PATH"]}',
    'PYTHON': 'python9',
    'SLURM_JOB_ID': job,
  }
  done = subprocess.run(
    ['bash', str(SCRIPT), *arguments],
    env=environment,
    capture_output=True,
    text=True,
  )
  return done, log.read_text().splitlines()


def test_every_task_trains_with_the_flags_as_given(tmp_path):
  done, calls = _start(tmp_path, '--config=x.py', '--workdir=a b')
  assert done.returncode == 0, done.stderr
  (call,) = calls
  assert call.endswith(
    'python9 -m experiments.train --config=x.py --workdir=a b'
  )


@pytest.mark.parametrize('code', [3, 1, 5])
def test_only_a_run_that_was_stopped_is_queued_again(tmp_path, code):
  done, calls = _start(tmp_path, '--config=x.py', code=code)
  assert done.returncode == code
  assert ('scontrol requeue 77' in calls) == (code == 3)


@pytest.mark.parametrize(
  ('arguments', 'job', 'told'),
  [((), '77', 'usage'), (('--config=x.py',), '', 'sbatch')],
)
def test_misuse_is_told_and_starts_nothing(tmp_path, arguments, job, told):
  done, calls = _start(tmp_path, *arguments, job=job)
  assert done.returncode == 2
  assert told in done.stderr
  assert not calls
