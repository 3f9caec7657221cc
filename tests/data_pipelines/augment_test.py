"""Augmentation: what it may change, how often, and that it is repeatable."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import augment
from u2moe_jax import config as config_lib

_CONFIG = config_lib.AugmentConfig(max_trim=20)
_FRAMES = np.random.default_rng(0).normal(5.0, 1.0, (120, 40))


def _rng(seed):
  return np.random.default_rng(seed)


@pytest.mark.parametrize(
  'step',
  [augment.spec_augment, augment.spec_substitute, augment.spec_trim],
)
def test_the_generator_decides_and_the_input_stays(step):
  before = _FRAMES.copy()
  first, again = (step(_FRAMES, _rng(3), _CONFIG) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(_FRAMES, before)
  outputs = [step(_FRAMES, _rng(seed), _CONFIG) for seed in range(5)]
  assert any(not np.array_equal(first, other) for other in outputs)


def _widths(num_masks, max_width, axis):
  """How much one mask of an axis removes, over many draws."""
  config = dataclasses.replace(
    _CONFIG,
    num_time_masks=num_masks if axis == 0 else 0,
    max_time_mask=max_width,
    num_freq_masks=num_masks if axis == 1 else 0,
    max_freq_mask=max_width,
  )
  widths = []
  for seed in range(400):
    masked = augment.spec_augment(_FRAMES, _rng(seed), config) == 0.0
    lines = masked.all(axis=1 - axis)
    # Whole lines and nothing else are masked.
    assert masked.sum() == lines.sum() * _FRAMES.shape[1 - axis]
    widths.append(lines.sum())
  return np.array(widths)


@pytest.mark.parametrize('axis', [0, 1])
def test_mask_widths_are_uniform_up_to_the_limit(axis):
  size, limit = _FRAMES.shape[axis], 8
  widths = _widths(1, limit, axis)
  assert widths.min() == 1
  assert widths.max() == limit
  # Mean of min(width, size - start), width ~ U{1..8}, start ~ U{0..size-1}.
  expected = np.mean(
    [min(w, size - s) for w in range(1, limit + 1) for s in range(size)]
  )
  assert abs(widths.mean() - expected) < 4 * widths.std() / 20


def test_more_masks_remove_more():
  assert _widths(3, 8, 0).mean() > 2 * _widths(1, 8, 0).mean()
  assert not _widths(0, 8, 0).any()


def test_substitutes_come_from_earlier_original_frames():
  frames = np.arange(100.0)[:, None]  # a frame is its own number
  moved = 0
  for seed in range(50):
    result = augment.spec_substitute(frames, _rng(seed), _CONFIG)[:, 0]
    assert set(result) <= set(frames[:, 0])
    assert (result <= frames[:, 0]).all()
    moved += (result < frames[:, 0]).any()
    config = dataclasses.replace(_CONFIG, num_substitutions=1)
    one = augment.spec_substitute(frames, _rng(seed), config)[:, 0]
    changed = np.flatnonzero(one != frames[:, 0])
    if len(changed):
      assert len(changed) <= _CONFIG.max_substitution
      assert len(set(frames[changed, 0] - one[changed])) == 1
      np.testing.assert_array_equal(np.diff(changed), 1)
  assert moved > 40


def test_trim_drops_a_tail_shorter_than_half():
  lengths = set()
  for seed in range(300):
    result = augment.spec_trim(_FRAMES, _rng(seed), _CONFIG)
    np.testing.assert_array_equal(result, _FRAMES[: len(result)])
    lengths.add(len(_FRAMES) - len(result))
  assert lengths == set(range(1, 21))
  short = _FRAMES[:10]
  for seed in range(100):
    assert len(augment.spec_trim(short, _rng(seed), _CONFIG)) > 5
  off = config_lib.AugmentConfig()
  assert augment.spec_trim(_FRAMES, _rng(0), off) is _FRAMES


def test_one_frame_survives():
  one = _FRAMES[:1]
  assert augment.spec_augment(one, _rng(0), _CONFIG).shape == (1, 40)
  np.testing.assert_array_equal(
    augment.spec_substitute(one, _rng(0), _CONFIG), one
  )
