"""From a source to batches: plan, load, transform, pad. Reads top to bottom."""

from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import threading
from typing import Any

import numpy as np

from data_pipelines import batching
from data_pipelines import plan
from data_pipelines import sources
from data_pipelines import transforms
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Skip:
  """An utterance that is not trained on, and why."""

  key: str
  reason: str
  detail: str = ''


@dataclasses.dataclass(frozen=True)
class HostBatch:
  """One step's arrays, and what was lost while loading them.

  Attributes:
    arrays: see `batching.pad_batch`.
    keys: utterance of each row; rows behind them are empty.
    seconds: audio in the batch, after the change of speed.
    skipped: utterances whose rows stayed empty.
  """

  arrays: dict[str, np.ndarray]
  keys: tuple[str, ...]
  seconds: float
  skipped: tuple[Skip, ...] = ()


class NoDataError(ValueError):
  """Nothing is left to train on; the message gives the reasons."""


class Corpus:
  """A source, tokenised, with what cannot be used left out and named.

  Attributes:
    items: usable utterances, as the plan sees them.
    skipped: the others.
  """

  def __init__(
    self,
    source: sources.Source,
    tokenizer: tokenizer_lib.Tokenizer,
    config: config_lib.DataConfig,
    *,
    rate: int,
    min_input: int,
  ):
    """Tokenises every transcript and checks every length.

    Args:
      source: utterances, with random access to their audio.
      tokenizer: text to ids.
      config: limits and features.
      rate: subsampling rate of the encoder.
      min_input: feature frames the encoder needs for one output frame.

    Raises:
      NoDataError: if nothing is usable.
    """
    self.config = config
    self.source = source
    self._min_input = min_input
    self.items: list[plan.Item] = []
    self.skipped: list[Skip] = []
    self._labels: list[tuple[int, ...]] = []
    self._source_index: list[int] = []
    for index, utterance in enumerate(source.utterances):
      labels = tuple(tokenizer.encode(utterance.txt))
      item = plan.Item(
        utterance.key,
        utterance.duration or 0.0,
        len(labels),
        _min_ctc_frames(labels),
      )
      skip = _unreadable(source, index)
      reason = plan.rejection(item, config, rate=rate, min_input=min_input)
      if skip is None and reason:
        skip = Skip(item.key, reason)
      if skip is not None:
        self.skipped.append(skip)
        continue
      self.items.append(item)
      self._labels.append(labels)
      self._source_index.append(index)
    if not self.items:
      counts = Counter(skip.reason for skip in self.skipped)
      raise NoDataError(
        f'none of {len(self.skipped)} utterances can be used: {dict(counts)}; '
        'see data.min_seconds, data.max_seconds, data.max_tokens'
      )

  @property
  def hours(self) -> float:
    """Audio in the usable utterances."""
    return sum(item.seconds for item in self.items) / 3600

  def text(self, index: int) -> str:
    """Transcript of a usable utterance."""
    return self.source.utterances[self._source_index[index]].txt

  def load(
    self,
    planned: plan.PlannedBatch,
    steps: Sequence[Callable[[transforms.Row], transforms.Row]],
    make_rng: Callable[[str], np.random.Generator],
  ) -> HostBatch:
    """Loads, transforms and pads one planned batch."""
    rows: list[transforms.Row | None] = []
    skipped, seconds = [], 0.0
    for index, speed in zip(planned.indices, planned.speeds, strict=True):
      key = self.items[index].key
      try:
        row = self._row(index, speed, make_rng(key))
        for step in steps:
          row = step(row)
        self._require_frames(row)
        rows.append(row)
        seconds += self.items[index].seconds / speed
      except audio.AudioError as error:
        skipped.append(Skip(key, error.reason, str(error)))
        rows.append(None)
    bins = self.config.features.num_mel_bins
    return HostBatch(
      arrays=batching.pad_batch(rows, planned.bucket, bins),
      keys=tuple(self.items[i].key for i in planned.indices),
      seconds=seconds,
      skipped=tuple(skipped),
    )

  def _require_frames(self, row: transforms.Row) -> None:
    """Refuses sound that is shorter than its manifest says."""
    num_frames = 0 if row.frames is None else len(row.frames)
    if num_frames < self._min_input:
      raise audio.AudioError(
        'too_short',
        f'{row.key}: {num_frames} frames, the encoder needs '
        f'{self._min_input}; the sound is shorter than its manifest says',
      )

  def _row(self, index, speed, rng) -> transforms.Row:
    return transforms.Row(
      key=self.items[index].key,
      samples=self.source.load(self._source_index[index]),
      labels=self._labels[index],
      speed=speed,
      rng=rng,
    )


def _unreadable(source: sources.Source, index: int) -> Skip | None:
  """Why an utterance has no duration: its sound cannot be opened."""
  utterance = source.utterances[index]
  if utterance.duration is not None:
    return None
  try:
    source.load(index)
  except audio.AudioError as error:
    return Skip(utterance.key, error.reason, str(error))
  return Skip(utterance.key, 'no_duration')


def _min_ctc_frames(labels: Sequence[int]) -> int:
  """Labels, and a blank between equal neighbours."""
  repeats = sum(a == b for a, b in itertools.pairwise(labels))
  return len(labels) + repeats


class TrainBatches:
  """Training batches by number: `self[n]` is step n's batch, for ever.

  The number is the whole state of the data: batch n is the same whatever was
  asked for before, on any number of workers.
  """

  def __init__(self, corpus: Corpus, *, seed: int, multiple: int = 1):
    """Fixes the buckets.

    Args:
      corpus: the utterances.
      seed: of the experiment.
      multiple: batch sizes are multiples of it.
    """
    self._corpus = corpus
    self._seed = seed
    config = corpus.config
    self.buckets = plan.make_buckets(
      corpus.items,
      config,
      speeds=config.augment.speeds or (1.0,),
      multiple=multiple,
    )
    self._steps = (
      transforms.ChangeSpeed(config.features),
      transforms.Fbank(config.features, dither=True),
      transforms.Augment(config.augment),
    )
    self._lock = threading.Lock()
    self._starts = [0]  # number of each epoch's first batch
    self._epoch_plan = functools.lru_cache(maxsize=2)(self._plan)

  def _plan(self, epoch: int) -> list[plan.PlannedBatch]:
    return plan.plan_epoch(
      self._corpus.items,
      self.buckets,
      self._corpus.config,
      seed=self._seed,
      epoch=epoch,
    )

  def locate(self, number: int) -> tuple[int, plan.PlannedBatch]:
    """The epoch of a batch, and its plan."""
    with self._lock:  # worker threads ask at the same time
      while self._starts[-1] <= number:
        epoch = len(self._starts) - 1
        self._starts.append(self._starts[-1] + len(self._epoch_plan(epoch)))
    epoch = int(np.searchsorted(self._starts, number, side='right')) - 1
    return epoch, self._epoch_plan(epoch)[number - self._starts[epoch]]

  def __getitem__(self, number: int) -> HostBatch:
    epoch, planned = self.locate(number)

    def make_rng(key: str) -> np.random.Generator:
      return plan.generator(self._seed, 'augment', epoch, key)

    return self._corpus.load(planned, self._steps, make_rng)

  def iterate(self, start: int, *, num_workers: int) -> Iterator[HostBatch]:
    """Yields batch `start` and all that follow, prepared ahead by threads."""
    import grain  # only where data is read: the import is not free

    dataset = grain.MapDataset.source(_Endless(self, start))
    options = grain.ReadOptions(
      num_threads=max(num_workers, 1), prefetch_buffer_size=2 * num_workers + 2
    )
    return iter(dataset.to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _Endless:
  """Batches from `start` on, as the random-access source Grain wants."""

  batches: TrainBatches
  start: int

  def __len__(self) -> int:
    return 2**40

  def __getitem__(self, index: Any) -> HostBatch:
    return self.batches[self.start + int(index)]


def evaluation_batches(
  corpus: Corpus, *, buckets: Sequence[plan.Bucket]
) -> Iterator[tuple[HostBatch, tuple[int, ...]]]:
  """Every utterance once, without augmentation.

  Args:
    corpus: the utterances.
    buckets: shapes that are compiled anyway; one is added if something does
      not fit.

  Yields:
    A batch and the corpus indices of its rows.
  """
  config = corpus.config
  buckets = plan.extend_buckets(buckets, corpus.items, config)
  steps = (transforms.Fbank(config.features, dither=False),)
  for planned in plan.plan_once(corpus.items, buckets, config):
    batch = corpus.load(planned, steps, lambda key: plan.generator(key))
    yield batch, planned.indices
