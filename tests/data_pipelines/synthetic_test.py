"""Tones: the answer can be read off the spectrum."""

import hashlib

import numpy as np
import pytest
import soundfile

from data_pipelines import manifest
from data_pipelines import synthetic

_PITCHES = {'A': 300, 'B': 500, 'C': 750, 'D': 1050}
_PITCHES |= {'E': 1450, 'F': 1950, 'G': 2600, 'H': 3500}


def _loudest_frequency(samples: np.ndarray, rate: int) -> float:
  spectrum = np.abs(np.fft.rfft(samples))
  return float(np.fft.rfftfreq(len(samples), 1 / rate)[spectrum.argmax()])


@pytest.mark.parametrize('rate', [8000, 16000])
@pytest.mark.parametrize('letter', list(synthetic.ALPHABET))
def test_each_letter_has_its_pitch(letter, rate):
  rng = np.random.default_rng(1)
  samples = synthetic.utterance(letter, rng=rng, sample_rate=rate)
  assert samples.dtype == np.float32
  assert abs(_loudest_frequency(samples, rate) - _PITCHES[letter]) < 20


def test_letters_sound_one_after_the_other():
  samples = synthetic.utterance('AH', rng=np.random.default_rng(2))
  loud = np.flatnonzero(np.abs(samples) > 0.05)
  middle = (loud[0] + loud[-1]) // 2
  halves = (samples[:middle], samples[middle:])
  pitches = [_loudest_frequency(half, 16000) for half in halves]
  assert np.allclose(pitches, [_PITCHES['A'], _PITCHES['H']], atol=20)


def test_unknown_character_is_refused():
  with pytest.raises(ValueError, match="'Z' has no tone"):
    synthetic.utterance('AZ', rng=np.random.default_rng(0))


def _digest(folder) -> str:
  files = sorted(folder.iterdir())
  data = b''.join(p.name.encode() + p.read_bytes() for p in files)
  return hashlib.sha256(data).hexdigest()


def test_corpus_depends_on_the_seed_alone(tmp_path):
  seeds = {'a': 1, 'b': 1, 'c': 2}
  for name, seed in seeds.items():
    synthetic.write_corpus(tmp_path / name, num_utterances=3, seed=seed)
  digests = [_digest(tmp_path / name) for name in seeds]
  assert digests[0] == digests[1] != digests[2]


def test_corpus_is_16_bit_with_true_durations(tmp_path):
  path = synthetic.write_corpus(tmp_path, num_utterances=4, seed=0)
  utterances = manifest.read(path)
  assert len(utterances) == 4
  for item in utterances:
    header = soundfile.info(item.wav)
    assert header.subtype == 'PCM_16'
    assert header.frames / header.samplerate == item.duration
    assert set(item.txt) <= set(synthetic.ALPHABET + ' ')
