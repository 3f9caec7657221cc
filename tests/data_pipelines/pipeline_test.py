"""Batches by number: the same in any order, whatever is broken elsewhere."""

import collections
import dataclasses
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import soundfile

from data_pipelines import manifest
from data_pipelines import mixing
from data_pipelines import pipeline
from data_pipelines import plan
from data_pipelines import synthetic
from u2moe_jax import config as config_lib
from u2moe_jax.text import tokenizer as tokenizer_lib

_CONFIG = config_lib.DataConfig(
  features=config_lib.FeatureConfig(num_mel_bins=20),
  batch_frames=400,
  num_buckets=2,
  plan_epochs=1,
)
_COUNT = 14
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('tones')
  synthetic.write_corpus(path, num_utterances=_COUNT, seed=5)
  return path


def _corpus(folder, config=_CONFIG):
  return _mixed(str(folder / 'manifest.jsonl'), config)


def _mixed(spec, config=_CONFIG):
  mixture = mixing.open_mixture(spec)
  tokenizer = tokenizer_lib.build_char_tokenizer(
    u.txt for u in mixture.source.utterances
  )
  return pipeline.Corpus(
    mixture.source, tokenizer, config, rate=4, min_input=7, mixture=mixture
  )


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


def _take(batches, start, count, **workers):
  iterator = batches.iterate(start, **workers)
  return [next(iterator) for _ in range(count)]


@pytest.fixture(scope='module')
def small_blocks(folder):
  """Batches whose epochs are planned three together."""
  config = dataclasses.replace(_CONFIG, plan_epochs=3)
  return lambda: pipeline.TrainBatches(
    _corpus(folder, config), seed=3, multiple=2
  )


@pytest.mark.parametrize('workers', [0, 1, 4])
def test_any_number_of_workers_gives_the_same_batches(small_blocks, workers):
  expected = small_blocks()
  count = 2 * _epoch_length(expected)
  for number, batch in enumerate(
    _take(small_blocks(), 0, count, num_workers=workers)
  ):
    _assert_same(batch, expected[number])
  # Continued in the middle of an epoch, with another number of workers.
  for start in (1, _epoch_length(expected) + 1):
    batch, *_ = _take(small_blocks(), start, 1, num_workers=4 - workers)
    _assert_same(batch, expected[start])


def test_processes_give_the_same_batches(small_blocks):
  expected = small_blocks()
  start, count = _epoch_length(expected) - 1, 3  # across the end of the epoch
  found = _take(
    small_blocks(), start, count, num_workers=2, worker_type='process'
  )
  for number, batch in enumerate(found, start):
    _assert_same(batch, expected[number])


def test_another_place_or_seed_gives_other_batches(small_blocks, folder):
  """The negative control of the laws above."""
  expected = small_blocks()
  shifted = _take(small_blocks(), 1, 1, num_workers=1)[0]
  with pytest.raises(AssertionError):
    _assert_same(shifted, expected[0])
  other = pipeline.TrainBatches(_corpus(folder), seed=4, multiple=2)
  with pytest.raises(AssertionError):
    _assert_same(other[0], expected[0])


def _joined(parts):
  return {
    name: np.concatenate([part.arrays[name] for part in parts])
    for name in parts[0].arrays
  }


@pytest.mark.parametrize('num_workers', [0, 1, 4])
def test_two_hosts_together_have_the_batches_of_one(folder, num_workers):
  one = pipeline.TrainBatches(_corpus(folder), seed=3, multiple=2)
  count = _epoch_length(one) + 1
  hosts = [
    _take(
      pipeline.TrainBatches(
        _corpus(folder), seed=3, multiple=2, host_index=host, num_hosts=2
      ),
      0,
      count,
      num_workers=num_workers,
    )
    for host in range(2)
  ]
  loaded = 0
  for number, parts in enumerate(zip(*hosts, strict=True)):
    whole = one[number]
    assert parts[0].keys + parts[1].keys == whole.keys
    assert sum(part.seconds for part in parts) == pytest.approx(whole.seconds)
    for name, array in _joined(parts).items():
      np.testing.assert_array_equal(array, whole.arrays[name])
    # Each host has loaded its own rows and no more.
    assert not set(parts[0].keys) & set(parts[1].keys)
    loaded += len(parts[0].keys)
    swapped = _joined(parts[::-1])['features']
    assert not np.array_equal(swapped, whole.arrays['features'])
  assert 0 < loaded < count * max(b.batch_size for b in one.buckets)


def test_hosts_need_batches_they_can_share(corpus):
  with pytest.raises(ValueError, match='host 0 of 2'):
    pipeline.TrainBatches(corpus, seed=3, multiple=3, num_hosts=2)


_PROBE = """
import sys
import numpy as np
from data_pipelines import manifest, pipeline
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.text import tokenizer

class Source:
  # Loads only where no backend of JAX is up.

  def __init__(self, wake):
    self.wake = wake
    self.utterances = [
      manifest.Utterance(str(i), '', 'AB', {'duration': 1.0}) for i in range(8)
    ]

  def __len__(self):
    return len(self.utterances)

  def load(self, index):
    if self.wake:
      import jax
      jax.devices()
    bridge = sys.modules.get('jax._src.xla_bridge')
    if bridge is not None and bridge._backends:
      raise audio.AudioError('awake', str(index))
    return np.ones(16000, np.float32) * (index + 1) / 10

def skips(wake, kind):
  config = config_lib.DataConfig(batch_frames=400, num_buckets=1)
  tokens = tokenizer.build_char_tokenizer(['AB'])
  corpus = pipeline.Corpus(Source(wake), tokens, config, rate=4, min_input=7)
  batches = pipeline.TrainBatches(corpus, seed=0)
  stream = batches.iterate(0, num_workers=1, worker_type=kind)
  return sum(len(next(stream).skipped) for _ in range(2))

if __name__ == '__main__':
  from absl import flags
  flags.FLAGS.mark_as_parsed()
  print(skips(False, 'process'), skips(False, 'thread'), skips(True, 'thread'))
"""


def test_a_worker_wakes_no_backend(tmp_path):
  """The last number, from a source that does wake one, is the control."""
  script = tmp_path / 'probe.py'
  script.write_text(_PROBE)
  result = subprocess.run(
    [sys.executable, str(script)],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  )
  process, thread, woken = map(int, result.stdout.split())
  assert process == thread == 0
  assert woken > 0


def test_mixed_sources_come_by_their_shares(folder, tmp_path):
  synthetic.write_corpus(tmp_path, num_utterances=3, seed=9)
  spec = f'{folder}/manifest.jsonl*0.25, {tmp_path}/manifest.jsonl*0.75'
  augment = dataclasses.replace(_CONFIG.augment, **_NO_MASKS)
  config = dataclasses.replace(_CONFIG, augment=augment)
  batches = pipeline.TrainBatches(_mixed(spec, config), seed=3)
  counts, features = collections.Counter(), collections.defaultdict(list)
  for number in range(_epoch_length(batches)):
    batch = batches[number]
    for key, row in zip(batch.keys, batch.arrays['features'], strict=False):
      counts[key.startswith('tones-9')] += 1
      features[key].append(row[:20])
  assert counts == {False: 4, True: 13}
  # The same utterance is augmented in another way each time.
  several = [rows for rows in features.values() if len(rows) > 1]
  assert len(several) == 3
  for rows in several:
    for first, second in itertools.combinations(rows, 2):
      assert not np.array_equal(first, second)


def test_a_part_without_a_usable_utterance_is_named(folder, tmp_path):
  synthetic.write_corpus(tmp_path, num_utterances=2, seed=9)
  path = tmp_path / 'manifest.jsonl'
  long = [
    dataclasses.replace(utterance, extra={'duration': 99.0})
    for utterance in manifest.read(path)
  ]
  manifest.write(path, long)
  with pytest.raises(pipeline.NoDataError, match=r'too_long.*: 2') as caught:
    _mixed(f'{folder}/manifest.jsonl*1,{path}*1')
  assert str(path) in str(caught.value)


_NO_MASKS = {'num_time_masks': 0, 'num_freq_masks': 0, 'num_substitutions': 0}


def _augmented(folder, **changes):
  augment = dataclasses.replace(_CONFIG.augment, **changes)
  config = dataclasses.replace(_CONFIG, augment=augment)
  return pipeline.TrainBatches(_corpus(folder, config), seed=3)


@pytest.mark.parametrize(
  'changes',
  [
    {'volume_probability': 1.0},
    {'noise_probability': 1.0},
    {'noise_probability': 1.0, 'noise': 'babble'},
    {'reverb_probability': 1.0},
  ],
)
def test_each_kind_of_augmentation_is_seeded_and_does_something(
  folder, changes
):
  plain = _augmented(folder)[0]
  first, again = (_augmented(folder, **changes)[0] for _ in range(2))
  _assert_same(first, again)
  assert first.keys == plain.keys
  assert not first.skipped
  length = int(plain.arrays['feature_lengths'].min())
  for a, b in zip(
    first.arrays['features'][: len(plain.keys)],
    plain.arrays['features'],
    strict=False,
  ):
    assert not np.array_equal(a[:length], b[:length])


def test_a_probability_is_a_share_of_the_utterances(folder):
  def loudest(probability):
    batches = _augmented(
      folder,
      **_NO_MASKS,
      volume_probability=probability,
      volume_db=(20.0, 20.0),
    )
    rows = [batches[n].arrays['features'] for n in range(12)]
    return np.concatenate([each.max(axis=(1, 2)) for each in rows])

  plain, some, all_of_them = map(loudest, (0.0, 0.4, 1.0))
  real = plain > 0
  changed = ~np.isclose(some[real], plain[real], atol=0.1)
  assert 0.2 < changed.mean() < 0.6
  # The others are as loud as with probability 1.
  np.testing.assert_allclose(
    some[real][changed], all_of_them[real][changed], atol=0.1
  )


def test_unknown_tokens_are_a_reason_where_asked_for(folder):
  source = mixing.open_mixture(str(folder / 'manifest.jsonl')).source
  tokenizer = tokenizer_lib.build_char_tokenizer(['ABCDEF GA'])

  def make(config):
    return pipeline.Corpus(source, tokenizer, config, rate=4, min_input=7)

  assert not make(_CONFIG).skipped
  strict = make(dataclasses.replace(_CONFIG, skip_unknown=True))
  lacking = [u.key for u in source.utterances if 'H' in u.txt]
  assert lacking
  assert [skip.key for skip in strict.skipped] == lacking
  assert {skip.reason for skip in strict.skipped} == {'unknown_tokens'}


class _Block(list):
  """A list that can be watched."""


def test_ten_epochs_leave_no_plans_behind(corpus, monkeypatch):
  made = []
  original = plan.plan_block

  def watched(*arguments, **options):
    block = _Block(original(*arguments, **options))
    made.append(weakref.ref(block))
    return block

  monkeypatch.setattr(plan, 'plan_block', watched)
  batches = pipeline.TrainBatches(corpus, seed=3)
  kept = batches.locate(0)
  for epoch in range(10):
    batches.epoch(epoch)
  assert kept
  assert len(made) == 10
  assert sum(block() is not None for block in made) <= 2


def test_many_threads_find_the_same_plan(corpus, monkeypatch):
  """Planning a block is slow enough here for two threads to meet in it."""
  expected = pipeline.TrainBatches(corpus, seed=3)
  wanted = [expected.locate(n) for n in range(5 * _epoch_length(expected))]
  original = plan.plan_block

  def slow(*arguments, **options):
    time.sleep(0.01)
    return original(*arguments, **options)

  monkeypatch.setattr(plan, 'plan_block', slow)
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


def test_another_mesh_goes_on_with_the_same_batches(corpus):
  """A run keeps its buckets; what does not divide has empty rows behind it."""
  first = pipeline.TrainBatches(corpus, seed=3)
  buckets = first.planned_buckets
  assert buckets == first.buckets
  size = 2 * max(bucket.batch_size for bucket in buckets) + 1
  other = pipeline.TrainBatches(corpus, seed=3, multiple=size, buckets=buckets)
  assert other.epochs_together == first.epochs_together
  for number in range(_epoch_length(first) + 1):
    expected, batch = first[number], other[number]
    assert batch.keys == expected.keys
    rows = len(expected.arrays['weights'])
    for name, array in batch.arrays.items():
      assert len(array) == size
      np.testing.assert_array_equal(array[:rows], expected.arrays[name])
    assert not batch.arrays['weights'][rows:].any()
  fresh = pipeline.TrainBatches(corpus, seed=3, multiple=size)
  assert fresh[0].keys != first[0].keys


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


def test_hosts_share_an_evaluation(corpus):
  buckets = pipeline.TrainBatches(corpus, seed=3, multiple=2).buckets
  whole = list(pipeline.evaluation_batches(corpus, buckets=buckets))
  hosts = [
    pipeline.evaluation_batches(
      corpus, buckets=buckets, host_index=host, num_hosts=2
    )
    for host in range(2)
  ]
  for (batch, indices), *parts in zip(whole, *hosts, strict=True):
    assert all(part_indices == indices for _, part_indices in parts)
    for name, array in _joined([part for part, _ in parts]).items():
      np.testing.assert_array_equal(array, batch.arrays[name])
    assert not set(parts[0][0].keys) & set(parts[1][0].keys)
