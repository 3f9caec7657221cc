"""Token tables from a script: what it writes, and what it refuses."""

import os
import pathlib
import subprocess
import sys

import pytest

from data_pipelines import synthetic
from experiments.wiring import command
from u2moe_jax.text import tokenizer

ROOT = pathlib.Path(__file__).parents[2]


def _run(*args):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.train_tokenizer', *map(str, args)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tones')
  return synthetic.write_corpus(folder, num_utterances=12, seed=1)


@pytest.mark.parametrize(
  ('flags', 'kind', 'size'),
  [
    (['--type=char'], 'char', 12),
    (['--type=bpe', '--size=20', '--model=bpe'], 'bpe', 20),
  ],
)
def test_it_writes_what_training_reads(manifest, tmp_path, flags, kind, size):
  out = tmp_path / 'tokens'
  arguments = [f'--source={manifest}', f'--out={out}', *flags]
  result = _run(*arguments)
  assert result.returncode == command.OK, result.stderr
  table = tokenizer.load(out)
  assert table.kind == kind
  assert table.vocab_size == size
  assert f'{size} tokens ({kind}) from 12 transcripts' in result.stdout
  assert not (tmp_path / 'tokens.incomplete').exists()


def test_what_is_there_stays(manifest, tmp_path):
  result = _run(f'--source={manifest}', f'--out={tmp_path}')
  assert result.returncode == command.BAD_INPUT
  assert 'is there already' in result.stderr
  assert not list(tmp_path.iterdir())


def test_a_size_that_does_not_work_leaves_nothing(manifest, tmp_path):
  out = tmp_path / 'tokens'
  flags = [f'--source={manifest}', f'--out={out}', '--type=bpe', '--size=9000']
  result = _run(*flags, '--model=bpe')
  assert result.returncode == command.BAD_INPUT
  assert len(result.stderr.strip().splitlines()) == 1
  assert not out.exists()
