"""Turns any audio file or array into mono float32 samples at one rate.

Samples are float32 of shape (num_samples,), nominally within [-1, 1]: nothing
is clipped, so resampling may overshoot full scale by a little. Everything
that cannot be used is refused with an `AudioError`, whose `reason` is a short
code to count by and whose message says what to do:

  missing        no such file                unreadable  no decoder takes it
  empty          no samples                  not_finite  NaN or infinity
  bad_shape      not (samples,) or (samples, channels)
  bad_type       neither floats nor 8, 16 or 32-bit integers
  bad_rate       sample rate not positive    bad_speed   factor not positive
  not_scaled     floats far outside [-1, 1]
"""

import os
import pathlib
import warnings

from jaxtyping import Float
from jaxtyping import Shaped
import numpy as np
import soundfile
import soxr

# 24 dB over full scale: no recording gets there, integers kept as floats do.
_LARGEST_SAMPLE = 16.0


class AudioError(ValueError):
  """Audio that cannot be used.

  Attributes:
    reason: short code, one of those in the module's docstring.
  """

  def __init__(self, reason: str, message: str):
    # Both arguments go to the base class, so that the error can be pickled
    # on its way out of a data worker.
    super().__init__(reason, message)
    self.reason = reason

  def __str__(self) -> str:
    return self.args[1]


def load_audio(
  path: str | os.PathLike[str], *, sample_rate: int = 16000
) -> Float[np.ndarray, 'samples']:
  """Reads an audio file; of several channels the first one is taken.

  Args:
    path: a file that libsndfile reads (WAV, FLAC, Ogg, MP3, ...) or, where
      librosa finds a decoder such as ffmpeg, any other.
    sample_rate: rate of the result in Hz.

  Returns:
    Mono float32 samples at `sample_rate`.

  Raises:
    AudioError: if there is nothing usable in the file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise AudioError(
      'missing', f'{path}: no such audio file; check the path in the manifest'
    )
  if path.stat().st_size == 0:
    raise AudioError(
      'empty', f'{path}: the file has 0 bytes; copy or record it again'
    )
  samples, rate = _decode(path)
  return as_mono(samples, rate, sample_rate=sample_rate, name=str(path))


def as_mono(
  samples: Shaped[np.ndarray, '...'],
  rate: float,
  *,
  sample_rate: int = 16000,
  name: str = 'array',
) -> Float[np.ndarray, 'samples']:
  """Checks, scales and resamples an array of samples.

  Args:
    samples: shape (num_samples,) or (num_samples, num_channels), of which
      channel 0 is taken; floats within [-1, 1], or integers of 8, 16 or 32
      bits, which are divided by their full scale.
    rate: its sample rate in Hz.
    sample_rate: rate of the result in Hz.
    name: what messages call the array.

  Returns:
    Mono float32 samples at `sample_rate`.

  Raises:
    AudioError: if the array or a rate cannot be used.
  """
  for value in (rate, sample_rate):
    _check_rate(value, name)
  mono = _scale(_first_channel(np.asarray(samples), name), name)
  if not np.isfinite(mono).all():
    raise AudioError(
      'not_finite', f'{name}: has NaN or infinite samples; write it again'
    )
  peak = np.abs(mono).max()
  if peak > _LARGEST_SAMPLE:
    raise AudioError(
      'not_scaled',
      f'{name}: float samples reach {peak:.6g}; scale them to [-1, 1], or '
      'pass 16-bit values as int16',
    )
  return resample(mono, rate, sample_rate)


def resample(
  samples: Float[np.ndarray, 'samples'], from_rate: float, to_rate: float
) -> Float[np.ndarray, 'resampled']:
  """Changes the sample rate, band-limited (soxr, high quality).

  Args:
    samples: mono samples.
    from_rate: their rate in Hz.
    to_rate: rate of the result in Hz.

  Returns:
    float32 samples, round(num_samples * to_rate / from_rate) of them.

  Raises:
    AudioError: if a rate is not positive.
  """
  for value in (from_rate, to_rate):
    _check_rate(value, 'resample')
  samples = np.ascontiguousarray(samples, np.float32)
  if from_rate == to_rate:
    return samples
  length = round(len(samples) * to_rate / from_rate)
  resampled = soxr.resample(samples, from_rate, to_rate)[:length]
  return np.pad(resampled, (0, length - len(resampled)))


def change_speed(
  samples: Float[np.ndarray, 'samples'],
  factor: float,
  sample_rate: int = 16000,
) -> Float[np.ndarray, 'resampled']:
  """Plays samples faster or slower; pitch moves along (sox speed and rate).

  Args:
    samples: mono samples.
    factor: above 1 is faster, shorter and higher.
    sample_rate: rate in Hz before and after.

  Returns:
    float32 samples, round(num_samples / factor) of them.

  Raises:
    AudioError: if the factor is not positive.
  """
  if not (np.isfinite(factor) and factor > 0):
    raise AudioError(
      'bad_speed', f'speed factor {factor} is not positive; 0.9 to 1.1 is usual'
    )
  return resample(samples, sample_rate * factor, sample_rate)


def _decode(path: pathlib.Path) -> tuple[np.ndarray, float]:
  """Returns samples (num_samples, num_channels) and their rate."""
  try:
    return soundfile.read(path, dtype='float32', always_2d=True)
  except (soundfile.SoundFileError, OSError) as error:
    first_error = error
  try:
    return _decode_with_librosa(path)
  # The decoders behind librosa each raise a family of their own, and some of
  # them plain EOFError or struct.error; all of it means the same here.
  except Exception:
    detail = ' '.join(str(first_error).split()).rstrip('.')
    raise AudioError(
      'unreadable',
      f'{path}: cannot be decoded ({detail}); convert it to WAV or FLAC, or '
      'install ffmpeg',
    ) from first_error


def _decode_with_librosa(path: pathlib.Path) -> tuple[np.ndarray, float]:
  """Decodes what libsndfile does not know, by librosa's other readers."""
  import librosa  # takes seconds, and few files need it

  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # it announces every such file
    samples, rate = librosa.load(path, sr=None, mono=False)
  return np.atleast_2d(samples).T, rate


def _check_rate(rate: float, name: str) -> None:
  if not (np.isfinite(rate) and rate > 0):
    raise AudioError(
      'bad_rate', f'{name}: sample rate {rate} is not positive; give it in Hz'
    )


def _first_channel(samples: np.ndarray, name: str) -> np.ndarray:
  if samples.ndim not in (1, 2):
    raise AudioError(
      'bad_shape',
      f'{name}: has shape {samples.shape}; give (samples,) or '
      '(samples, channels)',
    )
  if samples.size == 0:
    raise AudioError('empty', f'{name}: has no samples; leave it out')
  if samples.ndim == 1:
    return samples
  if samples.shape[1] > samples.shape[0]:
    raise AudioError(
      'bad_shape',
      f'{name}: has shape {samples.shape}, more channels than samples; '
      'transpose it to (samples, channels)',
    )
  return samples[:, 0]


def _scale(samples: np.ndarray, name: str) -> np.ndarray:
  """Converts to float32, integers by their full scale."""
  if np.issubdtype(samples.dtype, np.floating):
    return samples.astype(np.float32)
  if samples.dtype == np.uint8:  # the one unsigned form in use; silence is 128
    return (samples.astype(np.float32) - 128.0) / 128.0
  if samples.dtype in (np.int8, np.int16, np.int32):
    full_scale = float(np.iinfo(samples.dtype).max) + 1.0
    return (samples / full_scale).astype(np.float32)
  raise AudioError(
    'bad_type',
    f'{name}: has {samples.dtype} samples; give floats within [-1, 1] or int16',
  )
