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


def _epoch(items, buckets, config=_CONFIG, *, seed=7, epoch=0, shares=()):
  """One epoch, planned by itself."""
  (batches,) = plan.plan_block(
    items, buckets, config, seed=seed, epochs=[epoch], shares=shares
  )
  return batches


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


def _seconds_of(items, batch):
  return [items[i].seconds for i in batch.indices]


def test_short_first_epochs_go_from_short_to_long(items, buckets):
  config = dataclasses.replace(_CONFIG, short_first_epochs=2)

  def flushed(epoch, config):
    planned = _epoch(items, buckets, config, epoch=epoch)
    seen = sorted(i for batch in planned for i in batch.indices)
    assert seen == list(range(len(items)))
    # Batches that the end of the epoch filled are not in order.
    return [_seconds_of(items, b) for b in planned[: -2 * len(buckets)]]

  for epoch in (0, 1):
    longest = [max(seconds) for seconds in flushed(epoch, config)]
    assert len(longest) > 10
    assert longest == sorted(longest)
    for seconds in flushed(epoch, config):
      assert seconds == sorted(seconds)
  assert flushed(0, config) != flushed(1, config)  # speeds are drawn anew
  # The negative control: later epochs, and runs without, are mixed.
  for planned in (flushed(2, config), flushed(0, _CONFIG)):
    longest = [max(seconds) for seconds in planned]
    assert longest != sorted(longest)
  assert flushed(2, config) == flushed(2, _CONFIG)


def _shares(items, planned):
  """Padded share of the real rows' frames, and share of empty rows."""
  frames = [
    plan.num_frames(items[i].seconds, speed, _CONFIG.features)
    for batch in planned
    for i, speed in zip(batch.indices, batch.speeds, strict=True)
  ]
  padded = sum(b.bucket.max_frames * len(b.indices) for b in planned)
  rows = sum(b.bucket.batch_size for b in planned)
  return 1 - sum(frames) / padded, 1 - len(frames) / rows


def _block(items, buckets, epochs, config=_CONFIG):
  planned = plan.plan_block(items, buckets, config, seed=7, epochs=epochs)
  return [batch for epoch in planned for batch in epoch]


def test_a_block_has_every_utterance_once_per_epoch():
  items = _items(40)
  buckets = plan.make_buckets(items, _CONFIG, speeds=_SPEEDS)
  planned = _block(items, buckets, range(10, 15))
  drawn = [
    (index, number)
    for batch in planned
    for index, number in zip(batch.indices, batch.rounds, strict=True)
  ]
  expected = [(i, n) for i in range(len(items)) for n in range(10, 15)]
  assert sorted(drawn) == expected
  incomplete = [b for b in planned if len(b.indices) < b.bucket.batch_size]
  assert len(incomplete) <= 1
  alone = _epoch(items, buckets, epoch=3)
  assert {n for batch in alone for n in batch.rounds} == {3}


def test_a_block_pads_less_than_its_epochs_by_themselves():
  items = _items(60)
  buckets = plan.make_buckets(items, _CONFIG, speeds=_SPEEDS)
  together, _ = _shares(items, _block(items, buckets, range(10)))
  alone = [
    batch
    for n in range(10)
    for batch in _block(items, buckets, range(n, n + 1))
  ]
  padding, empty = _shares(items, alone)
  assert together < 0.9 * padding
  assert empty <= 0.03
  assert len(_block(items, buckets, range(10))) < len(alone)


def test_small_corpora_reach_the_padding_of_large_ones():
  """Twelve buckets of a batch an epoch each: the shape of a real one."""
  config = config_lib.DataConfig(batch_frames=4000)
  items = _items(100)
  buckets = plan.make_buckets(items, config, speeds=_SPEEDS)
  together = plan.epochs_together(items, buckets, config)
  assert together > 1
  epochs = range(0, 10 * together)
  planned = []
  for start in epochs[::together]:
    block = plan.block_of(start, together=together, config=config)
    planned += _block(items, buckets, block, config)
  padding, empty = _shares(items, planned)
  assert padding <= 0.10
  assert empty <= 0.03
  single = dataclasses.replace(config, num_buckets=1)
  one = plan.make_buckets(items, single, speeds=_SPEEDS)
  padding, _ = _shares(items, _block(items, one, range(10), single))
  assert padding > 0.4  # the negative control


def test_how_many_epochs_go_together():
  def together(count, **changes):
    config = dataclasses.replace(_CONFIG, **changes)
    items = _items(count)
    buckets = plan.make_buckets(items, config, speeds=_SPEEDS)
    return plan.epochs_together(items, buckets, config)

  assert together(1000) == 1  # an epoch fills every bucket many times
  assert 1 < together(60) <= 20
  assert together(4) == 1  # batches would be copies of the same few
  assert together(1000, plan_epochs=3) == 3
  assert together(60, plan_epochs=1) == 1


def test_blocks_lie_behind_the_short_first_epochs():
  config = dataclasses.replace(_CONFIG, short_first_epochs=2)
  blocks = [plan.block_of(n, together=3, config=config) for n in range(9)]
  assert blocks[:2] == [range(0, 1), range(1, 2)]
  assert blocks[2] == blocks[3] == blocks[4] == range(2, 5)
  assert blocks[5] == range(5, 8)


@pytest.mark.parametrize('widths', [1, 2, 3])
def test_buckets_by_frames_and_tokens(items, widths):
  config = dataclasses.replace(_CONFIG, num_token_buckets=widths)
  buckets = plan.make_buckets(items, config, speeds=_SPEEDS, multiple=2)
  assert len(buckets) <= config.num_buckets * widths
  assert (len(buckets) > config.num_buckets) == (widths > 1)
  assert buckets == sorted(buckets, key=lambda b: (b.max_frames, b.max_tokens))
  by_frames = collections.defaultdict(list)
  for bucket in buckets:
    by_frames[bucket.max_frames].append(bucket)
    assert bucket.max_frames * bucket.batch_size <= config.batch_frames
  assert len(by_frames) == config.num_buckets
  for alike in by_frames.values():
    assert len({bucket.batch_size for bucket in alike}) == 1
  seen = []
  for batch in _block(items, buckets, range(2), config):
    assert batch.bucket in buckets
    for index, speed in zip(batch.indices, batch.speeds, strict=True):
      item = items[index]
      frames = plan.num_frames(item.seconds, speed, config.features)
      assert frames <= batch.bucket.max_frames
      assert item.num_tokens <= batch.bucket.max_tokens
      seen.append(index)
  assert sorted(seen) == sorted(2 * list(range(len(items))))


def _token_padding(items, planned):
  padded = sum(b.bucket.max_tokens * len(b.indices) for b in planned)
  return (
    1 - sum(items[i].num_tokens for b in planned for i in b.indices) / padded
  )


def test_token_buckets_pad_fewer_tokens(items, buckets):
  config = dataclasses.replace(_CONFIG, num_token_buckets=3)
  finer = plan.make_buckets(items, config, speeds=_SPEEDS, multiple=2)
  before = _token_padding(items, _block(items, buckets, range(10)))
  after = _token_padding(items, _block(items, finer, range(10), config))
  assert after < 0.7 * before


def _mixed_items(sizes):
  items = _items(sum(sizes))
  parts = np.repeat(np.arange(len(sizes)), sizes)
  return [
    dataclasses.replace(item, part=int(part))
    for item, part in zip(items, parts, strict=True)
  ]


def test_shares_are_those_of_the_utterances():
  items = _mixed_items((30, 170, 100))
  shares = (0.5, 0.2, 0.3)
  buckets = plan.make_buckets(items, _CONFIG, speeds=_SPEEDS)

  def draws(epoch, shares=shares):
    planned = _epoch(items, buckets, epoch=epoch, shares=shares)
    return [
      (index, number)
      for batch in planned
      for index, number in zip(batch.indices, batch.rounds, strict=True)
    ]

  total = collections.Counter()
  for epoch in range(6):
    parts = collections.Counter(items[i].part for i, _ in draws(epoch))
    assert parts == {0: 150, 1: 60, 2: 90}
    for index, number in sorted(draws(epoch), key=lambda draw: draw[1]):
      assert number == total[index]  # how often it came before
      total[index] += 1
    for part in range(3):  # nobody is left behind
      counts = [total[i] for i, item in enumerate(items) if item.part == part]
      assert max(counts) - min(counts) <= 1
  assert draws(2) == draws(2)
  # The negative control: without weights the sizes decide.
  parts = collections.Counter(items[i].part for i, _ in draws(0, ()))
  assert parts == {0: 30, 1: 170, 2: 100}


@pytest.mark.parametrize('num_hosts', [1, 2, 3])
def test_hosts_share_the_rows_of_a_batch(items, num_hosts):
  buckets = plan.make_buckets(items, _CONFIG, speeds=_SPEEDS, multiple=6)
  planned = _epoch(items[:-1], buckets)
  assert any(len(b.indices) < b.bucket.batch_size for b in planned)
  for batch in planned:
    parts = [
      plan.of_host(batch, host_index=host, num_hosts=num_hosts)
      for host in range(num_hosts)
    ]
    for field in ('indices', 'speeds', 'rounds'):
      joined = sum((getattr(part, field) for part in parts), ())
      assert joined == getattr(batch, field)
    for part in parts:
      assert part.bucket.batch_size * num_hosts == batch.bucket.batch_size
      assert len(part.indices) <= part.bucket.batch_size
      assert part.bucket.max_frames == batch.bucket.max_frames


def test_hosts_that_do_not_divide_a_batch_are_refused(items, buckets):
  batch = _epoch(items, buckets)[0]
  with pytest.raises(ValueError, match='7 hosts'):
    plan.of_host(batch, host_index=0, num_hosts=7)


def test_a_transcript_without_tokens_is_refused():
  silent = plan.Item('a', 2.0, 0, 0)
  assert (
    plan.rejection(silent, _CONFIG, rate=4, min_input=7) == 'too_few_tokens'
  )
  allowed = dataclasses.replace(_CONFIG, min_tokens=0)
  assert plan.rejection(silent, allowed, rate=4, min_input=7) is None


def test_configured_batch_sizes_are_kept(items, buckets):
  sizes = (40, 12, 10, 4, 2)
  config = dataclasses.replace(_CONFIG, batch_sizes=sizes)
  given = plan.make_buckets(items, config, speeds=_SPEEDS)
  assert tuple(bucket.batch_size for bucket in given) == sizes
  assert [b.max_frames for b in given] == [b.max_frames for b in buckets]
  few = dataclasses.replace(_CONFIG, batch_sizes=sizes[:3])
  with pytest.raises(config_lib.ConfigError, match=r'batch_sizes has 3 sizes'):
    plan.make_buckets(items, few, speeds=_SPEEDS)
