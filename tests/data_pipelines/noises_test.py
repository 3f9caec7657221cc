"""Where noise comes from: named kinds, manifests, other utterances."""

import json
import pathlib

import numpy as np
import pytest
import soundfile

from data_pipelines import noises
from data_pipelines import waveform
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio

_RATE = 16000


def _rng(seed=0):
  return np.random.default_rng(seed)


def _no_speech(rng):
  del rng
  raise AssertionError('nobody asked for speech')


def _manifest(folder, signals, rate=_RATE):
  """Writes sounds and their manifest."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = []
  for index, samples in enumerate(signals):
    soundfile.write(folder / f'{index}.wav', samples, rate, 'FLOAT')
    lines.append(json.dumps({'wav': f'{index}.wav'}))
  (folder / 'list.jsonl').write_text('\n'.join(lines) + '\n')
  return str(folder / 'list.jsonl')


def _noises(spec, speech=_no_speech):
  config = config_lib.AugmentConfig(noise=spec)
  return noises.make_noises(config, speech, sample_rate=_RATE)


def _rooms(spec, **changes):
  config = config_lib.AugmentConfig(reverb=spec, **changes)
  return noises.make_rooms(config, sample_rate=_RATE)


def test_kinds_are_drawn_evenly(tmp_path):
  path = _manifest(tmp_path, [np.full(200, 0.25), np.full(200, 0.5)])
  drawn = _noises(f'white,{path}')
  counts = {0.25: 0, 0.5: 0, 'white': 0}
  rng = _rng()
  for _ in range(400):
    noise = drawn.draw(100, rng)
    assert noise.shape == (100,)
    value = float(noise[0])
    counts[value if (noise == value).all() else 'white'] += 1
  assert abs(counts['white'] - 200) < 50
  assert abs(counts[0.25] - counts[0.5]) < 50


def test_a_part_of_a_long_recording_is_read(tmp_path):
  ramp = np.arange(3000, dtype=np.float32) / 4096
  drawn = _noises(_manifest(tmp_path, [ramp]))
  starts = set()
  for seed in range(30):
    noise = drawn.draw(100, _rng(seed))
    np.testing.assert_array_equal(np.diff(noise), np.float32(1 / 4096))
    starts.add(float(noise[0]))
  assert len(starts) > 20
  assert drawn.draw(5000, _rng()).shape == (3000,)  # all there is


def test_a_recording_of_another_rate_is_resampled(tmp_path):
  times = np.arange(80000) / 8000
  tone = 0.5 * np.sin(2 * np.pi * 1000 * times)
  drawn = _noises(_manifest(tmp_path, [tone], rate=8000))
  noise = drawn.draw(16000, _rng())
  assert len(noise) == 16000
  assert np.argmax(np.abs(np.fft.rfft(noise))) == 1000


def test_babble_is_several_utterances():
  calls = []

  def speech(rng):
    calls.append(rng.integers(10))
    return np.sin(np.arange(700) / (3 + calls[-1])).astype(np.float32)

  noise = _noises('babble', speech).draw(1000, _rng())
  assert noise.shape == (1000,)
  assert len(calls) == 5
  again = _noises('babble', speech).draw(1000, _rng())
  np.testing.assert_array_equal(noise, again)


def test_an_utterance_that_cannot_be_read_is_left_out_of_the_babble():
  voices = iter(
    [None, np.zeros(50, np.float32), *[_rng(1).normal(size=50)] * 3]
  )
  noise = _noises('babble', lambda rng: next(voices)).draw(100, _rng())
  assert np.isfinite(noise).all()
  assert noise.any()
  nobody = _noises('babble', lambda rng: None).draw(100, _rng())
  assert not nobody.any()


def test_rooms_are_made_or_read(tmp_path):
  response = np.array([0.0, 1.0, 0.5], np.float32)
  rooms = _rooms(_manifest(tmp_path, [response]))
  np.testing.assert_array_equal(rooms.draw(_rng()), response)
  made = _rooms('room', reverb_seconds=(0.2, 0.3))
  lengths = [len(made.draw(_rng(seed))) / _RATE for seed in range(50)]
  assert 0.2 <= min(lengths) < 0.22
  assert 0.28 < max(lengths) <= 0.3


@pytest.mark.parametrize(
  ('spec', 'words'),
  [
    ('', ['data.augment.noise is empty', 'white']),
    ('purple', ['purple', 'babble']),
    ('{}/bad.jsonl', ['bad.jsonl:2', 'wav']),
    ('{}/lost.jsonl', ['lost.jsonl:1', 'gone.wav']),
    ('{}/empty.jsonl', ['empty.jsonl', 'no line']),
  ],
)
def test_what_is_not_there_is_named(tmp_path, spec, words):
  good = _manifest(tmp_path, [np.zeros(5)])
  line = pathlib.Path(good).read_text()
  (tmp_path / 'bad.jsonl').write_text(line + 'not json\n')
  (tmp_path / 'lost.jsonl').write_text('{"wav": "gone.wav"}\n')
  (tmp_path / 'empty.jsonl').write_text('\n')
  with pytest.raises(noises.NoiseError) as caught:
    _noises(spec.format(tmp_path))
  assert all(word in str(caught.value) for word in words)


def test_a_broken_file_is_named_when_it_is_drawn(tmp_path):
  path = _manifest(tmp_path, [np.zeros(5)])
  (tmp_path / '0.wav').write_bytes(b'RIFF and no more')
  with pytest.raises(audio.AudioError, match=r'0\.wav') as caught:
    _noises(path).draw(10, _rng())
  assert caught.value.reason == 'bad_noise'


def test_a_response_that_is_shared_cannot_be_changed(tmp_path):
  rooms = _rooms(_manifest(tmp_path, [np.ones(4)]))
  with pytest.raises(ValueError, match='read-only'):
    rooms.draw(_rng())[0] = 2.0
  assert waveform.reverberate(np.ones(9, np.float32), rooms.draw(_rng())).any()
