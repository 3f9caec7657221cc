"""Preparing a corpus: complete, once, and nothing half done."""

import json

import numpy as np
import pytest

from data_pipelines import manifest
from data_pipelines import prepare
from data_pipelines import synthetic
from data_pipelines import tfds_dataset
from data_pipelines.corpora import espeak
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import cmvn
from u2moe_jax.frontend import fbank
from u2moe_jax.text import tokenizer

_SIZES = {'num_train': 4, 'num_dev': 1, 'num_test': 1, 'num_workers': 0}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  return synthetic.write_corpus(folder, num_utterances=3, seed=1)


def test_builtin_corpus_is_what_the_engine_speaks(tmp_path):
  out = tmp_path / 'out'
  prepare.prepare_builtin(out, seed=3, **_SIZES)
  built = list(espeak.build(seed=3, **_SIZES))
  assert tfds_dataset.splits(out) == ['train', 'dev', 'test']
  for split in ('train', 'dev', 'test'):
    expected = [r for s, r in built if s == split]
    for a, b in zip(tfds_dataset.read(out, split), expected, strict=True):
      assert (a.key, a.txt, a.extra) == (b.key, b.txt, b.extra)
      np.testing.assert_array_equal(a.audio, b.audio)
  assert not (out / prepare.SKIPPED_FILE).read_text()


def _statistics(recordings) -> cmvn.CmvnStats:
  features = config_lib.FeatureConfig()
  stats = cmvn.empty(features.num_mel_bins)
  for recording in recordings:
    samples = (recording.audio / 32768).astype(np.float32)
    stats = cmvn.accumulate(stats, fbank.fbank(samples, features))
  return stats


def test_statistics_and_characters_are_those_of_train(corpus, tmp_path):
  dev = synthetic.write_corpus(tmp_path / 'dev', num_utterances=1, seed=2)
  txt = manifest.read(dev)[0]
  manifest.write(dev, [manifest.Utterance('d', txt.wav, 'XYZ')])
  prepare.prepare_manifest(tmp_path / 'out', train=corpus, dev=dev)
  read = {s: tfds_dataset.read(tmp_path / 'out', s) for s in ('train', 'dev')}
  saved = cmvn.load(tmp_path / 'out' / prepare.CMVN_FILE)
  train = _statistics(read['train'])
  np.testing.assert_allclose(saved.mean, train.mean)
  np.testing.assert_allclose(saved.istd, train.istd)
  both = cmvn.merge(train, _statistics(read['dev']))
  assert not np.allclose(saved.mean, both.mean)
  table = tokenizer.load(tmp_path / 'out' / prepare.TOKENS_FOLDER)
  for recording in read['train']:
    assert table.decode(table.encode(recording.txt)) == recording.txt
  assert table.unknown_characters('XYZ') == ['X', 'Y', 'Z']


def test_16_bit_files_are_packed_as_they_are(corpus, tmp_path):
  prepare.prepare_manifest(tmp_path / 'out', train=corpus)
  recordings = tfds_dataset.read(tmp_path / 'out', 'train')
  for item, recording in zip(manifest.read(corpus), recordings, strict=True):
    with open(item.wav, 'rb') as file:
      assert file.read()[44:] == recording.audio.tobytes()


def test_to_int16_rounds_and_clips():
  samples = np.array([-1.5, -1.0, -0.5 / 32768, 0.6 / 32768, 1.0], np.float32)
  assert prepare.to_int16(samples).tolist() == [-32768, -32768, 0, 1, 32767]


def test_a_second_run_does_nothing(corpus, tmp_path, capsys):
  out = tmp_path / 'out'
  prepare.prepare_manifest(out, train=corpus)
  before = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
  capsys.readouterr()
  prepare.prepare_manifest(out, train=corpus)
  assert 'already prepared, nothing to do' in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in out.rglob('*')} == before
  prepare.prepare_manifest(out, train=corpus, force=True)
  assert {p: p.stat().st_mtime_ns for p in out.rglob('*')} != before


def test_another_corpus_in_the_folder_is_not_overwritten(corpus, tmp_path):
  out = tmp_path / 'out'
  prepare.prepare_manifest(out, train=corpus)
  other = synthetic.write_corpus(tmp_path / 'b', num_utterances=1, seed=9)
  with pytest.raises(prepare.PrepareError, match='--force'):
    prepare.prepare_manifest(out, train=other)
  assert len(tfds_dataset.read(out, 'train')) == 3
  prepare.prepare_manifest(out, train=other, force=True)
  assert len(tfds_dataset.read(out, 'train')) == 1


@pytest.mark.parametrize('force', [False, True])
def test_a_folder_of_something_else_is_never_touched(corpus, force, tmp_path):
  (tmp_path / 'thesis.txt').write_text('years of work')
  with pytest.raises(prepare.PrepareError, match='holds something else'):
    prepare.prepare_manifest(tmp_path, train=corpus, force=force)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']


def test_unusable_audio_is_left_out_and_listed(corpus, tmp_path, capsys):
  good = manifest.read(corpus)[0]
  bad = manifest.Utterance('bad', '/none/bad.wav', 'A')
  manifest.write(tmp_path / 'm.jsonl', [bad, good])
  prepare.prepare_manifest(tmp_path / 'out', train=tmp_path / 'm.jsonl')
  recordings = tfds_dataset.read(tmp_path / 'out', 'train')
  assert [r.key for r in recordings] == [good.key]
  (line,) = (tmp_path / 'out/skipped.jsonl').read_text().splitlines()
  skipped = json.loads(line)
  assert (skipped['key'], skipped['reason']) == ('bad', 'missing')
  printed = capsys.readouterr()
  assert 'left out bad' in printed.err
  assert 'left out 1 utterances' in printed.out


def test_nothing_usable_leaves_nothing(tmp_path):
  bad = manifest.Utterance('bad', '/none/bad.wav', 'A')
  manifest.write(tmp_path / 'm.jsonl', [bad])
  with pytest.raises(prepare.PrepareError, match='no utterance to write'):
    prepare.prepare_manifest(tmp_path / 'out', train=tmp_path / 'm.jsonl')
  assert [p.name for p in tmp_path.iterdir()] == ['m.jsonl']


def test_train_without_audio_is_refused(corpus, tmp_path):
  bad = manifest.Utterance('bad', '/none/bad.wav', 'A')
  manifest.write(tmp_path / 'm.jsonl', [bad])
  with pytest.raises(prepare.PrepareError, match='CMVN statistics'):
    prepare.prepare_manifest(
      tmp_path / 'out', train=tmp_path / 'm.jsonl', dev=corpus
    )
  assert not (tmp_path / 'out').exists()


def test_sizes_must_be_positive(tmp_path):
  with pytest.raises(prepare.PrepareError, match='num_dev is 0'):
    prepare.prepare_builtin(tmp_path / 'out', num_dev=0)
