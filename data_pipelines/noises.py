"""Where noise and impulse responses come from: made, or read from manifests.

A choice is named by a text, `white,babble,noises.jsonl`: built-in kinds and
manifests, each as likely as the others. A manifest of noise has a line of
JSON with `wav` for each file; a relative path is relative to its folder, and
other keys are ignored.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib

from jaxtyping import Float
import numpy as np
import soundfile

from data_pipelines import waveform
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio

_ROOM = 'room'
_BABBLE = 'babble'
_BABBLE_VOICES = 5  # one hears voices, and no words

# Gives some utterance of the corpus, or None if it cannot be read.
Speech = Callable[[np.random.Generator], Float[np.ndarray, 'samples'] | None]


class NoiseError(ValueError):
  """A source of noise that cannot be used; the message names it."""


@dataclasses.dataclass(frozen=True)
class Noises:
  """Draws noise.

  Attributes:
    kinds: built-in kinds, and manifests as tuples of paths.
    speech: utterances of the corpus, for `babble`.
    sample_rate: in Hz.
  """

  kinds: tuple[str | tuple[str, ...], ...]
  speech: Speech
  sample_rate: int

  def draw(
    self, num_samples: int, rng: np.random.Generator
  ) -> Float[np.ndarray, 'samples']:
    """Draws noise of any level; AudioError if its file is no good.

    Args:
      num_samples: as many as these, unless its file is shorter.
      rng: chooses kind, file and place.
    """
    kind = self.kinds[int(rng.integers(len(self.kinds)))]
    if kind == _BABBLE:
      return self._babble(num_samples, rng)
    if isinstance(kind, str):
      return waveform.coloured_noise(num_samples, kind, rng)
    path = kind[int(rng.integers(len(kind)))]
    return _read_part(path, num_samples, rng, self.sample_rate)

  def _babble(self, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Several voices at once, at the same level, from random places."""
    babble = np.zeros(num_samples, np.float32)
    for _ in range(_BABBLE_VOICES):
      voice = self.speech(rng)
      # Drawn in any case: a bad voice must not change those behind it.
      start = rng.random()
      if voice is None or not voice.any():
        continue
      voice = np.roll(voice, int(start * len(voice)))
      level = np.sqrt(np.mean(np.square(voice)))
      # (np.resize repeats what is too short.)
      babble += np.resize(voice / level, num_samples)
    return babble


@dataclasses.dataclass(frozen=True)
class Rooms:
  """Draws impulse responses.

  Attributes:
    kinds: `room`, and manifests as tuples of paths.
    seconds: shortest and longest reverberation time of `room`.
    sample_rate: in Hz.
  """

  kinds: tuple[str | tuple[str, ...], ...]
  seconds: tuple[float, ...]
  sample_rate: int

  def draw(self, rng: np.random.Generator) -> Float[np.ndarray, 'response']:
    """Draws a response; AudioError if its file is no good."""
    kind = self.kinds[int(rng.integers(len(self.kinds)))]
    if isinstance(kind, str):
      shortest, longest = self.seconds
      seconds = rng.uniform(shortest, longest)
      return waveform.room_response(seconds, rng, sample_rate=self.sample_rate)
    path = kind[int(rng.integers(len(kind)))]
    return _read_response(path, self.sample_rate)


def make_noises(
  config: config_lib.AugmentConfig, speech: Speech, *, sample_rate: int
) -> Noises:
  """Opens what `config.noise` names; NoiseError if there is no such thing."""
  built_in = (*waveform.NOISE_COLOURS, _BABBLE)
  kinds = _kinds(config.noise, built_in, 'data.augment.noise')
  return Noises(kinds, speech, sample_rate)


def make_rooms(config: config_lib.AugmentConfig, *, sample_rate: int) -> Rooms:
  """Opens what `config.reverb` names; NoiseError if there is no such thing."""
  kinds = _kinds(config.reverb, (_ROOM,), 'data.augment.reverb')
  return Rooms(kinds, config.reverb_seconds, sample_rate)


def _kinds(
  spec: str, built_in: Sequence[str], where: str
) -> tuple[str | tuple[str, ...], ...]:
  names = [name.strip() for name in spec.split(',') if name.strip()]
  if not names:
    raise NoiseError(f'{where} is empty; give {", ".join(built_in)} or a file')
  return tuple(
    name if name in built_in else _read_manifest(name, built_in, where)
    for name in names
  )


def _read_manifest(
  name: str, built_in: Sequence[str], where: str
) -> tuple[str, ...]:
  path = pathlib.Path(name)
  if not path.is_file():
    raise NoiseError(
      f'{where}: {name}: neither a manifest nor one of {", ".join(built_in)}'
    )
  paths = []
  for number, line in enumerate(path.read_bytes().splitlines(), start=1):
    if not line.strip():
      continue
    try:
      wav = json.loads(line)['wav']
      file = path.absolute().parent / wav
    except (ValueError, KeyError, TypeError) as error:
      raise NoiseError(
        f'{path}:{number}: not a line of JSON with "wav" ({error})'
      ) from None
    if not file.is_file():
      raise NoiseError(f'{path}:{number}: {file}: no such audio file')
    paths.append(str(file))
  if not paths:
    raise NoiseError(f'{path}: no line in this manifest')
  return tuple(paths)


def _read_part(
  path: str, num_samples: int, rng: np.random.Generator, sample_rate: int
) -> Float[np.ndarray, 'samples']:
  """Reads as much of a long recording as is needed, from a random place."""
  try:
    with soundfile.SoundFile(path) as file:
      # Rounded up: after resampling there must be enough.
      wanted = -(-num_samples * file.samplerate // sample_rate)
      file.seek(int(rng.integers(max(1, file.frames - wanted + 1))))
      samples = file.read(wanted, dtype='float32', always_2d=True)
      rate = file.samplerate
  except (soundfile.SoundFileError, OSError) as error:
    raise audio.AudioError('bad_noise', f'{path}: {error}') from error
  return audio.as_mono(samples, rate, sample_rate=sample_rate, name=path)


@functools.lru_cache(maxsize=256)  # a second of sound is 64 kB
def _read_response(path: str, sample_rate: int) -> np.ndarray:
  response = audio.load_audio(path, sample_rate=sample_rate)
  response.flags.writeable = False  # the cache hands out this very array
  return response
