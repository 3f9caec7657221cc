"""Alignment of a manifest: in its order, as JSON lines and CTM."""

import json

import pytest

from data_pipelines import manifest
from experiments.wiring import aligning
from tests.reference import tiny_recognizer
from u2moe_jax.frontend import audio

# Without a token table a text is ids. The third is too long for its sound, the
# fourth is none, the fifth has no sound.
TEXTS = ('3 4 5', '4', '1 ' * 60, 'x', '2')
SECONDS = (0.9, 0.5, 0.4, 0.6, 0.7)


class _Source:
  def __init__(self):
    self.utterances = [
      manifest.Utterance(f'k{i}', '', text, {'duration': seconds})
      for i, (text, seconds) in enumerate(zip(TEXTS, SECONDS, strict=True))
    ]
    self._sounds = tiny_recognizer.sounds(SECONDS)

  def __len__(self):
    return len(TEXTS)

  def load(self, index):
    if index == 4:
      raise audio.AudioError('empty', 'nothing in it')
    return self._sounds[index]


@pytest.fixture(scope='module')
def aligned():
  recognizer = tiny_recognizer.make(
    tiny_recognizer.model_config(), mode='ctc_greedy_search'
  )
  return aligning.align(recognizer, _Source())


def test_each_has_its_words_or_its_problem(aligned):
  assert [word.text for word in aligned[0].words] == ['3', '4', '5']
  assert [word.text for word in aligned[1].words] == ['4']
  assert 'need 119 frames' in aligned[2].problem
  assert 'not ids' in aligned[3].problem
  assert aligned[4].problem == 'empty: nothing in it'
  for each, seconds in zip(aligned[:2], SECONDS, strict=False):
    edges = [t for word in each.words for t in (word.start, word.end)]
    assert edges == sorted(edges)
    assert edges[-1] <= seconds


def test_files_hold_what_was_found_in_order(aligned, tmp_path):
  aligning.write(tmp_path / 'a.jsonl', _Source(), aligned)
  lines = (tmp_path / 'a.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [record['key'] for record in records] == [f'k{i}' for i in range(5)]
  assert [token['token'] for token in records[0]['tokens']] == ['3', '4', '5']
  assert 'problem' in records[3]
  assert 'words' not in records[3]
  aligning.write(tmp_path / 'a.ctm', _Source(), aligned, format_name='ctm')
  lines = (tmp_path / 'a.ctm').read_text().splitlines()
  assert lines[0].startswith('k0 1 0.0')
  assert [line.split()[4] for line in lines[:4]] == ['3', '4', '5', '4']
  assert all(line.startswith(';; k') for line in lines[4:])
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'a.ctm',
    'a.jsonl',
  ]
