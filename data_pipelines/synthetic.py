"""Tones with known answers, for tests: each character is a tone of its own."""

import os
import pathlib

from jaxtyping import Float
import numpy as np
import soundfile

from data_pipelines import manifest

ALPHABET = 'ABCDEFGH'
TONE_SECONDS = 0.08
# Well apart on the mel scale; `_FREQUENCIES[i]` in Hz is that of letter i.
_FREQUENCIES = (300, 500, 750, 1050, 1450, 1950, 2600, 3500)
_GAP_SECONDS = 0.02
_SILENCE_SECONDS = (0.05, 0.15)
_AMPLITUDE = (0.2, 0.6)
_NOISE = 0.002


def utterance(
  text: str, *, rng: np.random.Generator, sample_rate: int = 16000
) -> Float[np.ndarray, 'samples']:
  """Plays a text.

  Args:
    text: letters of `ALPHABET`; a space is a silence as long as a tone.
    rng: draws the phases, the level, the silence around and a little noise.
    sample_rate: in Hz.

  Returns:
    float32 samples within [-1, 1].

  Raises:
    ValueError: for a character without a tone.
  """
  amplitude = rng.uniform(*_AMPLITUDE)
  before, after = (rng.uniform(*_SILENCE_SECONDS) for _ in range(2))
  gap = np.zeros(int(sample_rate * _GAP_SECONDS))
  pieces = [np.zeros(int(sample_rate * before))]
  for character in text:
    pieces += [amplitude * _tone(character, rng, sample_rate), gap]
  pieces.append(np.zeros(int(sample_rate * after)))
  samples = np.concatenate(pieces)
  samples += _NOISE * rng.standard_normal(len(samples))
  return samples.astype(np.float32)


def _tone(
  character: str, rng: np.random.Generator, sample_rate: int
) -> Float[np.ndarray, 'samples']:
  num_samples = int(sample_rate * TONE_SECONDS)
  if character == ' ':
    return np.zeros(num_samples)
  if character not in ALPHABET:
    raise ValueError(f'{character!r} has no tone; use {ALPHABET} and space')
  frequency = _FREQUENCIES[ALPHABET.index(character)]
  phase = rng.uniform(0, 2 * np.pi)
  times = np.arange(num_samples) / sample_rate
  # The window keeps the edges from clicking, which would spread the spectrum.
  return np.hanning(num_samples) * np.sin(2 * np.pi * frequency * times + phase)


def text(
  rng: np.random.Generator, *, min_letters: int = 2, max_letters: int = 8
) -> str:
  """Draws a text of two words, or one if it has fewer than four letters."""
  count = int(rng.integers(min_letters, max_letters, endpoint=True))
  letters = ''.join(rng.choice(list(ALPHABET), count))
  half = count // 2
  return letters if count < 4 else f'{letters[:half]} {letters[half:]}'


def write_corpus(
  folder: str | os.PathLike[str],
  *,
  num_utterances: int,
  seed: int,
  sample_rate: int = 16000,
) -> pathlib.Path:
  """Writes 16-bit WAV files and their manifest.

  Args:
    folder: where to; made if needed.
    num_utterances: how many.
    seed: where chance comes from.
    sample_rate: in Hz.

  Returns:
    Path of the manifest, `FOLDER/manifest.jsonl`.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  utterances = []
  for index in range(num_utterances):
    # Of its own, so that an utterance stays the same in a larger corpus.
    rng = np.random.default_rng([seed, index])
    key, txt = f'tones-{seed}-{index:04d}', text(rng)
    samples = utterance(txt, rng=rng, sample_rate=sample_rate)
    soundfile.write(folder / f'{key}.wav', samples, sample_rate, 'PCM_16')
    extra = {'duration': len(samples) / sample_rate}
    utterances.append(manifest.Utterance(key, f'{key}.wav', txt, extra))
  manifest.write(folder / 'manifest.jsonl', utterances)
  return folder / 'manifest.jsonl'
