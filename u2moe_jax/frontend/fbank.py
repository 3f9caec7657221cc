"""Computes Kaldi's log-mel filterbank, of a whole utterance or in pieces.

Equal to Kaldi's `compute-fbank-feats` with the povey window, pre-emphasis
0.97, DC removal, power spectrum, no energy and snipped edges, on samples
scaled to the range of int16. Computed in float64.

A frame depends on its own samples and on nothing else, to the last bit: the
transform and all sums run frame by frame in one order, and no BLAS is used,
whose order of summation may depend on the number of rows. So a stream gives
exactly the frames of the whole utterance, however it is cut.
"""

import functools

from jaxtyping import Float
import numpy as np

from u2moe_jax import config as config_lib

# Kaldi computes on samples as they stand in a WAV file.
_INT16_SCALE = 32768.0
_PREEMPHASIS = 0.97
_POVEY_EXPONENT = 0.85
# One block of windows stays in the processor's cache, and its arrays in the
# allocator's: twice the frames cost four times the time, in page faults.
_BLOCK_FRAMES = 64


def num_frames(num_samples: int, config: config_lib.FeatureConfig) -> int:
  """Returns how many whole windows fit into `num_samples` samples."""
  if num_samples < config.window_samples:
    return 0
  return 1 + (num_samples - config.window_samples) // config.shift_samples


def fbank(
  samples: Float[np.ndarray, 'samples'],
  config: config_lib.FeatureConfig,
  *,
  rng: np.random.Generator | None = None,
) -> Float[np.ndarray, 'T F']:
  """Computes log-mel frames.

  Args:
    samples: mono floats within [-1, 1] at `config.sample_rate`.
    config: window, hop and filters.
    rng: source of the dither, noise of standard deviation `config.dither` on
      the int16 scale, fresh in every window; None for no dither.

  Returns:
    float32 of shape (num_frames(num_samples, config), num_mel_bins): natural
    logarithms of mel energies. No rows if there is less than one window.

  Raises:
    ValueError: if `samples` is not one row of floats.
  """
  windows = _windows(_as_double(samples), config)  # (T, window)
  shape = (len(windows), config.num_mel_bins)
  frames: np.ndarray = np.empty(shape, np.float32)
  # The windows are a view, so only a block of them is ever copied.
  for start in range(0, len(windows), _BLOCK_FRAMES):
    block = windows[start : start + _BLOCK_FRAMES] * _INT16_SCALE
    if rng is not None and config.dither > 0:
      block += config.dither * rng.standard_normal(block.shape, np.float32)
    frames[start : start + _BLOCK_FRAMES] = _log_mel(block, config)
  return frames


class StreamingFbank:
  """Computes log-mel frames of a signal that arrives in pieces.

  The frames of all calls together are bit for bit those of `fbank` on the
  whole signal without dither.
  """

  def __init__(self, config: config_lib.FeatureConfig):
    """Starts a stream.

    Args:
      config: window, hop and filters.

    Raises:
      ValueError: if the hop is longer than the window.
    """
    if config.shift_samples > config.window_samples:
      raise ValueError('frame_shift_ms must not be larger than frame_length_ms')
    self._config = config
    self._carry = np.zeros(0)  # samples that a later frame still needs

  def accept(
    self, samples: Float[np.ndarray, 'samples']
  ) -> Float[np.ndarray, 't F']:
    """Takes the next samples and returns the frames they complete.

    Args:
      samples: any number of mono floats within [-1, 1], also none.

    Returns:
      float32 of shape (new frames, num_mel_bins), possibly no rows.
    """
    pending = np.concatenate([self._carry, _as_double(samples)])
    frames = fbank(pending, self._config)
    # The next frame begins one hop behind the last one, inside of its window.
    consumed = len(frames) * self._config.shift_samples
    self._carry = pending[consumed:].copy()  # let go of the long array
    return frames


def _as_double(samples: np.ndarray) -> np.ndarray:
  samples = np.asarray(samples)
  if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
    raise ValueError(
      'fbank needs one row of float samples within [-1, 1], not '
      f'{samples.dtype} of shape {samples.shape}; audio.as_mono makes them'
    )
  return samples.astype(np.float64)


def _windows(
  samples: np.ndarray, config: config_lib.FeatureConfig
) -> np.ndarray:
  """Returns a view of the windows, (T, window)."""
  if num_frames(len(samples), config) == 0:
    return np.zeros((0, config.window_samples))
  view = np.lib.stride_tricks.sliding_window_view(
    samples, config.window_samples
  )
  return view[:: config.shift_samples]


def _log_mel(
  windows: np.ndarray, config: config_lib.FeatureConfig
) -> np.ndarray:
  """Turns int16-scaled windows (t, window) into log energies (t, F)."""
  size = config.window_samples
  windows = windows - windows.mean(axis=1, keepdims=True)
  # Zeros behind the window: the transform has a power of two, as Kaldi's.
  emphasised = np.zeros((len(windows), _fft_size(size)))  # (t, fft)
  # Kaldi takes the first sample for its own predecessor.
  emphasised[:, 0] = (1.0 - _PREEMPHASIS) * windows[:, 0]
  emphasised[:, 1:size] = windows[:, 1:] - _PREEMPHASIS * windows[:, :-1]
  emphasised[:, :size] *= _povey_window(size)
  spectrum = np.fft.rfft(emphasised)  # (t, fft / 2 + 1)
  power = np.square(spectrum.real) + np.square(spectrum.imag)
  # Not a dense product, which is BLAS: see the top of the file.
  energy = _sparse_mel_filters(config) @ power.T  # (F, t)
  return np.log(np.maximum(energy, config.mel_floor)).T  # (t, F)


def _fft_size(window_samples: int) -> int:
  return 1 << (window_samples - 1).bit_length()


@functools.lru_cache(maxsize=8)
def _povey_window(size: int) -> np.ndarray:
  return np.hanning(size) ** _POVEY_EXPONENT


def _mel(frequency: float | np.ndarray) -> np.ndarray:
  # Kaldi's (and HTK's) mel scale.
  return 1127.0 * np.log1p(np.asarray(frequency) / 700.0)


def centre_frequencies(
  config: config_lib.FeatureConfig,
) -> Float[np.ndarray, 'F']:
  """Returns where each filter peaks, in Hz."""
  corners = np.linspace(
    _mel(config.low_freq),
    _mel(config.sample_rate / 2),
    config.num_mel_bins + 2,
  )
  return 700.0 * np.expm1(corners[1:-1] / 1127.0)


@functools.lru_cache(maxsize=8)
def mel_filters(
  config: config_lib.FeatureConfig,
) -> Float[np.ndarray, 'F bins']:
  """Returns the triangular filters, (num_mel_bins, fft_size / 2 + 1).

  Corners are evenly spaced in mel from `low_freq` to the Nyquist frequency,
  and the flanks are straight in mel, not in Hz.

  Raises:
    ValueError: if `low_freq` is not between 0 and the Nyquist frequency.
  """
  nyquist = config.sample_rate / 2
  if not 0 <= config.low_freq < nyquist:
    raise ValueError(
      f'low_freq is {config.low_freq}; it must be in [0, {nyquist})'
    )
  num_bins = _fft_size(config.window_samples) // 2 + 1
  bins = _mel(np.linspace(0.0, nyquist, num_bins))  # (bins,)
  corners = np.linspace(
    _mel(config.low_freq), _mel(nyquist), config.num_mel_bins + 2
  )
  left, centre, right = corners[:-2], corners[1:-1], corners[2:]
  rising = (bins - left[:, None]) / (centre - left)[:, None]  # (F, bins)
  falling = (right[:, None] - bins) / (right - centre)[:, None]  # (F, bins)
  # A triangle is the smaller of its two flanks.
  filters = np.maximum(0.0, np.minimum(rising, falling))
  filters[:, -1] = 0.0  # Kaldi leaves the Nyquist bin out
  filters.flags.writeable = False  # the cache hands out this very array
  return filters


@functools.lru_cache(maxsize=8)
def _sparse_mel_filters(config: config_lib.FeatureConfig):
  """The filters in a form that sums each frame in one fixed order."""
  from scipy import sparse  # slower to import than the rest of the package

  return sparse.csr_array(mel_filters(config))
