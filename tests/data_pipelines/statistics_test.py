"""CMVN statistics: the same bits for any number of workers."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines import statistics
from data_pipelines import synthetic
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import cmvn
from u2moe_jax.frontend import fbank

_FEATURES = config_lib.FeatureConfig(num_mel_bins=20)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('tones')
  synthetic.write_corpus(path, num_utterances=9, seed=2)
  return path


def _source(folder):
  return sources.open_source(str(folder / 'manifest.jsonl'))


def _bits(stats):
  return stats.sum.tobytes(), stats.sum_squares.tobytes(), stats.count


def _in_order(source, indices):
  stats = cmvn.empty(20)
  for index in indices:
    frames = fbank.fbank(source.load(index), _FEATURES)
    stats = cmvn.accumulate(stats, frames)
  return stats


@pytest.mark.parametrize('num_workers', [0, 1, 2, 5])
def test_any_number_of_workers_gives_the_same_bits(folder, num_workers):
  source = _source(folder)
  stats = statistics.compute_cmvn(source, _FEATURES, num_workers=num_workers)
  assert _bits(stats) == _bits(_in_order(source, range(9)))


def test_another_order_has_other_bits(folder):
  """The negative control: sums of floats depend on the order."""
  source = _source(folder)
  forward = _in_order(source, range(9))
  backward = _in_order(source, reversed(range(9)))
  assert _bits(forward) != _bits(backward)
  np.testing.assert_allclose(forward.mean, backward.mean)


def test_no_more_are_taken_than_wanted(folder):
  source = _source(folder)
  for most in (3, 4):
    stats = statistics.compute_cmvn(source, _FEATURES, most=most)
    assert _bits(stats) == _bits(_in_order(source, (0, 3, 6)))


def test_dither_is_no_part_of_it(folder):
  source = _source(folder)
  loud = dataclasses.replace(_FEATURES, dither=100.0)
  assert _bits(statistics.compute_cmvn(source, loud)) == _bits(
    statistics.compute_cmvn(source, _FEATURES)
  )
  floor = dataclasses.replace(_FEATURES, mel_floor=1e6)
  assert _bits(statistics.compute_cmvn(source, floor)) != _bits(
    statistics.compute_cmvn(source, _FEATURES)
  )


def test_what_cannot_be_read_is_passed_over(folder, tmp_path):
  good = manifest.read(folder / 'manifest.jsonl')
  lost = dataclasses.replace(good[0], key='lost', wav=str(tmp_path / 'no.wav'))
  manifest.write(tmp_path / 'some.jsonl', [good[0], lost, good[1]])
  some = statistics.compute_cmvn(
    sources.open_source(str(tmp_path / 'some.jsonl')), _FEATURES
  )
  assert _bits(some) == _bits(_in_order(_source(folder), (0, 1)))
  manifest.write(tmp_path / 'none.jsonl', [lost])
  nothing = sources.open_source(str(tmp_path / 'none.jsonl'))
  with pytest.raises(ValueError, match='no frame in 1 utterances'):
    statistics.compute_cmvn(nothing, _FEATURES)
