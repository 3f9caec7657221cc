"""Prepared data sets, which `experiments.prepare_corpus` writes."""

from collections.abc import Sequence
import copy
import os

from jaxtyping import Float
import numpy as np

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines import tfds_dataset
from u2moe_jax.frontend import audio


def find_splits(path: str) -> list[str]:
  """Lists the splits of a data set."""
  return tfds_dataset.splits(path)


def open_corpus(
  path: str, *, split: str, sample_rate: int, tolerant: bool
) -> sources.Source:
  """Opens one split of a data set."""
  del tolerant  # `prepare_corpus` has left out what cannot be used
  return PreparedSource(path, split, sample_rate=sample_rate)


class PreparedSource:
  """One split of a prepared data set."""

  def __init__(
    self, folder: str | os.PathLike[str], split: str, *, sample_rate: int
  ):
    """Reads the index of the split; audio is opened when it is asked for."""
    self.utterances: Sequence[manifest.Utterance] = tfds_dataset.read_index(
      folder, split
    )
    self._recordings = tfds_dataset.read(folder, split)
    self._first = 0
    self._sample_rate = sample_rate

  def __len__(self) -> int:
    return len(self.utterances)

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """See `sources.Source`."""
    recording = self._recordings[self._first + index]
    return audio.as_mono(
      recording.audio,
      recording.sample_rate,
      sample_rate=self._sample_rate,
      name=recording.key,
    )

  def header(self, index: int) -> audio.Header:
    """See `sources.Source`."""
    recording = self._recordings[self._first + index]
    return audio.Header(recording.duration, recording.sample_rate, 1)

  def select(self, first: int, last: int) -> 'PreparedSource':
    """Utterances `first` to `last - 1`."""
    chosen = copy.copy(self)
    chosen.utterances = sources.select_utterances(self.utterances, first, last)
    chosen._first = self._first + first
    return chosen
