"""Audio: any file or array becomes the same mono float32, or a reason."""

import pathlib
import pickle
import re
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import soundfile

from u2moe_jax.frontend import audio

RATE = 16000


def _tone(frequency=440.0, *, rate=RATE, seconds=0.5):
  time = np.arange(int(seconds * rate)) / rate
  return (0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def _pitch(samples, rate=RATE):
  spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
  return spectrum.argmax() * rate / len(samples)


def _reason(function, *args, **kwargs):
  with pytest.raises(audio.AudioError) as caught:
    function(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return caught.value.reason


@pytest.mark.parametrize(
  ('name', 'subtype', 'tolerance'),
  [
    ('a.wav', 'FLOAT', 0.0),
    ('a.wav', 'PCM_16', 1 / 32768),
    ('a.wav', 'PCM_U8', 1 / 128),
    ('a.flac', 'PCM_16', 1 / 32768),
    ('a.ogg', 'VORBIS', 0.1),
  ],
)
def test_a_file_gives_back_its_samples(tmp_path, name, subtype, tolerance):
  samples = _tone()
  soundfile.write(tmp_path / name, samples, RATE, subtype=subtype)
  loaded = audio.load_audio(tmp_path / name)
  assert loaded.dtype == np.float32
  np.testing.assert_allclose(loaded, samples, rtol=0, atol=tolerance)


def test_the_first_channel_is_taken(tmp_path):
  first, second = _tone(440.0), _tone(880.0)
  path = tmp_path / 'stereo.wav'
  both = np.stack([first, second], axis=1)
  soundfile.write(path, both, RATE, subtype='FLOAT')
  np.testing.assert_array_equal(audio.load_audio(path), first)
  np.testing.assert_array_equal(audio.as_mono(both, RATE), first)
  assert not np.array_equal(audio.as_mono(both[:, ::-1], RATE), first)


def test_a_file_is_resampled(tmp_path):
  path = tmp_path / 'high.wav'
  high = _tone(rate=44100)
  soundfile.write(path, high, 44100, subtype='FLOAT')
  loaded = audio.load_audio(path, sample_rate=RATE)
  expected = _tone()
  assert len(loaded) == len(expected)
  inner = slice(500, -500)  # the filter rings at the ends
  np.testing.assert_allclose(loaded[inner], expected[inner], atol=1e-3)
  assert np.abs(high[: len(expected)] - expected)[inner].max() > 0.1


@pytest.mark.parametrize('dtype', [np.int8, np.int16, np.int32])
def test_integers_scale_by_their_full_range(dtype):
  limits = np.iinfo(dtype)
  values = np.array([limits.min, 0, limits.max // 2 + 1], dtype)
  np.testing.assert_array_equal(
    audio.as_mono(values, RATE), np.float32([-1.0, 0.0, 0.5])
  )


def test_unsigned_bytes_have_silence_in_the_middle():
  values = np.array([0, 128, 192], np.uint8)
  np.testing.assert_array_equal(
    audio.as_mono(values, RATE), np.float32([-1.0, 0.0, 0.5])
  )


@pytest.mark.parametrize(
  ('samples', 'rate', 'reason'),
  [
    (np.zeros(0), RATE, 'empty'),
    (np.zeros((0, 2)), RATE, 'empty'),
    (np.zeros((4, 2, 2)), RATE, 'bad_shape'),
    (np.float32(0.5), RATE, 'bad_shape'),
    (np.zeros((2, 800)), RATE, 'bad_shape'),
    (np.array([0.0, np.nan]), RATE, 'not_finite'),
    (np.array([0.0, np.inf]), RATE, 'not_finite'),
    (np.array([0.0, 20000.0]), RATE, 'not_scaled'),
    (np.zeros(4, np.int64), RATE, 'bad_type'),
    (np.zeros(4, np.complex64), RATE, 'bad_type'),
    (np.zeros(4, bool), RATE, 'bad_type'),
    (np.zeros(4), 0, 'bad_rate'),
    (np.zeros(4), -RATE, 'bad_rate'),
    (np.zeros(4), np.nan, 'bad_rate'),
  ],
)
def test_an_unusable_array_has_its_reason(samples, rate, reason):
  assert _reason(audio.as_mono, samples, rate) == reason


def test_a_message_names_the_array():
  with pytest.raises(audio.AudioError, match='utterance 7'):
    audio.as_mono(np.zeros(0), RATE, name='utterance 7')


def test_an_unusable_file_has_its_reason(tmp_path):
  (tmp_path / 'hollow.wav').write_bytes(b'')
  (tmp_path / 'text.wav').write_text('this is no sound\n' * 100)
  soundfile.write(tmp_path / 'header.wav', np.zeros(0), RATE)
  assert _reason(audio.load_audio, tmp_path / 'none.wav') == 'missing'
  assert _reason(audio.load_audio, tmp_path) == 'missing'
  assert _reason(audio.load_audio, tmp_path / 'hollow.wav') == 'empty'
  assert _reason(audio.load_audio, tmp_path / 'header.wav') == 'empty'
  assert _reason(audio.load_audio, tmp_path / 'text.wav') == 'unreadable'


def test_a_message_names_the_file(tmp_path):
  with pytest.raises(audio.AudioError, match=r'none\.wav'):
    audio.load_audio(tmp_path / 'none.wav')


def test_other_formats_go_through_librosa(tmp_path, monkeypatch):
  samples = _tone()
  path = tmp_path / 'sound.m4a'
  path.write_bytes(b'not for libsndfile')
  monkeypatch.setattr(
    audio, '_decode_with_librosa', lambda path: (samples[:, None], RATE)
  )
  np.testing.assert_array_equal(audio.load_audio(path), samples)


def test_the_librosa_reader_agrees_with_soundfile(tmp_path):
  path = tmp_path / 'stereo.wav'
  both = np.stack([_tone(440.0), _tone(880.0)], axis=1)
  soundfile.write(path, both, RATE, subtype='FLOAT')
  samples, rate = audio._decode_with_librosa(path)
  assert rate == RATE
  np.testing.assert_array_equal(samples, both)


def test_an_error_survives_pickling():
  error = audio.AudioError('empty', 'a.wav: has no samples')
  again = pickle.loads(pickle.dumps(error))
  assert (again.reason, str(again)) == (error.reason, str(error))


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
  num_samples=st.integers(1, 4000),
  from_rate=st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000]),
  to_rate=st.sampled_from([8000, 16000]),
)
def test_resampling_keeps_the_duration(num_samples, from_rate, to_rate):
  samples = np.linspace(-0.5, 0.5, num_samples, dtype=np.float32)
  resampled = audio.resample(samples, from_rate, to_rate)
  assert len(resampled) == round(num_samples * to_rate / from_rate)
  assert resampled.dtype == np.float32
  assert np.isfinite(resampled).all()


def test_the_same_rate_changes_nothing():
  samples = _tone()
  np.testing.assert_array_equal(audio.resample(samples, RATE, RATE), samples)
  np.testing.assert_array_equal(audio.change_speed(samples, 1.0), samples)


def test_frequencies_above_the_new_nyquist_vanish():
  high = audio.resample(_tone(6000.0), RATE, 8000)
  low = audio.resample(_tone(1000.0), RATE, 8000)
  inner = slice(500, -500)
  assert np.abs(high[inner]).max() < 1e-3
  assert np.abs(low[inner]).max() > 0.4


@pytest.mark.parametrize('factor', [0.9, 1.1, 1.5])
def test_speed_moves_length_and_pitch(factor):
  samples = _tone(800.0, seconds=1.0)
  fast = audio.change_speed(samples, factor, RATE)
  assert len(fast) == round(len(samples) / factor)
  assert _pitch(fast) == pytest.approx(800.0 * factor, abs=2.0)
  assert _pitch(samples) == pytest.approx(800.0, abs=2.0)


def test_speed_there_and_back_is_the_original():
  samples = _tone(800.0, seconds=1.0)
  back = audio.change_speed(audio.change_speed(samples, 0.9), 1 / 0.9)
  assert len(back) == len(samples)
  inner = slice(500, -500)
  np.testing.assert_allclose(back[inner], samples[inner], atol=1e-3)


@pytest.mark.parametrize('factor', [0.0, -1.0, np.nan, np.inf])
def test_an_impossible_speed_is_refused(factor):
  assert _reason(audio.change_speed, _tone(), factor) == 'bad_speed'


def test_an_impossible_rate_is_refused():
  assert _reason(audio.resample, _tone(), 0, RATE) == 'bad_rate'


def test_importing_is_cheap():
  code = (
    'import sys; from u2moe_jax.frontend import audio, fbank, cmvn\n'
    "assert 'numpy' in sys.modules\n"
    "heavy = {'librosa', 'scipy', 'jax', 'numba'} & set(sys.modules)\n"
    'assert not heavy, heavy'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('name', ['a.wav', 'a.flac'])
@pytest.mark.parametrize(
  ('start', 'end', 'first', 'last'),
  [
    (0.0, None, 0, 8000),
    (0.25, None, 4000, 8000),
    (0.125, 0.25, 2000, 4000),
    (0.25, 0.75, 4000, 8000),  # a little too late: to the end
  ],
)
def test_a_segment_is_a_slice(tmp_path, name, start, end, first, last):
  soundfile.write(tmp_path / name, _tone(), RATE, subtype='PCM_16')
  whole = audio.load_audio(tmp_path / name)
  part = audio.Part(start=start, end=end)
  np.testing.assert_array_equal(
    audio.load_audio(tmp_path / name, part=part), whole[first:last]
  )
  header = audio.read_header(tmp_path / name, part=part)
  assert header == audio.Header((last - first) / RATE, RATE, 1)


@pytest.mark.parametrize(
  ('start', 'end'),
  [(0.3, 0.2), (0.2, 0.2), (-0.1, 0.2), (0.5, None), (0.1, 1.1), (9.0, 9.5),
   (float('nan'), 0.2), (0.1, float('nan'))],
)  # fmt: skip
def test_an_impossible_segment_is_refused(tmp_path, start, end):
  path = tmp_path / 'a.wav'
  soundfile.write(path, _tone(), RATE)
  part = audio.Part(start=start, end=end)
  for function in (audio.load_audio, audio.read_header):
    assert _reason(function, path, part=part) == 'bad_segment'


@pytest.mark.parametrize('name', ['a.wav', 'a.flac', 'a.ogg'])
def test_a_recording_inside_a_larger_file_is_found(tmp_path, name):
  soundfile.write(tmp_path / name, _tone(), RATE)
  data = (tmp_path / name).read_bytes()
  path = tmp_path / 'all.tar'
  path.write_bytes(b'before' * 100 + data + b'after' * 100)
  part = audio.Part(offset=600, size=len(data))
  expected = audio.load_audio(tmp_path / name)
  np.testing.assert_array_equal(audio.load_audio(path, part=part), expected)
  assert audio.read_header(path, part=part).seconds == 0.5
  inner = audio.Part(start=0.25, offset=600, size=len(data))
  np.testing.assert_array_equal(
    audio.load_audio(path, part=inner), expected[4000:]
  )
  beyond = audio.Part(offset=600, size=len(data) + 1000)
  assert _reason(audio.load_audio, path, part=beyond) == 'truncated'
  nothing = audio.Part(offset=600, size=0)
  assert _reason(audio.load_audio, path, part=nothing) == 'empty'


@pytest.mark.parametrize('name', ['a.wav', 'a.flac'])
@pytest.mark.parametrize('share', [0.3, 0.9])
def test_a_file_that_ends_early_is_named(tmp_path, name, share):
  path = tmp_path / name
  rng = np.random.default_rng(0)  # noise, which takes many blocks
  soundfile.write(path, 0.1 * rng.standard_normal(RATE), RATE)
  data = path.read_bytes()
  assert len(audio.load_audio(path)) == RATE
  path.write_bytes(data[: int(share * len(data))])
  assert _reason(audio.load_audio, path) == 'truncated'


def test_a_file_that_was_streamed_is_whole(tmp_path):
  """What is written to a pipe cannot tell its length in the header."""
  path = tmp_path / 'a.wav'
  soundfile.write(path, _tone(), RATE, subtype='PCM_16')
  data = bytearray(path.read_bytes())
  expected = audio.load_audio(path)
  at = data.index(b'data') + 4
  for length in (0xFFFFFFFF, 0x7FFFFFFF):
    data[at : at + 4] = length.to_bytes(4, 'little')
    path.write_bytes(data)
    np.testing.assert_array_equal(audio.load_audio(path), expected)


def test_a_header_tells_what_was_recorded(tmp_path):
  both = np.stack([_tone(rate=44100)] * 2, axis=1)
  soundfile.write(tmp_path / 'a.wav', both, 44100)
  assert audio.read_header(tmp_path / 'a.wav') == audio.Header(0.5, 44100, 2)
  assert _reason(audio.read_header, tmp_path / 'none.wav') == 'missing'


def test_every_reason_is_explained():
  source = pathlib.Path(audio.__file__).read_text()
  given = set(re.findall(r"AudioError\(\s*'([a-z_]+)'", source))
  assert given == set(audio.REASONS)
