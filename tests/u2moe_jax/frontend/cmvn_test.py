"""CMVN statistics: sums in any order, and both file forms."""

import itertools
import json

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from u2moe_jax.frontend import cmvn


def _frames(count=50, num_bins=5, seed=0):
  rng = np.random.default_rng(seed)
  frames = 12.0 + 3.0 * rng.standard_normal((count, num_bins))
  return frames.astype(np.float32)


def _stats(frames):
  return cmvn.accumulate(cmvn.empty(frames.shape[1]), frames)


def _assert_same(a, b, rtol=0.0):
  np.testing.assert_allclose(a.sum, b.sum, rtol=rtol)
  np.testing.assert_allclose(a.sum_squares, b.sum_squares, rtol=rtol)
  assert a.count == b.count


def _kaldi_text(stats, key=''):
  first = ' '.join(repr(float(value)) for value in stats.sum)
  second = ' '.join(repr(float(value)) for value in stats.sum_squares)
  return f'{key} [\n  {first} {stats.count}\n  {second} 0 ]\n'


def test_mean_and_istd_are_those_of_numpy():
  frames = _frames()
  stats = _stats(frames)
  wide = frames.astype(np.float64)
  np.testing.assert_allclose(stats.mean, wide.mean(axis=0), rtol=1e-12)
  np.testing.assert_allclose(stats.istd, 1 / wide.std(axis=0), rtol=1e-9)
  assert stats.mean.dtype == stats.istd.dtype == np.float64


def test_normalised_frames_have_mean_0_and_deviation_1():
  frames = _frames()
  stats = _stats(frames)
  normal = (frames - stats.mean) * stats.istd
  np.testing.assert_allclose(normal.mean(axis=0), 0.0, atol=1e-9)
  np.testing.assert_allclose(normal.std(axis=0), 1.0, rtol=1e-9)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(cuts=st.lists(st.integers(0, 50), max_size=6))
def test_merging_parts_is_accumulating_the_whole(cuts):
  frames = _frames()
  edges = [0, *sorted(cuts), len(frames)]
  merged = accumulated = cmvn.empty(frames.shape[1])
  for start, end in itertools.pairwise(edges):
    merged = cmvn.merge(_stats(frames[start:end]), merged)
    accumulated = cmvn.accumulate(accumulated, frames[start:end])
  _assert_same(merged, _stats(frames), rtol=1e-12)
  _assert_same(accumulated, _stats(frames), rtol=1e-12)


def test_a_lost_frame_is_noticed():
  frames = _frames()
  with pytest.raises(AssertionError):
    _assert_same(_stats(frames[1:]), _stats(frames), rtol=1e-12)


def test_sums_do_not_lose_digits_of_float32():
  frames = np.full((100_000, 1), 16.1, np.float32)
  stats = _stats(frames)
  assert stats.mean[0] == pytest.approx(float(frames[0, 0]), rel=1e-12)


def test_a_bin_that_never_changes_has_a_finite_istd():
  stats = cmvn.CmvnStats(np.array([8.0]), np.array([32.0]), 2)
  assert stats.istd == pytest.approx(1e10)


def test_statistics_are_not_changed_in_place():
  stats = cmvn.empty(5)
  cmvn.accumulate(stats, _frames())
  assert stats.count == 0
  assert not stats.sum.any()


def test_a_saved_file_gives_back_the_same_numbers(tmp_path):
  stats = _stats(_frames())
  cmvn.save(tmp_path / 'cmvn', stats)
  _assert_same(cmvn.load(tmp_path / 'cmvn'), stats)


def test_the_file_has_the_layout_of_wenet(tmp_path):
  cmvn.save(tmp_path / 'cmvn', _stats(_frames()))
  tree = json.loads((tmp_path / 'cmvn').read_text())
  assert list(tree) == ['mean_stat', 'var_stat', 'frame_num']
  assert len(tree['mean_stat']) == len(tree['var_stat']) == 5
  assert tree['frame_num'] == 50


@pytest.mark.parametrize('key', ['', 'global'])
def test_kaldi_text_gives_the_same_numbers(tmp_path, key):
  stats = _stats(_frames())
  (tmp_path / 'cmvn').write_text(_kaldi_text(stats, key))
  _assert_same(cmvn.load(tmp_path / 'cmvn'), stats)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'brackets'),
    (b'\0BDM \x04\xff\xff', "can't decode"),
    (b'[ 1 2 3', 'brackets'),
    (b'[ 1 2 3 4 5 ]', 'two rows'),
    (b'[ 1 two 3 0 ]', 'two'),
    (b'{"mean_stat": [1]', 'Expecting'),
    (b'{"mean_stat": [1], "frame_num": 2}', 'var_stat'),
    (b'{"mean_stat": [1], "var_stat": [1, 2], "frame_num": 2}', 'shapes'),
    (b'{"mean_stat": [1], "var_stat": ["x"], "frame_num": 2}', "'x'"),
    (b'{"mean_stat": [{}], "var_stat": [1], "frame_num": 2}', 'numbers'),
    (b'{"mean_stat": [1], "var_stat": [1], "frame_num": null}', 'frame_num'),
    (b'{"mean_stat": [1], "var_stat": [1], "frame_num": 0}', 'no frames'),
    (b'{"mean_stat": [1], "var_stat": [1], "frame_num": Infinity}', 'infinity'),
    (b'{"mean_stat": [], "var_stat": [], "frame_num": 2}', 'no bins'),
    (b'{"mean_stat": [NaN], "var_stat": [1], "frame_num": 2}', 'NaN'),
  ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
  path = tmp_path / 'broken_cmvn'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    cmvn.load(path)
  assert str(path) in str(caught.value)


def test_other_bins_are_refused():
  with pytest.raises(ValueError, match='shape'):
    cmvn.accumulate(cmvn.empty(80), _frames())
  with pytest.raises(ValueError, match='80 and 5'):
    cmvn.merge(cmvn.empty(80), cmvn.empty(5))


def test_frames_that_are_not_numbers_are_refused():
  frames = _frames()
  frames[3, 2] = np.nan
  with pytest.raises(ValueError, match='NaN'):
    _stats(frames)


def test_no_frames_have_no_mean():
  with pytest.raises(ValueError, match='no frames'):
    _ = cmvn.empty(5).mean
  with pytest.raises(ValueError, match='no frames'):
    _ = cmvn.empty(5).istd
