"""Batches by number: the same in any order, whatever is broken elsewhere."""

import dataclasses
import itertools
import shutil
import time

import numpy as np
import pytest
import soundfile

from data_pipelines import manifest
from data_pipelines import pipeline
from data_pipelines import plan
from data_pipelines import sources
from data_pipelines import synthetic
from u2moe_jax import config as config_lib
from u2moe_jax.text import tokenizer as tokenizer_lib

_CONFIG = config_lib.DataConfig(
  features=config_lib.FeatureConfig(num_mel_bins=20),
  batch_frames=400,
  num_buckets=2,
)
_COUNT = 14


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('tones')
  synthetic.write_corpus(path, num_utterances=_COUNT, seed=5)
  return path


def _corpus(folder, config=_CONFIG):
  source = sources.open_source(str(folder / 'manifest.jsonl'))
  tokenizer = tokenizer_lib.build_char_tokenizer(
    u.txt for u in source.utterances
  )
  return pipeline.Corpus(source, tokenizer, config, rate=4, min_input=7)


@pytest.fixture(scope='module')
def corpus(folder):
  return _corpus(folder)


def _assert_same(a, b):
  assert a.keys == b.keys
  assert a.seconds == b.seconds
  assert a.skipped == b.skipped
  for name, array in a.arrays.items():
    np.testing.assert_array_equal(array, b.arrays[name])


def _epoch_length(batches):
  return next(n for n in itertools.count() if batches.locate(n)[0] == 1)


def test_batch_n_is_the_same_in_any_order(corpus):
  forward = pipeline.TrainBatches(corpus, seed=3)
  numbers = [0, 1, _epoch_length(forward), 2 * _epoch_length(forward) + 1]
  expected = [forward[n] for n in numbers]
  backward = pipeline.TrainBatches(corpus, seed=3)
  for n, batch in zip(reversed(numbers), reversed(expected), strict=True):
    _assert_same(backward[n], batch)


def test_iterating_from_the_middle_continues(corpus):
  batches = pipeline.TrainBatches(corpus, seed=3)
  start = _epoch_length(batches) - 1  # across the end of the epoch
  fresh = pipeline.TrainBatches(corpus, seed=3)
  iterator = fresh.iterate(start, num_workers=1)
  for number in range(start, start + 3):
    _assert_same(next(iterator), batches[number])


def test_many_threads_find_the_same_plan(corpus, monkeypatch):
  """Planning an epoch is slow enough here for two threads to meet in it."""
  expected = pipeline.TrainBatches(corpus, seed=3)
  wanted = [expected.locate(n) for n in range(5 * _epoch_length(expected))]
  original = plan.plan_epoch

  def slow(*arguments, **options):
    time.sleep(0.01)
    return original(*arguments, **options)

  monkeypatch.setattr(plan, 'plan_epoch', slow)
  monkeypatch.setattr(pipeline.Corpus, 'load', lambda _, planned, *__: planned)
  iterator = pipeline.TrainBatches(corpus, seed=3).iterate(0, num_workers=8)
  found = [next(iterator) for _ in wanted]
  assert found == [planned for _, planned in wanted]


def test_seed_and_epoch_change_the_augmentation(corpus):
  batches = pipeline.TrainBatches(corpus, seed=3)
  length = _epoch_length(batches)

  def rows(batches, numbers):
    found = {}
    for n in numbers:
      batch = batches[n]
      for key, features in zip(
        batch.keys, batch.arrays['features'], strict=False
      ):
        found[key] = features[:20]
    return found

  first = rows(batches, range(length))
  second = rows(batches, range(length, 2 * length))
  other = rows(pipeline.TrainBatches(corpus, seed=4), range(length))
  assert (
    set(first) == set(second) == {f'tones-5-{i:04d}' for i in range(_COUNT)}
  )
  for key in first:
    assert not np.array_equal(first[key], second[key])
    if key in other:
      assert not np.array_equal(first[key], other[key])


def test_shapes_and_padding(corpus):
  batches = pipeline.TrainBatches(corpus, seed=3, multiple=4)
  for number in range(_epoch_length(batches)):
    _, planned = batches.locate(number)
    bucket, arrays = planned.bucket, batches[number].arrays
    size = bucket.batch_size
    assert size % 4 == 0
    assert arrays['features'].shape == (size, bucket.max_frames, 20)
    assert arrays['labels'].shape == (size, bucket.max_tokens)
    for i in range(size):
      frames, count = arrays['feature_lengths'][i], arrays['label_lengths'][i]
      real = i < len(planned.indices)
      assert arrays['weights'][i] == real
      assert (frames > 0) == (count > 0) == real
      assert not arrays['features'][i, frames:].any()
      assert (arrays['labels'][i, count:] == -1).all()
      assert (arrays['labels'][i, :count] > 0).all()


def test_a_broken_file_leaves_one_empty_row_and_its_name(folder, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  whole = pipeline.TrainBatches(_corpus(copy), seed=3)
  broken = whole[0].keys[1]
  (copy / f'{broken}.wav').write_bytes(b'RIFF not a sound file')
  partly = pipeline.TrainBatches(_corpus(copy), seed=3)
  before, after = whole[0], partly[0]
  assert [skip.key for skip in after.skipped] == [broken]
  assert after.skipped[0].reason
  assert after.keys == before.keys
  for name in before.arrays:
    expected = before.arrays[name].copy()
    expected[1] = -1 if name == 'labels' else 0
    np.testing.assert_array_equal(after.arrays[name], expected)
  for number in range(1, _epoch_length(whole)):
    _assert_same(partly[number], whole[number])


def test_a_file_shorter_than_its_manifest_says_does_no_harm(folder, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  key = pipeline.TrainBatches(_corpus(copy), seed=3)[0].keys[0]
  soundfile.write(copy / f'{key}.wav', np.zeros(100), 16000)
  batch = pipeline.TrainBatches(_corpus(copy), seed=3)[0]
  assert [skip.key for skip in batch.skipped] == [key]
  assert batch.arrays['weights'][0] == 0


def test_what_cannot_be_used_is_left_out_and_named(folder, tmp_path):
  utterances = manifest.read(folder / 'manifest.jsonl')
  bad = dataclasses.replace(utterances[0], key='bad', extra={'duration': 99.0})
  manifest.write(tmp_path / 'manifest.jsonl', [bad, *utterances])
  corpus = _corpus(tmp_path)
  assert [(s.key, s.reason) for s in corpus.skipped] == [('bad', 'too_long')]
  assert len(corpus.items) == _COUNT
  assert corpus.text(0) == utterances[0].txt
  strict = dataclasses.replace(_CONFIG, min_seconds=20.0)
  with pytest.raises(pipeline.NoDataError, match='too_short'):
    _corpus(folder, strict)


def test_evaluation_is_plain_and_complete(corpus):
  buckets = pipeline.TrainBatches(corpus, seed=3).buckets
  runs = [
    list(pipeline.evaluation_batches(corpus, buckets=buckets)) for _ in range(2)
  ]
  for (a, indices), (b, _) in zip(*runs, strict=True):
    _assert_same(a, b)
    assert a.keys == tuple(corpus.items[i].key for i in indices)
  seen = sorted(i for _, indices in runs[0] for i in indices)
  assert seen == list(range(_COUNT))
