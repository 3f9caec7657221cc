"""Waveform augmentation: levels, spectra and rooms are what was asked for."""

import numpy as np
import pytest
from scipy import signal

from data_pipelines import waveform

_RATE = 16000


def _rng(seed=0):
  return np.random.default_rng(seed)


def _speech(seconds=1.0, seed=0):
  return _rng(seed).normal(0, 0.1, int(seconds * _RATE)).astype(np.float32)


def _db(ratio):
  return 10 * np.log10(ratio)


def _power(samples):
  return np.mean(np.square(samples, dtype=np.float64))


@pytest.mark.parametrize('snr', [-5.0, 0.0, 13.0])
@pytest.mark.parametrize('length', [100, 16000, 50000])
def test_noise_has_the_ratio_asked_for(snr, length):
  samples = _speech()
  noise = 7.0 * _rng(1).normal(size=length)
  mixed = waveform.add_noise(samples, noise, snr)
  assert mixed.dtype == np.float32
  added = mixed.astype(np.float64) - samples
  assert _db(_power(samples) / _power(added)) == pytest.approx(snr, abs=1e-3)
  # The noise is the one given, repeated or cut.
  np.testing.assert_allclose(
    added / np.std(added),
    np.resize(noise, samples.shape) / np.std(np.resize(noise, samples.shape)),
    atol=1e-2,
  )


def test_noise_without_the_right_gain_has_another_ratio():
  """The negative control of the law above."""
  samples, noise = _speech(), _rng(1).normal(size=16000)
  ratio = _db(_power(samples) / _power(noise))
  assert ratio != pytest.approx(0.0, abs=1.0)


def test_silence_has_no_ratio():
  silence, noise = np.zeros(500, np.float32), _speech()
  assert waveform.add_noise(silence, noise, 10.0) is silence
  assert waveform.add_noise(noise, silence, 10.0) is noise


def test_volume_is_in_decibels():
  samples = _speech()
  louder = waveform.change_volume(samples, 20.0)
  np.testing.assert_allclose(louder, 10 * samples, rtol=1e-6)
  assert louder.dtype == np.float32


@pytest.mark.parametrize(
  ('colour', 'slope'), [('white', 0.0), ('pink', -10.0), ('brown', -20.0)]
)
def test_noise_falls_by_its_colour(colour, slope):
  noise = waveform.coloured_noise(40 * _RATE, colour, _rng())
  assert noise.shape == (40 * _RATE,)
  assert noise.dtype == np.float32
  frequencies, density = signal.welch(noise, _RATE, nperseg=4096)
  inside = (frequencies > 100) & (frequencies < 6000)
  fit = np.polyfit(np.log10(frequencies[inside]), _db(density[inside]), 1)
  assert fit[0] == pytest.approx(slope, abs=0.5)  # dB a decade


def test_one_sample_of_noise():
  assert waveform.coloured_noise(1, 'pink', _rng()).shape == (1,)


@pytest.mark.parametrize('seconds', [0.2, 0.6])
def test_a_room_dies_away_in_its_time(seconds):
  response = waveform.room_response(seconds, _rng(), sample_rate=_RATE)
  assert response[0] == np.abs(response).max() == 1.0
  tail = response[200:].astype(np.float64)
  left = _db(np.cumsum(tail[::-1] ** 2)[::-1])  # Schroeder's integral
  half = len(tail) // 2
  per_second = (left[half] - left[0]) / (half / _RATE)
  assert -60 / per_second == pytest.approx(seconds, rel=0.1)


def test_a_room_of_one_impulse_changes_nothing():
  samples = _speech()
  for delay in (0, 1, 333):
    response = np.zeros(500)
    response[delay] = -0.3
    wet = waveform.reverberate(samples, response)
    np.testing.assert_allclose(wet, -samples, atol=1e-6)


def test_an_echo_comes_when_it_should_and_the_level_stays():
  samples = np.zeros(4000, np.float32)
  samples[1000] = 1.0
  response = np.zeros(900)
  response[[100, 900 - 1]] = 1.0, 0.5
  wet = waveform.reverberate(samples, response)
  assert sorted(np.argsort(np.abs(wet))[-2:]) == [1000, 1799]
  assert wet[1799] / wet[1000] == pytest.approx(0.5, rel=1e-5)
  assert _power(wet) == pytest.approx(_power(samples), rel=1e-5)
  assert wet.dtype == np.float32


def test_the_generator_decides():
  for make in (
    lambda rng: waveform.coloured_noise(1000, 'pink', rng),
    lambda rng: waveform.room_response(0.1, rng, sample_rate=_RATE),
  ):
    np.testing.assert_array_equal(make(_rng(1)), make(_rng(1)))
    assert not np.array_equal(make(_rng(1)), make(_rng(2)))
