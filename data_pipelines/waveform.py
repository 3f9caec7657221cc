"""Augmentation of waveforms, NumPy: volume, noise, reverberation.

Floats may leave [-1, 1] here; nothing is clipped, for the features do not
mind.
"""

from jaxtyping import Float
import numpy as np

# Power falls with the frequency to this power.
_SLOPES = {'white': 0.0, 'pink': 1.0, 'brown': 2.0}
NOISE_COLOURS = tuple(_SLOPES)

# Between a talker at arm's length and one across a room.
_DIRECT_TO_REVERBERANT_DB = (0.0, 12.0)
_FIRST_REFLECTION_SECONDS = 0.0025


def change_volume(
  samples: Float[np.ndarray, 'samples'], gain_db: float
) -> Float[np.ndarray, 'samples']:
  """Makes a waveform louder by `gain_db`."""
  return samples * np.float32(10.0 ** (gain_db / 20.0))


def add_noise(
  samples: Float[np.ndarray, 'samples'],
  noise: Float[np.ndarray, 'noise'],
  snr_db: float,
) -> Float[np.ndarray, 'samples']:
  """Adds noise at a signal-to-noise ratio.

  Args:
    samples: mono waveform.
    noise: of any length and level; repeated or cut to fit.
    snr_db: mean power of `samples` over that of the noise, in dB.

  Returns:
    float32 of the shape of `samples`; `samples` itself where either of the
    two is silent, for there is no such ratio then.
  """
  noise = np.resize(noise, samples.shape)  # repeats it
  signal_power, noise_power = _power(samples), _power(noise)
  if signal_power == 0.0 or noise_power == 0.0:
    return samples
  gain = np.sqrt(signal_power / noise_power * 10.0 ** (-snr_db / 10.0))
  return samples + np.float32(gain) * noise.astype(np.float32)


def reverberate(
  samples: Float[np.ndarray, 'samples'],
  response: Float[np.ndarray, 'response'],
) -> Float[np.ndarray, 'samples']:
  """Convolves with the impulse response of a room.

  Args:
    samples: mono waveform.
    response: impulse response of any level. Its peak counts as the direct
      sound, so that words keep their times.

  Returns:
    float32 of the shape and the mean power of `samples`.
  """
  response = response.astype(np.float32)
  wet = _convolve(samples, response)
  direct = int(np.argmax(np.abs(response)))
  # What comes before the direct sound is delay, which would move the words.
  wet = wet[direct : direct + len(samples)]
  power = _power(wet)
  if power == 0.0:
    return wet
  return wet * np.float32(np.sqrt(_power(samples) / power))


def _convolve(
  samples: Float[np.ndarray, 'samples'], response: Float[np.ndarray, 'response']
) -> Float[np.ndarray, 'longer']:
  from scipy import fft  # slower to import than the rest of the package

  # Room for the whole tail: a Fourier transform of less would wrap it round to
  # the beginning.
  length = len(samples) + len(response) - 1
  size = fft.next_fast_len(length, real=True)
  spectrum = fft.rfft(samples, size) * fft.rfft(response, size)
  return fft.irfft(spectrum, size)[:length]


def coloured_noise(
  num_samples: int, colour: str, rng: np.random.Generator
) -> Float[np.ndarray, 'samples']:
  """Makes noise: `white`, `pink` (power 1 / f) or `brown` (1 / f^2)."""
  white = rng.standard_normal(num_samples, np.float32)
  slope = _SLOPES[colour]
  if not slope or num_samples < 2:
    return white
  from scipy import fft  # slower to import than the rest of the package

  size = fft.next_fast_len(num_samples, real=True)
  spectrum = fft.rfft(white, size)
  frequencies = np.arange(len(spectrum), dtype=np.float32)
  frequencies[0] = np.inf  # no offset
  # Half the slope: power is the square of the amplitude.
  spectrum *= frequencies ** np.float32(-slope / 2)
  return fft.irfft(spectrum, size)[:num_samples]


def room_response(
  seconds: float, rng: np.random.Generator, *, sample_rate: int
) -> Float[np.ndarray, 'response']:
  """Makes an impulse response: direct sound, and noise that dies away.

  Args:
    seconds: reverberation time RT60, in which the tail falls by 60 dB; the
      response is as long.
    rng: draws the tail, and how much of it there is.
    sample_rate: in Hz.

  Returns:
    float32; the first sample is the direct sound, of height 1.
  """
  num_samples = max(1, round(seconds * sample_rate))
  times = np.arange(num_samples, dtype=np.float32) / sample_rate
  tail = rng.standard_normal(num_samples, np.float32)
  # 60 dB of power are a factor of 1000 in amplitude.
  tail *= 10.0 ** (-3.0 * times / seconds)
  # Nothing is heard between the direct sound and the nearest wall.
  tail[times < _FIRST_REFLECTION_SECONDS] = 0.0
  ratio = 10.0 ** (-rng.uniform(*_DIRECT_TO_REVERBERANT_DB) / 10.0)
  energy = float(np.sum(np.square(tail)))
  response = tail * np.float32(np.sqrt(ratio / energy)) if energy else tail
  response[0] = 1.0
  return response


def _power(samples: np.ndarray) -> float:
  """Mean power, summed in float64."""
  if len(samples) == 0:
    return 0.0
  return float(np.mean(np.square(samples, dtype=np.float64)))
