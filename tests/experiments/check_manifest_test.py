"""The script: a report, a cleaned manifest, one line of JSON, exit codes."""

import json
import pathlib
import subprocess
import sys

from data_pipelines import manifest
from data_pipelines import synthetic

_ROOT = pathlib.Path(__file__).parents[2]


def _run(*flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'experiments.check_manifest', *flags]
  return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)


def test_good_and_bad_are_told_apart(tmp_path):
  path = synthetic.write_corpus(tmp_path, num_utterances=3, seed=1)
  with path.open('a') as file:
    file.write('{"key": "none", "wav": "none.wav", "txt": "A"}\nno json\n')
  run = _run(f'--source={path}', f'--out={tmp_path}/clean.jsonl')
  assert run.returncode == 0, run.stderr
  counts = json.loads(run.stdout.splitlines()[-1])
  assert counts['utterances'] == 5
  assert counts['usable'] == 3
  assert counts['reasons'] == {'missing': 1, 'bad_line': 1}
  assert 'none.wav: no such audio file' in run.stdout
  cleaned = manifest.read(tmp_path / 'clean.jsonl')
  assert [u.key for u in cleaned] == [f'tones-1-000{i}' for i in range(3)]


def test_limits_come_from_the_experiment_and_from_flags(tmp_path):
  path = synthetic.write_corpus(tmp_path, num_utterances=3, seed=1)
  run = _run(
    f'--source={path}',
    '--config=experiments/configs/tiny.py',
    '--max_seconds=0.2',
    '--nodecode',
  )
  assert run.returncode == 1
  counts = json.loads(run.stdout.splitlines()[-1])
  assert counts['reasons'] == {'too_long': 3}


def test_bad_input_is_one_line_and_code_2(tmp_path):
  run = _run(f'--source={tmp_path}/none.jsonl')
  assert run.returncode == 2
  assert 'none.jsonl: no such manifest' in run.stderr
  assert len(run.stderr.splitlines()) == 1
