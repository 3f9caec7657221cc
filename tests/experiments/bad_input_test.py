"""Bad input ends a script with one line and a documented exit code."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.wiring import command

ROOT = pathlib.Path(__file__).parents[2]
TINY = '--config=experiments/configs/tiny.py'


def _run(*args):
  """Runs a script as a user does; returns (exit code, stderr lines)."""
  result = subprocess.run(
    [sys.executable, '-m', *map(str, args)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  return result.returncode, result.stderr.strip().splitlines()


def _train(*args):
  return _run('experiments.train', *args)


@pytest.fixture
def manifest(tmp_path):
  file = tmp_path / 'train.jsonl'
  file.write_text(json.dumps({'key': 'a', 'wav': 'a.wav', 'txt': 'ONE'}) + '\n')
  return file


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    ([], ['--config', '--workdir']),
    (
      [TINY, '--config.model.encoder.nope=3'],
      ['model.encoder.nope', 'ffn_dim'],
    ),
    ([TINY, '--config.model.encoder.num_heads=x'], ['num_heads']),
    (
      [TINY, '--config.model.encoder.num_heads=3'],
      ['num_heads=3', 'model_dim'],
    ),
    (['--config=experiments/configs/no.py'], ['no.py']),
    ([TINY, '--config.data.train=no.jsonl'], ['no.jsonl']),
    ([TINY, '--config.mesh.data=3'], ['data=3', 'shapes that fit']),
  ],
)
def test_train_names_what_is_wrong(args, words, tmp_path):
  workdir = tmp_path / 'work'
  if args:
    args = [*args, f'--workdir={workdir}']
  if not any('data.train' in arg for arg in args):
    args = [*args, '--config.data.train=x.jsonl'] if args else args
  code, lines = _train(*args)
  assert code == command.BAD_INPUT
  assert len(lines) == 1
  assert all(word in lines[0] for word in words), lines
  assert not (workdir / 'config.json').exists()


def test_a_manifest_line_that_is_not_json_is_named(tmp_path):
  file = tmp_path / 'train.jsonl'
  file.write_text('{"key": "a", "wav": "a.wav", "txt": "ONE"}\nnot json\n')
  code, lines = _train(
    TINY, f'--config.data.train={file}', f'--workdir={tmp_path / "work"}'
  )
  assert code == command.BAD_INPUT
  assert f'{file}:2' in lines[-1]


def test_nothing_usable_says_why(manifest, tmp_path):
  code, lines = _train(
    TINY,
    f'--config.data.train={manifest}',
    f'--workdir={tmp_path / "work"}',
  )
  assert code == command.BAD_INPUT
  assert 'missing' in lines[-1]


def test_a_folder_without_a_checkpoint_is_named(manifest, tmp_path):
  code, lines = _run(
    'experiments.decode', f'--checkpoint={tmp_path}', f'--manifest={manifest}'
  )
  assert code == command.BAD_INPUT
  assert len(lines) == 1
  assert str(tmp_path) in lines[0]
  assert 'model.json' in lines[0]


def test_a_newer_model_directory_is_refused(manifest, tmp_path):
  (tmp_path / 'model.json').write_text('{"format_version": 99}')
  code, lines = _run(
    'experiments.decode', f'--checkpoint={tmp_path}', f'--manifest={manifest}'
  )
  assert code == command.BAD_INPUT
  assert '99' in lines[0]


@pytest.mark.parametrize(
  ('flag', 'word'),
  [
    ('--chunk_size=-7', 'chunk_size'),
    ('--mode=x', 'mode'),
    ('--beam=0', 'beam'),
    ('--max_segment_seconds=0', 'decode.endpoint.max_seconds'),
  ],
)
def test_decode_names_a_bad_flag(flag, word, manifest, tmp_path):
  code, lines = _run(
    'experiments.decode',
    f'--checkpoint={tmp_path}',
    f'--manifest={manifest}',
    flag,
  )
  assert code == command.BAD_INPUT
  assert len(lines) == 1
  assert word in lines[0]


def test_several_processes_need_a_place_to_meet(
  manifest, tmp_path, monkeypatch
):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'localhost:1')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  monkeypatch.setenv('JAX_PROCESS_ID', '1')
  code, lines = _run(
    'experiments.decode', f'--checkpoint={tmp_path}', f'--manifest={manifest}'
  )
  assert code == command.BAD_INPUT
  assert lines == [
    'error: several processes need --out, where their parts are put together'
  ]


def test_a_defect_keeps_its_traceback():
  def main(_):
    raise RuntimeError('a defect')

  with pytest.raises(RuntimeError, match='a defect'):
    command.guarded(main, [])
