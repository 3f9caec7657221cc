"""From a source to batches: plan, load, transform, pad. Reads top to bottom."""

from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import operator
import threading
from typing import Any

from jaxtyping import Float
import numpy as np

from data_pipelines import batching
from data_pipelines import manifest
from data_pipelines import mixing
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

  With several hosts it is the part of one host, keys and seconds included.

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
    shares: of the utterances of an epoch, by the items' `part`; empty if
      nothing is mixed.
  """

  def __init__(
    self,
    source: sources.Source,
    tokenizer: tokenizer_lib.Tokenizer,
    config: config_lib.DataConfig,
    *,
    rate: int,
    min_input: int,
    mixture: mixing.Mixture | None = None,
  ):
    """Tokenises every transcript and checks every length.

    Args:
      source: utterances, with random access to their audio.
      tokenizer: text to ids.
      config: limits and features.
      rate: subsampling rate of the encoder.
      min_input: feature frames the encoder needs for one output frame.
      mixture: how `source` is mixed, if it is.

    Raises:
      NoDataError: if nothing is usable, or nothing of a mixed part.
    """
    self.config = config
    self.source = source
    self.shares = mixture.shares if mixture else ()
    self._min_input = min_input
    self.items: list[plan.Item] = []
    self.skipped: list[Skip] = []
    labels: list[list[int]] = []
    source_index: list[int] = []
    # (None, where nothing is skipped, is in no list of ids.)
    unknown = tokenizer.special.unk if config.skip_unknown else None
    for index, utterance in enumerate(source.utterances):
      ids = tokenizer.encode(utterance.txt)
      item = plan.Item(
        utterance.key,
        utterance.duration or 0.0,
        len(ids),
        _min_ctc_frames(ids),
        int(mixture.parts[index]) if mixture else 0,
      )
      skip = _unreadable(source, index, utterance)
      reason = plan.rejection(item, config, rate=rate, min_input=min_input)
      if reason is None and unknown in ids:
        reason = 'unknown_tokens'
      if skip is None and reason:
        skip = Skip(item.key, reason)
      if skip is not None:
        self.skipped.append(skip)
        continue
      self.items.append(item)
      labels.append(ids)
      source_index.append(index)
    self._labels = _Labels(labels)
    # From the plan's numbers, of usable utterances, to those of the source.
    self._source_index = np.array(source_index, np.int64)
    self._require_items(mixture)

  def _require_items(self, mixture: mixing.Mixture | None) -> None:
    used = {item.part for item in self.items}
    names = mixture.names if self.shares and mixture else ('the data',)
    for part, name in enumerate(names):
      if part not in used:
        counts = Counter(skip.reason for skip in self.skipped)
        raise NoDataError(
          f'no utterance of {name} can be used, of {len(self.skipped)} left '
          f'out: {dict(counts)}; see data.min_seconds, data.max_seconds, '
          'data.max_tokens'
        )

  @property
  def hours(self) -> float:
    """Audio in the usable utterances."""
    return sum(item.seconds for item in self.items) / 3600

  def text(self, index: int) -> str:
    """Transcript of a usable utterance."""
    return self.source.utterances[int(self._source_index[index])].txt

  def samples(self, index: int) -> Float[np.ndarray, 'samples']:
    """Loads a usable utterance's waveform; AudioError if that fails."""
    return self.source.load(int(self._source_index[index]))

  def speech(
    self, rng: np.random.Generator
  ) -> Float[np.ndarray, 'samples'] | None:
    """Some usable utterance's samples; None if they cannot be read."""
    try:
      return self.samples(int(rng.integers(len(self.items))))
    except audio.AudioError:  # told when its own turn comes
      return None

  def load(
    self,
    planned: plan.PlannedBatch,
    steps: Sequence[transforms.Step],
    make_rng: Callable[[str, int], np.random.Generator],
  ) -> HostBatch:
    """Loads, transforms and pads one planned batch.

    Args:
      planned: the batch, or one host's part of it.
      steps: see `transforms.training_steps`.
      make_rng: generator of an utterance by key and round.
    """
    rows: list[transforms.Row | None] = []
    skipped, seconds = [], 0.0
    draws = zip(planned.indices, planned.speeds, planned.rounds, strict=True)
    for index, speed, number in draws:
      key = self.items[index].key
      try:
        # A generator of its own: what is drawn for it hangs on no other
        # utterance, on no worker and on no order.
        row = self._row(index, speed, make_rng(key, number))
        for step in steps:
          row = step(row)
        self._require_frames(row)
        rows.append(row)
        seconds += self.items[index].seconds / speed
      except audio.AudioError as error:
        skipped.append(Skip(key, error.reason, str(error)))
        # The row stays empty: were the others to move up, a bad file would
        # change all batches behind it.
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

  def _row(
    self, index: int, speed: float, rng: np.random.Generator
  ) -> transforms.Row:
    return transforms.Row(
      key=self.items[index].key,
      samples=self.samples(index),
      labels=self._labels[index],
      speed=speed,
      rng=rng,
    )


class _Labels:
  """Token ids of many utterances; a tenth of the memory of tuples."""

  def __init__(self, labels: Iterable[Sequence[int]]) -> None:
    labels = list(labels)
    # One flat array; labels of utterance i are [ends[i], ends[i + 1]).
    self._ends = np.cumsum([0, *map(len, labels)])
    ids = itertools.chain.from_iterable(labels)
    self._ids = np.fromiter(ids, np.int32, int(self._ends[-1]))

  def __getitem__(self, index: int) -> tuple[int, ...]:
    ids = self._ids[self._ends[index] : self._ends[index + 1]]
    return tuple(ids.tolist())


def _unreadable(
  source: sources.Source, index: int, utterance: manifest.Utterance
) -> Skip | None:
  """Why an utterance has no duration: its sound cannot be opened."""
  if utterance.duration is not None:
    return None
  try:
    source.load(index)
  except audio.AudioError as error:
    return Skip(utterance.key, error.reason, str(error))
  return Skip(utterance.key, 'no_duration')


def _min_ctc_frames(labels: Sequence[int]) -> int:
  """Labels, and a blank between equal neighbours."""
  return len(labels) + sum(map(operator.eq, labels, labels[1:]))


class TrainBatches:
  """Training batches by number: `self[n]` is step n's batch, for ever.

  The number is the whole state of the data: batch n is the same whatever was
  asked for before, on any number of workers; and of any number of hosts, each
  loads its rows of it.

  Attributes:
    planned_buckets: the shapes that the plan fills.
    buckets: the shapes of the batches, rows that are always empty included.
    epochs_together: epochs that are planned together.
  """

  def __init__(
    self,
    corpus: Corpus,
    *,
    seed: int,
    multiple: int = 1,
    buckets: Sequence[plan.Bucket] | None = None,
    host_index: int = 0,
    num_hosts: int = 1,
  ):
    """Fixes the buckets.

    Args:
      corpus: the utterances.
      seed: of the experiment.
      multiple: batch sizes are multiples of it; of `num_hosts`, then.
      buckets: those of a run that goes on, whatever its `multiple` was: the
        utterances of each batch stay, with empty rows behind them.
      host_index: number of this host.
      num_hosts: hosts that share each batch.

    Raises:
      ValueError: if `num_hosts` does not divide `multiple`.
      NoiseError: for noise or impulse responses that are not there.
    """
    if multiple % num_hosts or not 0 <= host_index < num_hosts:
      raise ValueError(
        f'host {host_index} of {num_hosts} cannot take its part of batches '
        f'whose sizes are multiples of {multiple}'
      )
    self._corpus = corpus
    self._seed = seed
    self._host = {'host_index': host_index, 'num_hosts': num_hosts}
    config = corpus.config
    self.planned_buckets = buckets or plan.make_buckets(
      corpus.items,
      config,
      speeds=config.augment.speeds or (1.0,),
      multiple=multiple,
    )
    self._multiple = multiple
    # Planned in multiples of the run's own devices; padded to those of now.
    self.buckets = [plan.padded(b, multiple) for b in self.planned_buckets]
    self.epochs_together = plan.epochs_together(
      corpus.items, self.planned_buckets, config
    )
    self._steps = transforms.training_steps(config, corpus.speech)
    self._starts = [0]  # number of each epoch's first batch
    self._set_up()

  def _set_up(self) -> None:
    """Makes what does not travel to another process."""
    self._lock = threading.Lock()
    # Two: workers that are ahead may be in the next block already.
    self._block_plan = functools.lru_cache(maxsize=2)(self._plan)

  def __getstate__(self) -> dict[str, Any]:
    return {
      key: value
      for key, value in self.__dict__.items()
      if key not in ('_lock', '_block_plan')
    }

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._set_up()

  def _plan(self, epochs: range) -> list[list[plan.PlannedBatch]]:
    return plan.plan_block(
      self._corpus.items,
      self.planned_buckets,
      self._corpus.config,
      seed=self._seed,
      epochs=epochs,
      shares=self._corpus.shares,
    )

  def epoch(self, epoch: int) -> list[plan.PlannedBatch]:
    """The batches of an epoch, of all hosts."""
    epochs = plan.block_of(
      epoch, together=self.epochs_together, config=self._corpus.config
    )
    return self._block_plan(epochs)[epoch - epochs.start]

  def locate(self, number: int) -> tuple[int, plan.PlannedBatch]:
    """The epoch of a batch, and its plan for all hosts."""
    with self._lock:  # worker threads ask at the same time
      # How many batches an epoch has is known only when it is planned.
      while self._starts[-1] <= number:
        epoch = len(self._starts) - 1
        self._starts.append(self._starts[-1] + len(self.epoch(epoch)))
    epoch = int(np.searchsorted(self._starts, number, side='right')) - 1
    return epoch, self.epoch(epoch)[number - self._starts[epoch]]

  def __getitem__(self, number: int) -> HostBatch:
    """This host's rows of batch `number`."""
    _, planned = self.locate(number)
    bucket = plan.padded(planned.bucket, self._multiple)
    planned = dataclasses.replace(planned, bucket=bucket)

    def make_rng(key: str, number: int) -> np.random.Generator:
      # The round and not the epoch: the n-th time an utterance comes it gets
      # the same, whatever else is mixed in.
      return plan.generator(self._seed, 'augment', number, key)

    return self._corpus.load(
      plan.of_host(planned, **self._host), self._steps, make_rng
    )

  def iterate(
    self,
    start: int,
    *,
    num_workers: int,
    worker_type: config_lib.WorkerType = 'thread',
  ) -> Iterator[HostBatch]:
    """Yields batch `start` and all that follow.

    Args:
      start: number of the first one.
      num_workers: threads or processes that prepare batches ahead; 0: each
        batch is made when it is asked for.
      worker_type: thread or process. A process is sent the corpus once, and
        plans for itself; it needs absl's flags parsed.
    """
    import grain  # only where data is read: the import is not free

    dataset = grain.MapDataset.source(_Endless(self, start))
    if worker_type == 'process' and num_workers:
      # Inside of each process one thread: the processes share the work.
      alone = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
      workers = grain.MultiprocessingOptions(num_workers=num_workers)
      return iter(dataset.to_iter_dataset(alone).mp_prefetch(workers))
    ahead = 2 * num_workers + 2 if num_workers else 0
    options = grain.ReadOptions(
      num_threads=num_workers, prefetch_buffer_size=ahead
    )
    return iter(dataset.to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _Endless:
  """Batches from `start` on, as the random-access source Grain wants."""

  batches: TrainBatches
  start: int

  def __len__(self) -> int:
    # Grain wants a length, and training has no end.
    return 2**40

  def __getitem__(self, index: Any) -> HostBatch:
    return self.batches[self.start + int(index)]


def evaluation_batches(
  corpus: Corpus,
  *,
  buckets: Sequence[plan.Bucket],
  host_index: int = 0,
  num_hosts: int = 1,
) -> Iterator[tuple[HostBatch, tuple[int, ...]]]:
  """Every utterance once, without augmentation.

  Args:
    corpus: the utterances.
    buckets: shapes that are compiled anyway; one is added if something does
      not fit.
    host_index: number of this host.
    num_hosts: hosts that share each batch; each loads its rows of it.

  Yields:
    A batch, and the corpus indices of its rows, those of other hosts included.
  """
  config = corpus.config
  buckets = plan.extend_buckets(buckets, corpus.items, config)
  steps = (transforms.Fbank(config.features, dither=False),)
  for planned in plan.plan_once(corpus.items, buckets, config):
    own = plan.of_host(planned, host_index=host_index, num_hosts=num_hosts)
    batch = corpus.load(own, steps, lambda key, _: plan.generator(key))
    yield batch, planned.indices
