"""The built-in corpus, spoken when it is asked for.

`builtin` or `builtin:SPLIT`. Needs the package `espeakng-loader`. To train on
it, prepare it first: speaking takes longer than reading.
"""

from collections.abc import Sequence
import threading
from typing import Any

from jaxtyping import Float
from jaxtyping import Int16
import numpy as np

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines.corpora import espeak
from u2moe_jax.frontend import audio

SPLITS: tuple[espeak.Split, ...] = ('train', 'dev', 'test')


def find_splits(path: str) -> list[str]:
  """Lists the splits; `path` may name one."""
  return [path] if path else list(SPLITS)


def open_corpus(
  path: str, *, split: str, sample_rate: int, tolerant: bool
) -> sources.Source:
  """Opens a split of the corpus of seed 0 and the usual size."""
  del tolerant
  split = path or split
  if split not in SPLITS:
    raise sources.SourceError(
      f'builtin: no split {split!r}; there is {", ".join(SPLITS)}'
    )
  scripts = espeak.write_scripts()
  return SpokenSource(scripts[split], sample_rate=sample_rate)


class SpokenSource:
  """Scripts, and the speech engine that reads them out."""

  def __init__(
    self,
    scripts: list[espeak.Script],
    *,
    sample_rate: int = espeak.SAMPLE_RATE,
  ):
    """Remembers the scripts; speaks nothing yet.

    Args:
      scripts: what to say.
      sample_rate: Hz of what `load` gives.

    Raises:
      EngineError: if the engine's package is not installed.
    """
    espeak.require_engine()
    self._scripts = scripts
    self._sample_rate = sample_rate
    # What was spoken to know how long it is; nobody wants to hear it twice.
    self._spoken: dict[int, Int16[np.ndarray, 'samples']] = {}
    self._lock = threading.Lock()  # the engine keeps its state in C globals
    self.utterances: Sequence[manifest.Utterance] = manifest.table(
      manifest.Utterance(script.key, '', script.txt, espeak.describe(script))
      for script in scripts
    )

  def __len__(self) -> int:
    return len(self._scripts)

  def _speak(self, index: int) -> Int16[np.ndarray, 'samples']:
    with self._lock:
      return espeak.record(self._scripts[index]).audio

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """See `sources.Source`."""
    spoken = self._spoken.get(index)
    samples = self._speak(index) if spoken is None else spoken
    return audio.as_mono(
      samples, espeak.SAMPLE_RATE, sample_rate=self._sample_rate
    )

  def header(self, index: int) -> audio.Header:
    """See `sources.Source`."""
    self._spoken[index] = self._speak(index)
    seconds = len(self._spoken[index]) / espeak.SAMPLE_RATE
    return audio.Header(seconds, espeak.SAMPLE_RATE, 1)

  def select(self, first: int, last: int) -> 'SpokenSource':
    """Utterances `first` to `last - 1`."""
    chosen = self._scripts[first:last]
    return SpokenSource(chosen, sample_rate=self._sample_rate)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_lock'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()
