"""Sources of utterances with random access: manifests and prepared data sets.

A source is named by a text: the path of a manifest, or the folder of a
prepared data set with `:SPLIT` behind it if it is not the usual split. Commas
join several.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
from typing import Protocol

from jaxtyping import Float
import numpy as np
import soundfile

from data_pipelines import manifest
from data_pipelines import tfds_dataset
from u2moe_jax.frontend import audio

SAMPLE_RATE = 16000


class SourceError(ValueError):
  """A source that cannot be opened; the message says what was looked for."""


class Source(Protocol):
  """Utterances in a fixed order, and their audio by number.

  Attributes:
    utterances: all of them. `wav` may be empty; `duration` is None only where
      `load` would raise.
  """

  utterances: list[manifest.Utterance]

  def __len__(self) -> int:
    """Number of utterances."""

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """Returns the mono float32 samples of utterance `index` at 16 kHz.

    Raises AudioError, which has a `reason`, for unusable audio.
    """


class ManifestSource:
  """The audio files of a manifest."""

  def __init__(self, path: str | os.PathLike[str]):
    """Reads the manifest, and the headers of files of unknown duration."""
    self.utterances = [_with_duration(item) for item in manifest.read(path)]

  def __len__(self) -> int:
    return len(self.utterances)

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """See `Source`."""
    return audio.load_audio(self.utterances[index].wav, sample_rate=SAMPLE_RATE)


class DatasetSource:
  """One split of a prepared data set."""

  def __init__(self, folder: str | os.PathLike[str], split: str):
    """Reads the index of the split; audio is opened when it is asked for."""
    self.utterances = tfds_dataset.read_index(folder, split)
    self._recordings = tfds_dataset.read(folder, split)

  def __len__(self) -> int:
    return len(self.utterances)

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """See `Source`."""
    recording = self._recordings[index]
    return audio.as_mono(
      recording.audio,
      recording.sample_rate,
      sample_rate=SAMPLE_RATE,
      name=recording.key,
    )


class JoinedSource:
  """Several sources, one behind the other."""

  def __init__(self, parts: Sequence[Source]):
    """Joins; SourceError if two parts have a key in common."""
    self.utterances = [item for part in parts for item in part.utterances]
    self._parts = list(parts)
    self._ends = np.cumsum([len(part) for part in parts])
    seen: set[str] = set()
    for item in self.utterances:
      if item.key in seen:
        raise SourceError(
          f'the key {item.key!r} occurs in two of the joined sources; keys '
          'must be unique'
        )
      seen.add(item.key)

  def __len__(self) -> int:
    return len(self.utterances)

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """See `Source`."""
    if not 0 <= index < len(self):
      raise IndexError(f'{index} is not in [0, {len(self)})')
    number = int(np.searchsorted(self._ends, index, side='right'))
    part = self._parts[number]
    return part.load(index - int(self._ends[number]) + len(part))


def open_source(spec: str, *, split: str = 'train') -> Source:
  """Opens what a configuration names.

  Args:
    spec: MANIFEST, FOLDER or FOLDER:SPLIT; commas join several.
    split: taken of a folder that names none.

  Returns:
    The source; no audio has been opened yet, but for headers of files whose
    duration the manifest does not tell.

  Raises:
    SourceError: if there is no such path, or a joined key is not unique.
    ManifestError: if a manifest cannot be used.
    DatasetError: if a folder is not a data set or lacks the split.
  """
  names = [name.strip() for name in spec.split(',') if name.strip()]
  if not names:
    raise SourceError(
      'no data is named; give a manifest or the folder of a prepared data set'
    )
  parts = [_open_one(name, split) for name in names]
  return parts[0] if len(parts) == 1 else JoinedSource(parts)


def _open_one(name: str, split: str) -> Source:
  # The whole name comes first: a path may have a colon in it.
  folder, colon, own_split = name.rpartition(':')
  if pathlib.Path(name).is_dir():
    return DatasetSource(name, split)
  if pathlib.Path(name).is_file():
    return ManifestSource(name)
  if colon and pathlib.Path(folder).is_dir():
    return DatasetSource(folder, own_split)
  looked_for = f'{folder} (for the split {own_split!r})' if colon else name
  raise SourceError(
    f'{looked_for}: no such manifest (a file) or prepared data set (a folder)'
  )


def _with_duration(utterance: manifest.Utterance) -> manifest.Utterance:
  if utterance.duration is not None:
    return utterance
  try:
    duration = _measure(utterance.wav)
  except audio.AudioError:
    return utterance  # loading it will say again what is wrong
  return dataclasses.replace(
    utterance, extra={**utterance.extra, 'duration': duration}
  )


def _measure(wav: str) -> float:
  """Returns the duration in seconds, by the header if there is one."""
  try:
    header = soundfile.info(wav)
  except (soundfile.SoundFileError, OSError):
    # Missing, broken, or of a kind that only a slower decoder knows.
    return len(audio.load_audio(wav, sample_rate=SAMPLE_RATE)) / SAMPLE_RATE
  return header.frames / header.samplerate
