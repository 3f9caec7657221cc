"""The script: exit codes, one line for bad input."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from data_pipelines import job_shard
from data_pipelines import manifest
from data_pipelines import prepare
from data_pipelines import synthetic
from data_pipelines import tfds_dataset

_ROOT = pathlib.Path(__file__).parents[2]


def _command(*flags: str) -> list[str]:
  return [sys.executable, '-m', 'experiments.prepare_corpus', *flags]


def _run(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    _command(*flags), cwd=_ROOT, capture_output=True, text=True
  )


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
    ('kaldi:{}', 'not a Kaldi data directory'),
  ],
)
def test_bad_input_is_one_line_and_code_2(source, message, tmp_path):
  run = _run(f'--source={source.format(tmp_path)}', f'--out={tmp_path}/out')
  assert run.returncode == 2
  assert run.stderr.startswith('error: ')
  assert message in run.stderr
  assert len(run.stderr.splitlines()) == 1
  assert not list(tmp_path.iterdir())


def test_a_bad_share_is_named(tmp_path):
  run = _run('--source=builtin', f'--out={tmp_path}/out', '--shard=3/3')
  assert run.returncode == 2
  assert '--shard=3/3: the number of a job counts from 0 to 2' in run.stderr


def test_jobs_share_a_corpus_of_any_kind_and_verify_it(tmp_path):
  """A Kaldi folder of two splits, written by two jobs."""
  for split, count in (('train', 3), ('dev', 1)):
    path = synthetic.write_corpus(
      tmp_path / 'wav' / split, num_utterances=count, seed=count
    )
    items = manifest.read(path)
    folder = tmp_path / 'data' / split
    folder.mkdir(parents=True)
    wavs = ''.join(f'{item.key} {item.wav}\n' for item in items)
    texts = ''.join(f'{item.key} {item.txt}\n' for item in items)
    (folder / 'wav.scp').write_text(wavs)
    (folder / 'text').write_text(texts)
  out = tmp_path / 'out'
  flags = (f'--source=kaldi:{tmp_path}/data', f'--out={out}')
  first = _run(*flags, '--shard=0/2')
  assert first.returncode == 0, first.stderr
  assert '1 of 2 pieces are there' in first.stdout
  assert not out.exists()
  specs = {split: f'kaldi:{tmp_path}/data' for split in ('train', 'dev')}
  assert prepare.prepare(out, specs, shard=job_shard.Shard(1, 2))
  assert tfds_dataset.splits(out) == ['train', 'dev']
  (out / 'index-dev.jsonl').write_text('')
  check = _run(f'--out={out}', '--verify')
  assert check.returncode == 1
  assert 'index-dev.jsonl: has 0 bytes' in check.stdout


def test_a_stopped_run_says_so_and_continues(tmp_path, capsys):
  (item,) = manifest.read(
    synthetic.write_corpus(tmp_path, num_utterances=1, seed=1)
  )
  items = [manifest.Utterance(f'k{i}', item.wav, 'A') for i in range(600)]
  manifest.write(tmp_path / 'm.jsonl', items)
  out = tmp_path / 'out'
  flags = (f'--source={tmp_path}/m.jsonl', f'--out={out}', '--workers=0')
  process = subprocess.Popen(
    _command(*flags), cwd=_ROOT, stderr=subprocess.PIPE, text=True
  )
  receipts = tfds_dataset.staging_folder(out) / 'pieces'
  while process.poll() is None and not list(receipts.glob('*.json')):
    time.sleep(0.01)
  os.kill(process.pid, signal.SIGTERM)
  _, printed = process.communicate()
  assert process.returncode == 3
  assert 'stopped; the same command continues' in printed
  assert not out.exists()
  assert prepare.prepare(out, {'train': f'{tmp_path}/m.jsonl'}, num_workers=0)
  assert 'pieces are there and verified' in capsys.readouterr().out
  assert len(tfds_dataset.read(out, 'train')) == 600
