"""The script: exit codes, one line for bad input."""

import pathlib
import subprocess
import sys

import pytest

from data_pipelines import synthetic
from data_pipelines import tfds_dataset

_ROOT = pathlib.Path(__file__).parents[2]


def _run(*flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'experiments.prepare_corpus', *flags]
  return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)


def test_manifests_become_splits(tmp_path):
  train = synthetic.write_corpus(tmp_path / 'a', num_utterances=2, seed=1)
  test = synthetic.write_corpus(tmp_path / 'b', num_utterances=1, seed=2)
  flags = (f'--source=manifest:{train}', f'--test={test}')
  run = _run(*flags, f'--out={tmp_path}/out')
  assert run.returncode == 0, run.stderr
  assert tfds_dataset.splits(tmp_path / 'out') == ['train', 'test']
  again = _run(*flags, f'--out={tmp_path}/out')
  assert again.returncode == 0
  assert 'nothing to do' in again.stdout


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('manifest:{}/none.jsonl', 'none.jsonl: no such manifest'),
    ('tapes', '--source=tapes is not known'),
  ],
)
def test_bad_input_is_one_line_and_code_2(source, message, tmp_path):
  run = _run(f'--source={source.format(tmp_path)}', f'--out={tmp_path}/out')
  assert run.returncode == 2
  assert run.stderr.startswith('error: ')
  assert message in run.stderr
  assert len(run.stderr.splitlines()) == 1
  assert not list(tmp_path.iterdir())
