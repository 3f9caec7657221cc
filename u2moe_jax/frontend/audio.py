"""Turns any audio file or array into mono float32 samples at one rate.

Samples are float32 of shape (num_samples,), nominally within [-1, 1]: nothing
is clipped, so resampling may overshoot full scale by a little. Everything
that cannot be used is refused with an `AudioError`, whose `reason` is a short
code to count by, one of `REASONS`, and whose message says what to do.
"""

import dataclasses
import io
import os
import pathlib
import tempfile
from typing import Any
from typing import BinaryIO
import warnings

from jaxtyping import Float
from jaxtyping import Shaped
import numpy as np
import soundfile
import soxr

REASONS = {
  'missing': 'there is no such audio file',
  'empty': 'the file has no bytes, or no samples',
  'unreadable': 'no decoder takes the file',
  'truncated': 'the file ends before its header says, or is damaged inside',
  'bad_segment': 'start and end do not lie inside the recording, in this order',
  'not_finite': 'a sample is NaN or infinite',
  'not_scaled': 'float samples lie far outside [-1, 1]',
  'bad_shape': 'not (samples,) or (samples, channels)',
  'bad_type': 'neither floats nor integers of 8, 16 or 32 bits',
  'bad_rate': 'the sample rate is not positive',
  'bad_speed': 'the speed factor is not positive',
}

# 24 dB over full scale: no recording gets there, integers kept as floats do.
_LARGEST_SAMPLE = 16.0
# Ends of segments are often rounded up; so much beyond the recording is cut.
_MOST_OVERSHOOT_SECONDS = 0.5
# What programs that write to a pipe give as a length they do not know yet.
_UNKNOWN_LENGTH = 0x7FFF0000
_BUFFER_BYTES = 1 << 16
# Headers of compressed formats only estimate how many samples follow.
_INEXACT_FORMATS = ('MP3', 'OGG')
_INEXACT_SHARE = 0.9


class AudioError(ValueError):
  """Audio that cannot be used.

  Attributes:
    reason: short code, one of `REASONS` or of a data pipeline's own.
  """

  def __init__(self, reason: str, message: str) -> None:
    # Both arguments go to the base class, so that the error can be pickled
    # on its way out of a data worker.
    super().__init__(reason, message)
    self.reason = reason

  def __str__(self) -> str:
    return self.args[1]


@dataclasses.dataclass(frozen=True)
class Header:
  """What is known of a recording before it is decoded.

  Attributes:
    seconds: its length, or that of the segment asked for.
    sample_rate: in Hz, as recorded.
    channels: how many.
  """

  seconds: float
  sample_rate: float
  channels: int


@dataclasses.dataclass(frozen=True)
class Part:
  """Where in a file the sound is; by default everywhere.

  Attributes:
    start: seconds from the beginning of the recording.
    end: seconds from its beginning; None for its end.
    offset: bytes before the recording, in a file that holds several.
    size: bytes of the recording; None for all that follow.
  """

  start: float = 0.0
  end: float | None = None
  offset: int = 0
  size: int | None = None


WHOLE = Part()


def load_audio(
  path: str | os.PathLike[str],
  *,
  sample_rate: int = 16000,
  part: Part = WHOLE,
) -> Float[np.ndarray, 'samples']:
  """Reads an audio file; of several channels the first one is taken.

  Args:
    path: a file that libsndfile reads (WAV, FLAC, Ogg, MP3, ...) or, where
      librosa finds a decoder such as ffmpeg, any other.
    sample_rate: rate of the result in Hz.
    part: what to read of it.

  Returns:
    Mono float32 samples at `sample_rate`.

  Raises:
    AudioError: if there is nothing usable in the file.
  """
  path = pathlib.Path(path)
  _require_file(path, part)
  samples, rate = _decode(path, part)
  return as_mono(samples, rate, sample_rate=sample_rate, name=str(path))


def read_header(path: str | os.PathLike[str], *, part: Part = WHOLE) -> Header:
  """Reads length, rate and channels; decodes only where no header tells.

  Args:
    path: see `load_audio`.
    part: what of it.

  Raises:
    AudioError: if the header cannot be read, or the part is not in the file.
  """
  path = pathlib.Path(path)
  _require_file(path, part)
  try:
    with _open(path, part) as file, soundfile.SoundFile(file) as sound:
      rate, channels = sound.samplerate, sound.channels
      first, last = _sample_range(sound.frames, rate, part, path)
  except (soundfile.SoundFileError, OSError):
    samples, rate = _decode(path, part)  # of a kind for slower decoders
    first, last, channels = 0, len(samples), samples.shape[1]
  return Header((last - first) / rate, rate, channels)


def _require_file(path: pathlib.Path, part: Part) -> None:
  if not path.is_file():
    raise AudioError(
      'missing', f'{path}: no such audio file; check the path in the manifest'
    )
  if path.stat().st_size == 0 or part.size == 0:
    raise AudioError(
      'empty', f'{path}: the file has 0 bytes; copy or record it again'
    )


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
  # The length is fixed here, since soxr's own may be a sample off it.
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
  # Samples taken for such of another rate: that is all that changing speed is.
  return resample(samples, sample_rate * factor, sample_rate)


def _decode(path: pathlib.Path, part: Part) -> tuple[np.ndarray, float]:
  """Returns samples (num_samples, num_channels) and their rate."""
  num_samples = 0  # as the header has it
  try:
    with _open(path, part) as file:
      _require_whole(file, path)
      # By its name libsndfile reads a file itself, which is faster.
      named = path if part.offset == 0 and part.size is None else file
      with soundfile.SoundFile(named) as sound:
        num_samples = sound.frames
        return _read(sound, part, path), sound.samplerate
  except (soundfile.SoundFileError, OSError) as error:
    # The name in `except ... as` ends with its block.
    first_error = error
  if num_samples:  # so it is a kind of sound that libsndfile knows
    raise _truncated(path, ' '.join(str(first_error).split())) from first_error
  return _decode_otherwise(path, part, first_error)


def _read(
  sound: soundfile.SoundFile, part: Part, path: pathlib.Path
) -> np.ndarray:
  """Reads a part of an open file, (num_samples, num_channels)."""
  first, last = _sample_range(sound.frames, sound.samplerate, part, path)
  if first:
    sound.seek(first)
  samples = sound.read(last - first, dtype='float32', always_2d=True)
  share = _INEXACT_SHARE if sound.format in _INEXACT_FORMATS else 1.0
  # libsndfile reads what there is, without an error.
  if len(samples) < share * (last - first):
    raise _truncated(
      path, f'{len(samples)} of {last - first} samples are there'
    )
  return samples


def _sample_range(
  num_samples: int, rate: float, part: Part, path: pathlib.Path
) -> tuple[int, int]:
  """First sample of a part, and the one behind its last."""
  seconds = num_samples / rate
  end = seconds if part.end is None else part.end
  # The chained comparison is False for NaN too.
  if not (
    0 <= part.start < end <= seconds + _MOST_OVERSHOOT_SECONDS
    and part.start < seconds
  ):
    if part.start == 0 and part.end is None:
      return 0, num_samples  # a recording without samples is no bad segment
    raise AudioError(
      'bad_segment',
      f'{path}: {part.start:g} to {end:g} s is no segment of a recording of '
      f'{seconds:g} s; correct start and end',
    )
  return round(part.start * rate), min(round(end * rate), num_samples)


def _truncated(path: pathlib.Path, detail: str) -> AudioError:
  return AudioError(
    'truncated',
    f'{path}: ends early or is damaged ({detail.rstrip(".")}); copy it again',
  )


def _open(path: pathlib.Path, part: Part) -> BinaryIO:
  """Opens a recording, which may be some bytes of a larger file."""
  file = path.open('rb')
  if part.offset == 0 and part.size is None:
    return file
  there = max(0, path.stat().st_size - part.offset)
  if part.size is not None and there < part.size:
    file.close()
    raise _truncated(
      path,
      f'{there} of {part.size} bytes are there, from byte {part.offset}',
    )
  size = there if part.size is None else part.size
  return io.BufferedReader(_Slice(file, part.offset, size), _BUFFER_BYTES)


class _Slice(io.RawIOBase):
  """Some bytes of a file, as a file of their own; closes the file with it."""

  def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
    self._file, self._offset, self._size = file, offset, size
    self._position = 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence, self._size)
    self._position = max(0, base + position)
    return self._position

  def readinto(self, buffer: Any) -> int:
    left = max(0, self._size - self._position)
    self._file.seek(self._offset + self._position)
    data = self._file.read(min(len(buffer), left))
    buffer[: len(data)] = data
    self._position += len(data)
    return len(data)

  def close(self) -> None:
    self._file.close()
    super().close()


def _require_whole(file: BinaryIO, path: pathlib.Path) -> None:
  """Refuses a WAV file that is shorter than its header says.

  libsndfile takes the samples there are, and tells nobody.
  """
  # RIFF: 12 bytes of header, then chunks of a name, a size and so many bytes.
  is_wave = file.read(12)[8:] == b'WAVE'
  while is_wave and len(head := file.read(8)) == 8:
    size = int.from_bytes(head[4:], 'little')
    if head[:4] == b'data':
      begin = file.tell()
      there = file.seek(0, os.SEEK_END) - begin
      if there < size < _UNKNOWN_LENGTH:
        raise _truncated(path, f'{there} of {size} bytes are there')
      break
    file.seek(size + size % 2, os.SEEK_CUR)  # chunks begin at even bytes
  file.seek(0)


def _decode_otherwise(
  path: pathlib.Path, part: Part, first_error: Exception
) -> tuple[np.ndarray, float]:
  """Decodes what libsndfile does not know; slow."""
  try:
    if part.offset or part.size is not None:
      with _open(path, part) as file, tempfile.NamedTemporaryFile() as copy:
        copy.write(file.read())
        copy.flush()
        samples, rate = _decode_with_librosa(pathlib.Path(copy.name))
    else:
      samples, rate = _decode_with_librosa(path)
  # The decoders behind librosa each raise a family of their own, and some of
  # them plain EOFError or struct.error; all of it means the same here.
  except Exception:
    detail = ' '.join(str(first_error).split()).rstrip('.')
    raise AudioError(
      'unreadable',
      f'{path}: cannot be decoded ({detail}); convert it to WAV or FLAC, or '
      'install ffmpeg',
    ) from first_error
  first, last = _sample_range(len(samples), rate, part, path)
  return samples[first:last], rate


def _decode_with_librosa(path: pathlib.Path) -> tuple[np.ndarray, float]:
  """Decodes what libsndfile does not know, by librosa's other readers."""
  import librosa  # takes seconds, and few files need it

  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # it announces every such file
    samples, rate = librosa.load(path, sr=None, mono=False)
  return np.atleast_2d(samples).T, rate  # (samples, channels)


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
  # No recording has that; it is (channels, samples), of which channel 0 would
  # be one sample of each.
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
    # A power of two, so the division is exact.
    full_scale = np.float32(float(np.iinfo(samples.dtype).max) + 1.0)
    return samples.astype(np.float32) / full_scale
  raise AudioError(
    'bad_type',
    f'{name}: has {samples.dtype} samples; give floats within [-1, 1] or int16',
  )
