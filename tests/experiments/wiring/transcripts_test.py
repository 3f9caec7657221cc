"""A decoding run: in order, whatever stopped it and however it was shared."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from data_pipelines import job_shard
from data_pipelines import manifest
from experiments.wiring import decoding
from experiments.wiring import transcripts
from u2moe_jax import config as config_lib
from u2moe_jax.decoding import batching
from u2moe_jax.decoding import transcript as transcript_lib
from u2moe_jax.frontend import audio
from u2moe_jax.text import words

ROOT = pathlib.Path(__file__).parents[3]
COUNT = 9
BAD = 4  # an utterance without usable sound


class Source:
  """Utterances of different lengths; the sound tells the number."""

  def __init__(self):
    self.utterances = [
      manifest.Utterance(f'k{i}', '', f'W{i}', {'duration': (7 * i) % 5 + 1.0})
      for i in range(COUNT)
    ]

  def __len__(self):
    return COUNT

  def load(self, index):
    if index == BAD:
      raise audio.AudioError('empty', 'nothing in it')
    seconds = self.utterances[index].duration
    return np.full(int(16000 * seconds), index, np.float32)


class Recognizer:
  """Reads the number of the utterance off its sound."""

  def __init__(self, stop_after=None, **settings):
    self.config = config_lib.DecodeConfig(**settings)
    features = config_lib.FeatureConfig()
    self.description = types.SimpleNamespace(features=features, provenance={})
    self._left = stop_after

  def plan(self, seconds):
    order = sorted(range(len(seconds)), key=lambda i: seconds[i])
    yield from (order[i : i + 2] for i in range(0, len(order), 2))

  def features(self, samples):
    return samples[:1, None]

  def batches(self, features):
    if features:
      yield batching.pad(range(len(features)), features, 1, 2, 1)

  def search(self, batch):
    if self._left == 0:
      raise KeyboardInterrupt
    self._left = None if self._left is None else self._left - 1
    rows = batch.features[: len(batch.indices), 0, 0].astype(int).tolist()
    return list(map(_transcript, rows))

  def transcribe_batch(self, sounds):
    return [
      dataclasses.replace(
        _transcript(int(sound[0])),
        segments=(transcript_lib.Span(0.0, 1.0, 'W'),),
      )
      for sound in sounds
    ]


def _transcript(number):
  best = transcript_lib.Alternative(f'W{number}', (number,), -0.5)
  return transcript_lib.Transcript(
    text=best.text,
    tokens=best.tokens,
    score=-0.5,
    times=(0.25,),
    confidence=0.5,
    margin=float(np.inf) if number else 1e-6,
    nbest=(best,),
    token_confidence=(0.5,),
    words=(words.TimedWord(best.text, 0.0, 0.25, 0.5),),
  )


def _run(out, recognizer=None, **options):
  return decoding.run(recognizer or Recognizer(), Source(), out=out, **options)


def _keys(out):
  return [json.loads(line)['key'] for line in out.read_text().splitlines()]


EXPECTED = [f'k{i}' for i in range(COUNT) if i != BAD]


def test_results_stand_in_the_order_of_the_input(tmp_path):
  out = tmp_path / 'text.jsonl'
  summary, decoded = _run(out)
  assert _keys(out) == EXPECTED == [each.utterance.key for each in decoded]
  assert (summary.failed, summary.utterances) == (1, COUNT - 1)
  assert summary.words.rate == 0
  assert list(tmp_path.iterdir()) == [out]  # and nothing else is left
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  for line, each in zip(lines, decoded, strict=True):
    assert transcripts.from_record(line) == each.transcript
  assert [line['margin'] for line in lines][:2] == [1e-06, None]


@pytest.mark.parametrize('rate', [8000, 16000])
def test_seconds_are_seconds_at_any_rate(rate):
  recognizer, source = Recognizer(), Source()
  features = config_lib.FeatureConfig(sample_rate=rate)
  recognizer.description.features = features
  groups = decoding.decode(recognizer, source, range(COUNT))
  entries = [entry for group in groups for entry in group]
  assert sorted(entry.index for entry in entries) == list(range(COUNT))
  for entry in entries:
    if entry.index == BAD:
      assert entry.failed == 'empty: nothing in it'
    else:
      duration = source.utterances[entry.index].duration
      assert entry.sound == pytest.approx(duration * 16000 / rate)


def test_long_recordings_are_cut_whatever_their_list_says(tmp_path):
  out = tmp_path / 'text.jsonl'
  source = Source()
  decoding.run(Recognizer(whole_seconds=3.5), source, out=out)
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  for line in lines:
    long = source.utterances[int(line['key'][1:])].duration > 3.5
    assert ('segments' in line) == long
    assert transcripts.from_record(line).segments == (
      (transcript_lib.Span(0.0, 1.0, 'W'),) if long else ()
    )
  assert _keys(out) == EXPECTED


def test_a_stopped_run_goes_on_behind_the_last_whole_line(tmp_path):
  out = tmp_path / 'text.jsonl'
  with pytest.raises(KeyboardInterrupt):
    _run(out, Recognizer(stop_after=2))
  assert not out.exists()
  part = tmp_path / 'text.jsonl.parts' / 'shard-0-of-1.jsonl'
  lines = part.read_bytes().splitlines(keepends=True)
  assert len(lines) >= 3
  part.write_bytes(b''.join(lines[:-1]) + lines[-1][:20])  # as a kill leaves it
  again = Recognizer()
  done = []
  search = again.search
  again.search = lambda batch: done.append(batch) or search(batch)
  _run(out, again)
  assert _keys(out) == EXPECTED
  kept = sum('record' in json.loads(line) for line in lines[:-1])
  assert sum(len(batch.indices) for batch in done) == len(EXPECTED) - kept


def test_other_settings_do_not_go_on(tmp_path):
  out = tmp_path / 'text.jsonl'
  with pytest.raises(KeyboardInterrupt):
    _run(out, Recognizer(stop_after=1, beam=5))
  with pytest.raises(transcripts.TranscriptError, match=r'beam=5.*beam=10'):
    _run(out)
  with pytest.raises(transcripts.TranscriptError, match='streaming'):
    _run(out, Recognizer(beam=5), streamed=True)
  _run(out, Recognizer(beam=5, batch_seconds=7.0))  # which changes no result
  assert _keys(out) == EXPECTED


def test_whoever_finishes_last_puts_the_shards_together(tmp_path):
  out = tmp_path / 'text.jsonl'
  first, decoded = _run(out, shard=job_shard.Shard(1, 2))
  assert not out.exists()
  assert 0 < len(decoded) < len(EXPECTED)
  last, decoded = _run(out, shard=job_shard.Shard(0, 2))
  assert _keys(out) == EXPECTED
  assert first.utterances < last.utterances == len(EXPECTED)
  # Another number of shards is another run.
  _run(out, shard=job_shard.Shard(0, 3))
  with pytest.raises(transcripts.TranscriptError, match='shards'):
    _run(out, shard=job_shard.Shard(0, 2))


def test_a_merge_that_was_cut_short_is_done_again(tmp_path, monkeypatch):
  out = tmp_path / 'text.jsonl'

  def die(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(transcripts, 'write', die)
    with pytest.raises(KeyboardInterrupt):
      _run(out)
  assert not out.exists()
  _run(out, Recognizer(stop_after=0))  # nothing is searched any more
  assert _keys(out) == EXPECTED


def test_two_processes_share_the_work(tmp_path):
  out = tmp_path / 'text.jsonl'
  code = (
    'import sys\n'
    'from tests.experiments.wiring import transcripts_test as this\n'
    'from data_pipelines import job_shard\n'
    'shard = job_shard.parse(sys.argv[2])\n'
    'import pathlib\n'
    'this._run(pathlib.Path(sys.argv[1]), shard=shard)\n'
  )
  running = [
    subprocess.Popen([sys.executable, '-c', code, str(out), f'{i}/2'], cwd=ROOT)
    for i in range(2)
  ]
  assert [process.wait() for process in running] == [0, 0]
  assert _keys(out) == EXPECTED
  assert list(tmp_path.iterdir()) == [out]


def test_formats(tmp_path):
  _run(tmp_path / 'a.txt', format_name='txt')
  lines = (tmp_path / 'a.txt').read_text().splitlines()
  assert lines == [f'{key} W{key[1:]}' for key in EXPECTED]
  _run(tmp_path / 'a.ctm', format_name='ctm')
  lines = (tmp_path / 'a.ctm').read_text().splitlines()
  assert lines[0] == 'k0 1 0.000 0.250 W0 0.500'
  for name, start in (('srt', '1\n'), ('vtt', 'WEBVTT')):
    _run(tmp_path / name, format_name=name)
    files = sorted((tmp_path / name).iterdir())
    assert [file.stem for file in files] == EXPECTED
    assert files[0].read_text().startswith(start)
  with pytest.raises(transcripts.TranscriptError, match='times'):
    _run(tmp_path / 'b', Recognizer(mode='attention'), format_name='srt')
