"""Filterbank: equal to Kaldi's, and the same however a stream is cut."""

import dataclasses
import itertools
import pathlib

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.frontend import fbank

CONFIG = config_lib.FeatureConfig()
GOLDEN = pathlib.Path(__file__).parents[2] / 'testdata' / 'fbank_golden.npz'
LOG_FLOOR = np.log(np.float32(1.1920929e-07))


def _golden():
  with np.load(GOLDEN) as arrays:
    samples = arrays['samples'].astype(np.float32) / 32768.0
    return samples, arrays['frames']


def _noise(num_samples, seed=0):
  rng = np.random.default_rng(seed)
  return 0.1 * rng.standard_normal(num_samples).astype(np.float32)


def _tone(frequency, seconds=0.3):
  time = np.arange(int(seconds * CONFIG.sample_rate)) / CONFIG.sample_rate
  return 0.5 * np.sin(2 * np.pi * frequency * time)


def _mel(frequency):
  return 1127.0 * np.log(1.0 + frequency / 700.0)


def _stream(samples, cuts):
  stream = fbank.StreamingFbank(CONFIG)
  edges = [0, *sorted(cuts), len(samples)]
  pieces = [samples[a:b] for a, b in itertools.pairwise(edges)]
  return np.concatenate([stream.accept(piece) for piece in pieces])


def _by_hand(samples, frame, mel_bin):
  """One value of the filterbank, written as sums."""
  window = samples[frame * 160 : frame * 160 + 400].astype(np.float64) * 32768
  window = window - window.mean()
  previous = np.concatenate([window[:1], window[:-1]])
  phase = 2 * np.pi * np.arange(400) / 399
  shape = (0.5 - 0.5 * np.cos(phase)) ** 0.85
  emphasised = (window - 0.97 * previous) * shape
  corners = np.linspace(_mel(20.0), _mel(8000.0), 82)[mel_bin : mel_bin + 3]
  energy = 0.0
  for k in range(256):
    wave = np.exp(-2j * np.pi * k * np.arange(400) / 512)
    rise, fall = np.diff(corners)
    mel = _mel(k * 31.25)
    weight = min((mel - corners[0]) / rise, (corners[2] - mel) / fall)
    energy += max(weight, 0.0) * abs(emphasised @ wave) ** 2
  return np.log(energy)


def test_equals_kaldi():
  samples, expected = _golden()
  frames = fbank.fbank(samples, CONFIG)
  assert frames.shape == expected.shape
  assert frames.dtype == np.float32
  error = np.abs(frames - expected)
  assert error.max() < 1e-2
  assert error.mean() < 5e-5


@pytest.mark.parametrize('change', [{'low_freq': 0.0}, {'sample_rate': 16080}])
def test_other_settings_are_not_kaldi_within_the_tolerance(change):
  samples, expected = _golden()
  other = dataclasses.replace(CONFIG, **change)
  frames = fbank.fbank(samples, other)
  count = min(len(frames), len(expected))
  assert np.abs(frames[:count] - expected[:count]).mean() > 5e-5


@pytest.mark.parametrize(('frame', 'mel_bin'), [(0, 3), (2, 40), (5, 79)])
def test_equals_the_definition(frame, mel_bin):
  samples = _noise(2000)
  value = fbank.fbank(samples, CONFIG)[frame, mel_bin]
  assert value == pytest.approx(_by_hand(samples, frame, mel_bin), abs=1e-5)


@pytest.mark.parametrize('frequency', [300.0, 1000.0, 3000.0, 7000.0])
def test_a_tone_peaks_in_its_mel_bin(frequency):
  centres = np.linspace(_mel(20.0), _mel(8000.0), 82)[1:-1]
  expected = np.argmin(np.abs(centres - _mel(frequency)))
  frames = fbank.fbank(_tone(frequency), CONFIG)
  assert (frames.argmax(axis=1) == expected).all()


def test_twice_as_loud_is_the_log_of_four_higher():
  samples = _noise(4000)
  louder = fbank.fbank(2 * samples, CONFIG) - fbank.fbank(samples, CONFIG)
  np.testing.assert_allclose(louder, np.log(4.0), atol=1e-5)


def test_a_constant_offset_does_not_matter():
  samples = _noise(4000).astype(np.float64)
  frames = fbank.fbank(samples + 0.25, CONFIG)
  np.testing.assert_allclose(frames, fbank.fbank(samples, CONFIG), atol=1e-5)


def test_silence_is_the_floor():
  frames = fbank.fbank(np.zeros(800), CONFIG)
  np.testing.assert_array_equal(frames, np.full_like(frames, LOG_FLOOR))


@pytest.mark.parametrize(
  ('num_samples', 'count'),
  [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16000, 98)],
)
def test_frames_snip_the_edges(num_samples, count):
  assert fbank.num_frames(num_samples, CONFIG) == count
  frames = fbank.fbank(np.zeros(num_samples), CONFIG)
  assert frames.shape == (count, 80)
  assert frames.dtype == np.float32


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  num_samples=st.integers(0, 30000),
  seed=st.integers(0, 9),
  data=st.data(),
)
def test_a_stream_gives_the_bits_of_the_whole(num_samples, seed, data):
  samples = _noise(num_samples, seed)
  cuts = data.draw(st.lists(st.integers(0, num_samples), max_size=12))
  whole = fbank.fbank(samples, CONFIG)
  np.testing.assert_array_equal(_stream(samples, cuts), whole)


def test_a_stream_of_single_frames_gives_the_bits_of_the_whole():
  samples = _noise(24000)
  whole = fbank.fbank(samples, CONFIG)
  cuts = range(400, len(samples), 160)
  np.testing.assert_array_equal(_stream(samples, cuts), whole)


def test_pieces_without_a_carry_are_not_the_whole():
  samples = _noise(8000)
  whole = fbank.fbank(samples, CONFIG)
  halves = [fbank.fbank(half, CONFIG) for half in np.split(samples, 2)]
  joined = np.concatenate(halves)
  assert len(joined) < len(whole)
  assert not np.array_equal(joined, whole[: len(joined)])


def test_a_frame_sees_its_window_only():
  samples = _noise(4000)
  changed = samples.copy()
  changed[10 * 160 + 400 :] = 0.0
  before = fbank.fbank(samples, CONFIG)
  after = fbank.fbank(changed, CONFIG)
  np.testing.assert_array_equal(before[:11], after[:11])
  assert not np.array_equal(before[11], after[11])


def test_dither_needs_a_generator_and_a_size():
  samples = _noise(4000)
  plain = fbank.fbank(samples, CONFIG)
  rng = np.random.default_rng(3)
  silent = dataclasses.replace(CONFIG, dither=0.0)
  np.testing.assert_array_equal(fbank.fbank(samples, silent, rng=rng), plain)
  assert not np.array_equal(fbank.fbank(samples, CONFIG, rng=rng), plain)


def test_dither_follows_its_seed():
  samples = _noise(24000)
  first, second, other = (
    fbank.fbank(samples, CONFIG, rng=np.random.default_rng(seed))
    for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, second)
  assert not np.array_equal(first, other)


@pytest.mark.parametrize('deviation', [0.5, 2.0])
def test_dither_has_the_power_of_its_deviation(deviation):
  # White noise of variance s^2 has the expected power spectrum
  # s^2 * |H|^2 * sum(w^2), with the pre-emphasis H and the window w.
  noisy = dataclasses.replace(CONFIG, dither=deviation)
  rng = np.random.default_rng(0)
  frames = fbank.fbank(np.zeros(480000), noisy, rng=rng)
  emphasis = np.abs(1 - 0.97 * np.exp(-1j * np.pi * np.arange(257) / 256)) ** 2
  window = np.sum(np.hanning(400) ** 1.7)
  expected = fbank.mel_filters(CONFIG) @ emphasis * deviation**2 * window
  loud = slice(40, None)  # lower down, the removed mean weighs in
  energy = np.exp(frames.astype(np.float64)).mean(axis=0)
  np.testing.assert_allclose(energy[loud], expected[loud], rtol=0.06)


def test_the_filters_share_each_bin_between_two():
  filters = fbank.mel_filters(CONFIG)
  assert filters.shape == (80, 257)
  assert (np.count_nonzero(filters, axis=0) <= 2).all()
  mel = _mel(np.arange(257) * 31.25)
  corners = np.linspace(_mel(20.0), _mel(8000.0), 82)
  inside = (mel > corners[1]) & (mel < corners[-2])
  np.testing.assert_allclose(filters.sum(axis=0)[inside], 1.0, atol=1e-9)


@pytest.mark.parametrize(
  'samples', [np.zeros(800, np.int16), np.zeros((800, 2)), np.zeros((2, 800))]
)
def test_other_arrays_are_refused(samples):
  with pytest.raises(ValueError, match='as_mono'):
    fbank.fbank(samples, CONFIG)


def test_impossible_settings_are_refused():
  high = dataclasses.replace(CONFIG, low_freq=8000.0)
  with pytest.raises(ValueError, match='low_freq'):
    fbank.fbank(np.zeros(800), high)
  sparse = dataclasses.replace(CONFIG, frame_shift_ms=30.0)
  with pytest.raises(ValueError, match='frame_shift_ms'):
    fbank.StreamingFbank(sparse)
