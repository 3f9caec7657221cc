"""Reasons: the list is complete, the documents have it, training tells them."""

import json
import pathlib
import re

import numpy as np
import soundfile

from data_pipelines import pipeline
from data_pipelines import prepare
from data_pipelines import reasons
from data_pipelines import sources
from data_pipelines import synthetic
from u2moe_jax import config as config_lib
from u2moe_jax.text import tokenizer

_ROOT = pathlib.Path(__file__).parents[2]
# How a reason comes into the world.
_GIVEN = re.compile(
  r"(?:AudioError|Problem|Skip|refuse)\(\s*(?:[a-z_.]+,\s*)?'([a-z_]+)'"
  r"|reason(?:, detail)? ?= ?'([a-z_]+)'"
)
_RETURNED = re.compile(r"return '([a-z_]+)'")


def _given() -> set[str]:
  """All reasons that stand somewhere in the code."""
  pipelines = _ROOT / 'data_pipelines'
  files = [*pipelines.rglob('*.py'), _ROOT / 'u2moe_jax/frontend/audio.py']
  texts = {path: path.read_text(encoding='utf-8') for path in files}
  found = {
    name for text in texts.values() for m in _GIVEN.findall(text) for name in m
  }
  for name in ('plan.py', 'check.py'):
    found.update(_RETURNED.findall(texts[pipelines / name]))
  return found - {''}


def test_every_reason_that_is_given_is_listed():
  given = _given()
  assert {'missing', 'bad_segment', 'silent', 'too_long', 'no_text'} <= given
  assert given == set(reasons.REASONS)


def test_the_documents_have_the_list():
  text = (_ROOT / 'docs/data.md').read_text(encoding='utf-8')
  rows = re.findall(r'^\| `([a-z_]+)` \| (.+) \|$', text, re.MULTILINE)
  table = {name: meaning for name, meaning in rows if name in reasons.REASONS}
  assert table == reasons.REASONS


def _bad_corpus(folder):
  """A manifest of one good utterance and many bad ones, key = reason."""
  path = synthetic.write_corpus(folder, num_utterances=1, seed=1)
  (good,) = path.read_bytes().splitlines()
  tone = soundfile.read(next(folder.glob('*.wav')), dtype='int16')[0]
  soundfile.write(folder / 'good.wav', tone, 16000)
  soundfile.write(folder / 'empty.wav', np.zeros(0, np.int16), 16000)
  soundfile.write(folder / 'long.wav', np.tile(tone, 60), 16000)
  data = (folder / 'good.wav').read_bytes()
  (folder / 'cut.wav').write_bytes(data[: len(data) // 2])
  rows = [
    {'key': 'missing', 'wav': 'none.wav'},
    {'key': 'empty', 'wav': 'empty.wav'},
    {'key': 'truncated', 'wav': 'cut.wav'},
    {'key': 'too_long', 'wav': 'long.wav'},
    {'key': 'bad_segment', 'wav': 'good.wav', 'start': 2, 'end': 1},
    {'key': 'labels_do_not_fit', 'wav': 'good.wav', 'txt': 'AA' * 50},
  ]
  lines = [json.dumps({'txt': 'AB', **row}).encode() for row in rows]
  latin = b'{"key": "bad_encoding", "wav": "good.wav", "txt": "A\xc4"}'
  path.write_bytes(b'\n'.join([good, *lines, latin]) + b'\n')
  return path


def test_training_and_preparing_name_what_they_leave_out(tmp_path):
  path = _bad_corpus(tmp_path)
  source = sources.open_source(str(path))
  table = tokenizer.build_char_tokenizer([synthetic.ALPHABET + ' B'])
  config = config_lib.DataConfig(
    features=config_lib.FeatureConfig(num_mel_bins=20)
  )
  corpus = pipeline.Corpus(source, table, config, rate=4, min_input=7)
  skipped = {skip.key: skip.reason for skip in corpus.skipped}
  # A header does not tell that a file is cut: its row stays empty, in training.
  batches = pipeline.TrainBatches(corpus, seed=0)
  number = 0
  while batches.locate(number)[0] == 0:
    skipped |= {s.key: s.reason for s in batches[number].skipped}
    number += 1
  names = {
    *('missing', 'empty', 'truncated', 'too_long', 'bad_segment'),
    *('labels_do_not_fit', 'bad_encoding'),
  }
  assert skipped == {name: name for name in names}

  prepare.prepare(tmp_path / 'out', {'train': str(path)}, max_seconds=30.0)
  lines = (tmp_path / 'out/skipped.jsonl').read_text().splitlines()
  listed = {row['key']: row['reason'] for row in map(json.loads, lines)}
  # Whether labels fit depends on the model.
  assert listed == {name: name for name in names - {'labels_do_not_fit'}}
