"""Several recordings streamed side by side."""

import io
import types

import numpy as np
import pytest
import soundfile

from experiments.wiring import live
from tests.reference import tiny_recognizer
from u2moe_jax import config as config_lib
from u2moe_jax.decoding import sessions

RATE = tiny_recognizer.RATE


@pytest.fixture(scope='module')
def recognizer():
  return tiny_recognizer.make(
    tiny_recognizer.model_config(),
    mode='ctc_prefix_beam_search',
    chunk_size=4,
    left_chunks=2,
    endpoint=config_lib.EndpointConfig(max_seconds=0.4),
  )


def _listen(recognizer, paths):
  pool = sessions.Sessions(recognizer, slots=len(paths))
  sounds = {
    name: live.pieces_of_file(recognizer, path) for name, path in paths.items()
  }
  lines = []
  failed = live.listen(pool, sounds, say=lines.append)
  return lines, failed


def test_text_grows_and_segments_are_said_when_they_end(recognizer, tmp_path):
  (sound,) = tiny_recognizer.sounds([0.9])
  soundfile.write(tmp_path / 'a.wav', sound, RATE, subtype='FLOAT')
  lines, failed = _listen(recognizer, {'a': tmp_path / 'a.wav'})
  assert not failed
  segments = [line for line in lines if line.startswith('[')]
  assert segments[0].startswith('[0.00 - 0.32 s, max_seconds]  ')
  assert segments[-1].split(']')[0].endswith('- 0.90 s, end')
  assert len(lines) > len(segments) == 3


def test_one_bad_file_leaves_the_others_alone(recognizer, tmp_path):
  long, short = tiny_recognizer.sounds([0.9, 0.5])
  paths = {name: tmp_path / f'{name}.wav' for name in ('long', 'no', 'short')}
  soundfile.write(paths['long'], long, RATE, subtype='FLOAT')
  soundfile.write(paths['short'], short, RATE, subtype='FLOAT')
  lines, failed = _listen(recognizer, paths)
  assert list(failed) == ['no']
  assert 'no such audio file' in failed['no']
  for name in ('long', 'short'):
    alone, _ = _listen(recognizer, {name: paths[name]})
    assert alone == [
      line.removeprefix(f'{name}: ') for line in lines if name in line
    ]
  assert not any(line.startswith('no') for line in lines)


def test_standard_input_is_16_bit_samples(recognizer, monkeypatch):
  (sound,) = tiny_recognizer.sounds([0.33])
  data = (sound * 32767).astype('<i2').tobytes() + b'\x01'  # half a sample
  stdin = types.SimpleNamespace(buffer=io.BytesIO(data))
  monkeypatch.setattr(live.sys, 'stdin', stdin)
  pieces = list(live.pieces_of_stdin(recognizer))
  assert [len(piece) for piece in pieces] == [1600, 1600, 1600, 480]
  np.testing.assert_allclose(np.concatenate(pieces) / 32768, sound, atol=1e-4)
