"""The batch plan as a pure function: nothing lost, nothing too long."""

import collections
import dataclasses

import numpy as np
import pytest

from data_pipelines import plan
from u2moe_jax import config as config_lib

_CONFIG = config_lib.DataConfig(
  batch_frames=3000, max_batch_size=16, num_buckets=5
)
_SPEEDS = _CONFIG.augment.speeds


def _items(count=300, seed=0):
  rng = np.random.default_rng(seed)
  seconds = rng.gamma(4.0, 1.0, count) + 0.3
  return [
    plan.Item(f'u{i}', float(s), int(rng.integers(1, 5 * s + 2)))
    for i, s in enumerate(seconds)
  ]


@pytest.fixture(scope='module')
def items():
  return _items()


@pytest.fixture(scope='module')
def buckets(items):
  return plan.make_buckets(items, _CONFIG, speeds=_SPEEDS, multiple=2)


def _epoch(items, buckets, *, seed=7, epoch=0):
  return plan.plan_epoch(items, buckets, _CONFIG, seed=seed, epoch=epoch)


@pytest.mark.parametrize('epoch', [0, 1, 2])
def test_every_utterance_exactly_once(items, buckets, epoch):
  planned = _epoch(items, buckets, epoch=epoch)
  seen = sorted(i for batch in planned for i in batch.indices)
  assert seen == list(range(len(items)))


def test_a_plan_is_a_pure_function_of_seed_and_epoch(items, buckets):
  first = _epoch(items, buckets)
  np.random.default_rng(0).normal(size=3)
  assert _epoch(list(items), list(buckets)) == first
  assert _epoch(items, buckets, epoch=1) != first
  assert _epoch(items, buckets, seed=8) != first


def test_buckets_hold_the_perturbed_lengths(items, buckets):
  slowest = 0
  for epoch in range(3):
    for batch in _epoch(items, buckets, epoch=epoch):
      assert batch.bucket in buckets
      assert 0 < len(batch.indices) <= batch.bucket.batch_size
      assert len(batch.speeds) == len(batch.indices)
      for index, speed in zip(batch.indices, batch.speeds, strict=True):
        item = items[index]
        frames = plan.num_frames(item.seconds, speed, _CONFIG.features)
        assert frames <= batch.bucket.max_frames
        assert item.num_tokens <= batch.bucket.max_tokens
        slowest += speed == min(_SPEEDS)
  # Not vacuous: some only fit because their slowed length was planned.
  assert slowest > len(items) / 2


def test_buckets_for_speed_one_would_be_too_short(items):
  """The negative control of the law above."""
  plain = plan.make_buckets(items, _CONFIG, speeds=(1.0,))
  plan_epochs = lambda: [_epoch(items, plain, epoch=n) for n in range(5)]
  with pytest.raises(ValueError, match='fits no bucket'):
    plan_epochs()


def test_speeds_are_drawn_evenly(items, buckets):
  counts = collections.Counter(
    speed
    for epoch in range(10)
    for batch in _epoch(items, buckets, epoch=epoch)
    for speed in batch.speeds
  )
  assert set(counts) == set(_SPEEDS)
  expected = 10 * len(items) / 3
  chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
  assert chi_square < 18.4  # p = 1e-4 at 2 degrees of freedom


def test_few_rows_stay_empty(items, buckets):
  planned = _epoch(items, buckets)
  rows = sum(batch.bucket.batch_size for batch in planned)
  assert rows - len(items) < max(b.batch_size for b in buckets)
  incomplete = [b for b in planned if len(b.indices) < b.bucket.batch_size]
  assert len(incomplete) <= 1


def test_batches_come_in_mixed_order(items, buckets):
  lengths = [batch.bucket.max_frames for batch in _epoch(items, buckets)]
  assert lengths != sorted(lengths)


def test_bucket_shapes_keep_the_budget(buckets):
  frames = [bucket.max_frames for bucket in buckets]
  tokens = [bucket.max_tokens for bucket in buckets]
  assert frames == sorted(set(frames))
  assert tokens == sorted(tokens)
  assert len(buckets) == _CONFIG.num_buckets
  for bucket in buckets:
    assert bucket.batch_size % 2 == 0
    assert bucket.batch_size <= _CONFIG.max_batch_size
    padded = bucket.batch_size * bucket.max_frames
    assert padded <= _CONFIG.batch_frames or bucket.batch_size == 2


@pytest.mark.parametrize('count', [1, 2, 3])
def test_tiny_corpora_have_a_plan(count):
  items = _items(count)
  buckets = plan.make_buckets(items, _CONFIG, speeds=_SPEEDS)
  planned = _epoch(items, buckets)
  assert sorted(i for b in planned for i in b.indices) == list(range(count))


def test_evaluation_covers_everything_once_by_length(items, buckets):
  longer = [*items, plan.Item('long', 40.0, 500)]
  extended = plan.extend_buckets(buckets, longer, _CONFIG)
  assert extended[:-1] == list(buckets)
  assert plan.extend_buckets(buckets, items, _CONFIG) == list(buckets)
  planned = plan.plan_once(longer, extended, _CONFIG)
  seen = [i for batch in planned for i in batch.indices]
  assert sorted(seen) == list(range(len(longer)))
  assert all(speed == 1.0 for batch in planned for speed in batch.speeds)
  widths = [batch.bucket.max_frames for batch in planned]
  assert widths == sorted(widths)


def test_frames_of_a_duration():
  features = config_lib.FeatureConfig()
  assert plan.num_frames(0.0249, 1.0, features) == 0
  assert plan.num_frames(0.025, 1.0, features) == 1
  assert plan.num_frames(1.0, 1.0, features) == 98
  assert plan.num_frames(0.9, 0.9, features) == 98


@pytest.mark.parametrize(
  ('item', 'reason'),
  [
    (plan.Item('a', 2.0, 5, 5), None),
    (plan.Item('a', 0.05, 1, 1), 'too_short'),
    (plan.Item('a', 0.092, 1, 1), 'too_short'),
    (plan.Item('a', 30.5, 5, 5), 'too_long'),
    (plan.Item('a', 20.0, 401, 401), 'too_many_tokens'),
    # 2 s at speed 1.1: 180 frames, 44 after x4.
    (plan.Item('a', 2.0, 44, 44), None),
    (plan.Item('a', 2.0, 45, 45), 'labels_do_not_fit'),
    (plan.Item('a', 2.0, 40, 45), 'labels_do_not_fit'),
  ],
)
def test_rejections_have_a_reason(item, reason):
  config = dataclasses.replace(_CONFIG, min_seconds=0.09)
  assert plan.rejection(item, config, rate=4, min_input=7) == reason


def test_generators_depend_on_their_parts_alone():
  draw = lambda *parts: plan.generator(*parts).integers(2**62)
  assert draw(1, 'augment', 2, 'k') == draw(1, 'augment', 2, 'k')
  others = {
    draw(1, 'a', 23),
    draw(1, 'a', 2, 3),
    draw(1, 'a2', 3),
    draw(11, 'a'),
  }
  assert len(others) == 4
