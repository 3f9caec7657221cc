"""The batch plan: a pure function of (manifest, seed, epoch).

Step n names its utterances, their bucket and their speed factors before any
audio is opened. What turns out bad while loading leaves an empty row; it
never moves another utterance.

An epoch of a small corpus does not fill the last batch of every bucket, and
padding what is left over into longer buckets is dear. So several epochs may
be planned together (`block_of`): what is left over waits for its like in the
next epoch, and only the block's last epoch pads.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import hashlib

from jaxtyping import Float
from jaxtyping import Int
import numpy as np

from u2moe_jax import config as config_lib


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
  """What the plan needs to know of an utterance.

  Attributes:
    key: its name.
    seconds: duration before any change of speed.
    num_tokens: labels.
    min_frames: encoder frames its CTC labels need, repeats included.
    part: which of the mixed sources it comes from.
  """

  key: str
  seconds: float
  num_tokens: int
  min_frames: int = 0
  part: int = 0


@dataclasses.dataclass(frozen=True)
class Bucket:
  """One compiled shape.

  Attributes:
    max_frames: padded feature frames T_in.
    max_tokens: padded labels U.
    batch_size: rows B.
  """

  max_frames: int
  max_tokens: int
  batch_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedBatch:
  """One step.

  Attributes:
    bucket: the padded shape.
    indices: utterances, as positions in the source; fewer than `batch_size`
      leave empty rows.
    speeds: speed factor of each.
    rounds: how often each was drawn before, which is the number of its epoch
      unless sources are mixed; its augmentation hangs on it.
  """

  bucket: Bucket
  indices: tuple[int, ...]
  speeds: tuple[float, ...]
  rounds: tuple[int, ...]


def generator(*parts: int | str) -> np.random.Generator:
  """A generator that depends on nothing but `parts`."""
  # With a separator, so that (1, '23') and (12, '3') differ. Not `hash`, which
  # gives something else in every process.
  text = '\x1f'.join(map(str, parts)).encode()
  digest = hashlib.blake2b(text, digest_size=16).digest()
  return np.random.default_rng(int.from_bytes(digest, 'little'))


def num_frames(
  seconds: float, speed: float, features: config_lib.FeatureConfig
) -> int:
  """Feature frames of an utterance after a change of speed."""
  samples = round(seconds * features.sample_rate / speed)
  extra = samples - features.window_samples
  return 0 if extra < 0 else 1 + extra // features.shift_samples


def _all_num_frames(
  seconds: Float[np.ndarray, '...'],
  speeds: Float[np.ndarray, '...'],
  features: config_lib.FeatureConfig,
) -> Int[np.ndarray, '...']:
  """`num_frames` of many; rounds halves to even, as `round` does."""
  samples = np.rint(seconds * features.sample_rate / speeds).astype(np.int64)
  extra = samples - features.window_samples
  return np.where(extra < 0, 0, 1 + extra // features.shift_samples)


def _seconds(items: Sequence[Item]) -> Float[np.ndarray, 'items']:
  return np.fromiter((item.seconds for item in items), float, len(items))


def _tokens(items: Sequence[Item]) -> Int[np.ndarray, 'items']:
  return np.fromiter((item.num_tokens for item in items), int, len(items))


def rejection(
  item: Item, config: config_lib.DataConfig, *, rate: int, min_input: int
) -> str | None:
  """Why an utterance cannot be trained on, or None.

  Args:
    item: the utterance.
    config: limits.
    rate: subsampling rate of the encoder.
    min_input: feature frames the encoder needs for one output frame.

  Returns:
    `too_short`, `too_long`, `too_few_tokens`, `too_many_tokens` or
    `labels_do_not_fit`.
  """
  # At its shortest: whatever speed is drawn later, the utterance fits.
  fastest = num_frames(item.seconds, max(_speeds(config)), config.features)
  if item.seconds < config.min_seconds or fastest < min_input:
    return 'too_short'
  if item.seconds > config.max_seconds:
    return 'too_long'
  if item.num_tokens < config.min_tokens:
    return 'too_few_tokens'
  if item.num_tokens > config.max_tokens:
    return 'too_many_tokens'
  # The last output frame needs its right context, hence min_input.
  if (fastest - min_input) // rate + 1 < item.min_frames:
    return 'labels_do_not_fit'
  return None


def _speeds(config: config_lib.DataConfig) -> tuple[float, ...]:
  return config.augment.speeds or (1.0,)


def make_buckets(
  items: Sequence[Item],
  config: config_lib.DataConfig,
  *,
  speeds: Sequence[float],
  multiple: int = 1,
) -> list[Bucket]:
  """Chooses the static shapes from the lengths there are.

  Boundaries are those that pad the least: first of the frames, then, within
  the frames of one bucket, of the tokens. A bucket more is a shape more to
  compile, and there are at most `num_buckets * num_token_buckets`.

  Args:
    items: all utterances that may appear.
    config: budget or batch sizes, and number of buckets.
    speeds: speed factors that may be drawn.
    multiple: batch sizes are multiples of it (devices along the batch).

  Returns:
    Buckets by rising `max_frames`, then `max_tokens`; the last holds every
    utterance at its slowest.

  Raises:
    ConfigError: if `batch_sizes` are not as many as the buckets by frames.
  """
  # Every utterance at every speed, since any of them may be drawn.
  factors = np.array(speeds, float)
  lengths = _all_num_frames(
    _seconds(items)[:, None], factors, config.features
  ).ravel()  # (items * speeds,)
  tokens = np.repeat(_tokens(items), len(factors))  # (items * speeds,)
  buckets: list[Bucket] = []
  low, most_tokens = -1, 0
  bounds = _least_padding(lengths, config.num_buckets)
  for bound, rows in zip(bounds, _batch_sizes(bounds, config), strict=True):
    inside = tokens[(lengths > low) & (lengths <= bound)]
    widths = _least_padding(inside, config.num_token_buckets)
    # A longer bucket takes whatever a shorter one can.
    most_tokens = max(most_tokens, _round_up(widths[-1], 4))
    # Rounded down, so that the budget holds; but each device needs a row.
    size = max(1, rows // multiple) * multiple
    # A set: boundaries that are equal once rounded are one shape.
    rounded = {_round_up(width, 4) for width in widths[:-1]} | {most_tokens}
    buckets += [Bucket(bound, width, size) for width in sorted(rounded)]
    low = bound
  return buckets


def padded(bucket: Bucket, multiple: int) -> Bucket:
  """The bucket with as many empty rows as make B a multiple."""
  size = _round_up(bucket.batch_size, multiple)
  return dataclasses.replace(bucket, batch_size=size)


def _batch_sizes(
  bounds: Sequence[int], config: config_lib.DataConfig
) -> list[int]:
  """Rows of each bucket by frames: the configured, or what fits the budget."""
  if not config.batch_sizes:
    most = config.max_batch_size
    return [min(most, max(1, config.batch_frames // b)) for b in bounds]
  if len(config.batch_sizes) != len(bounds):
    raise config_lib.ConfigError(
      f'data.batch_sizes has {len(config.batch_sizes)} sizes, and there are '
      f'{len(bounds)} buckets by frames (data.num_buckets, or as many lengths '
      'as the data has)'
    )
  return list(config.batch_sizes)


# Candidates for boundaries: enough to pad little, few enough to try all.
_MAX_CANDIDATES = 200


def _least_padding(
  lengths: Int[np.ndarray, 'n'], num_buckets: int
) -> list[int]:
  """Boundaries that minimise the padding, by dynamic programming."""
  candidates = np.unique(lengths)
  if len(candidates) > _MAX_CANDIDATES:
    shares = np.linspace(0, 1, _MAX_CANDIDATES)
    # Spread over counts and over lengths: both crowds and tails matter.
    by_count = np.quantile(lengths, shares, method='higher')
    by_length = candidates[(shares * (len(candidates) - 1)).astype(int)]
    candidates = np.unique(np.concatenate([by_count, by_length]).astype(int))
  below = np.searchsorted(np.sort(lengths), candidates, side='right')
  below = np.concatenate([[0], below])  # utterances up to each candidate
  # cost[j]: least padded frames of all utterances up to candidate j.
  cost = np.full(len(below), np.inf)
  cost[0] = 0
  choices = []
  for _ in range(num_buckets):
    # From boundary i to boundary j: all between are padded to candidate j.
    # [i, j]; negative where j is below i, which is no step.
    step = (below[None, 1:] - below[:, None]) * candidates[None]
    reach = np.where(step >= 0, cost[:, None] + step, np.inf)
    choices.append(np.argmin(reach, axis=0))
    cost = np.concatenate([[0], np.min(reach, axis=0)])
  # Back from the longest length, which must be a boundary. A boundary may come
  # twice, where fewer do as well; hence the set.
  bounds, j = [], len(candidates)
  for choice in reversed(choices):
    if j:
      bounds.append(int(candidates[j - 1]))
      j = int(choice[j - 1])
  return sorted(set(bounds))


def _round_up(value: int, step: int) -> int:
  return -(-value // step) * step


def extend_buckets(
  buckets: Sequence[Bucket],
  items: Sequence[Item],
  config: config_lib.DataConfig,
) -> list[Bucket]:
  """Adds one bucket for utterances longer than any, where there are some."""
  last = buckets[-1]
  longest = _all_num_frames(_seconds(items), np.ones(()), config.features)
  frames, tokens = int(longest.max()), int(_tokens(items).max())
  if frames <= last.max_frames and tokens <= last.max_tokens:
    return list(buckets)
  extra = dataclasses.replace(
    last,
    max_frames=max(frames, last.max_frames),
    max_tokens=max(_round_up(tokens, 4), last.max_tokens),
  )
  return [*buckets, extra]


# A block has so many batches for each bucket, on average; then the one that
# each bucket may leave incomplete weighs little.
_BATCHES_PER_BUCKET = 8
_MOST_EPOCHS = 20
# A batch gathers what fits it from so many epochs, on average. Beyond, it would
# be copies of a few utterances, which is worse than padding.
_MOST_EPOCHS_PER_BATCH = 4


def epochs_together(
  items: Sequence[Item],
  buckets: Sequence[Bucket],
  config: config_lib.DataConfig,
) -> int:
  """Number of epochs in a block: `plan_epochs`, or 0 resolved.

  Args:
    items: the utterances.
    buckets: see `make_buckets`.
    config: `plan_epochs`.

  Returns:
    1 where an epoch fills every bucket many times, or too few of them; up to
    20 between.
  """
  if config.plan_epochs:
    return config.plan_epochs
  frames = _all_num_frames(_seconds(items), np.ones(()), config.features)
  chosen = _bucket_numbers(frames, items, np.arange(len(items)), buckets)
  sizes = np.array([bucket.batch_size for bucket in buckets])
  # An utterance is one row of a batch of its bucket.
  batches = float(np.sum(1.0 / sizes[chosen]))
  epochs_per_batch = len(buckets) / batches
  if epochs_per_batch > _MOST_EPOCHS_PER_BATCH:
    return 1
  needed = np.ceil(_BATCHES_PER_BUCKET * epochs_per_batch)
  return int(np.clip(needed, 1, _MOST_EPOCHS))


def block_of(
  epoch: int, *, together: int, config: config_lib.DataConfig
) -> range:
  """The epochs that are planned with an epoch, itself included.

  Args:
    epoch: number of the epoch.
    together: see `epochs_together`.
    config: `short_first_epochs`, each of which stands alone.
  """
  alone = config.short_first_epochs
  if epoch < alone:
    return range(epoch, epoch + 1)
  first = epoch - (epoch - alone) % together
  return range(first, first + together)


def plan_block(
  items: Sequence[Item],
  buckets: Sequence[Bucket],
  config: config_lib.DataConfig,
  *,
  seed: int,
  epochs: Iterable[int],
  shares: Sequence[float] = (),
) -> list[list[PlannedBatch]]:
  """Plans neighbouring epochs of training together.

  Args:
    items: the utterances, rejected ones left out (their `indices` here are
      positions in this sequence).
    buckets: see `make_buckets`.
    config: speeds.
    seed: of the experiment.
    epochs: their numbers, see `block_of`.
    shares: of the utterances of an epoch, by the items' `part`; none takes
      every item once per epoch.

  Returns:
    For each epoch its batches in training order. Unless mixed, every item
    appears exactly once per epoch of the block, though its batch may come in
    a later epoch of it.
  """
  planner = _Planner(items, buckets, config, seed, shares)
  epochs = list(epochs)
  return [planner.plan(epoch, last=epoch == epochs[-1]) for epoch in epochs]


@dataclasses.dataclass(frozen=True)
class _Draws:
  """Utterances on their way into batches, in training order.

  Attributes:
    indices: their numbers.
    speeds: positions in the list of speed factors.
    rounds: how often each was drawn before.
  """

  indices: Int[np.ndarray, 'n']
  speeds: Int[np.ndarray, 'n']
  rounds: Int[np.ndarray, 'n']

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, chosen: slice | np.ndarray) -> '_Draws':
    return _Draws(
      self.indices[chosen], self.speeds[chosen], self.rounds[chosen]
    )

  def __add__(self, other: '_Draws') -> '_Draws':
    return _Draws(
      np.concatenate([self.indices, other.indices]),
      np.concatenate([self.speeds, other.speeds]),
      np.concatenate([self.rounds, other.rounds]),
    )


_NO_DRAWS = _Draws(*(np.zeros(0, int) for _ in range(3)))


class _Planner:
  """One block: epoch after epoch, with what waits in each bucket."""

  def __init__(
    self,
    items: Sequence[Item],
    buckets: Sequence[Bucket],
    config: config_lib.DataConfig,
    seed: int,
    shares: Sequence[float],
  ) -> None:
    self._items = items
    self._buckets = list(buckets)
    self._config = config
    self._seed = seed
    self._shares = shares
    self._factors = _speeds(config)
    self._seconds = _seconds(items)
    self._tokens = _tokens(items)
    self._waiting = [_NO_DRAWS] * len(self._buckets)

  def plan(self, epoch: int, *, last: bool) -> list[PlannedBatch]:
    """Batches that are full with this epoch; if it is the last, all."""
    # Of the epoch alone: what is drawn does not hang on those before it.
    rng = generator(self._seed, 'plan', epoch)
    drawn = self._draw(rng, epoch)
    order = rng.permutation(len(drawn))
    short_first = epoch < self._config.short_first_epochs
    if short_first:
      seconds = self._seconds[drawn.indices[order]]
      # Stable: equals stay shuffled.
      order = order[np.argsort(seconds, kind='stable')]
    batches = self._fill(drawn[order])
    if last:
      batches += self._flush()
    if short_first:
      return batches
    # Shuffled, or batches of what was left over would always come last.
    return [batches[i] for i in rng.permutation(len(batches))]

  def _draw(self, rng: np.random.Generator, epoch: int) -> _Draws:
    if self._shares:
      indices, rounds = _mix(self._items, self._shares, self._seed, epoch)
    else:
      indices = np.arange(len(self._items))
      # Every item comes once an epoch, so the round is the epoch.
      rounds = np.full(len(indices), epoch)
    speeds = rng.integers(len(self._factors), size=len(indices))
    return _Draws(indices, speeds, rounds)

  def _lengths(self, drawn: _Draws) -> Int[np.ndarray, 'n']:
    return _all_num_frames(
      self._seconds[drawn.indices],
      np.array(self._factors, float)[drawn.speeds],
      self._config.features,
    )

  def _fill(self, drawn: _Draws) -> list[PlannedBatch]:
    """Full batches in the order in which their last utterance comes."""
    chosen = _bucket_numbers(
      self._lengths(drawn), self._items, drawn.indices, self._buckets
    )
    found: list[tuple[int, PlannedBatch]] = []
    for number, bucket in enumerate(self._buckets):
      places = np.flatnonzero(chosen == number)
      before = len(self._waiting[number])
      inside = self._waiting[number] + drawn[places]
      size = bucket.batch_size
      whole = len(inside) - len(inside) % size
      for start in range(0, whole, size):
        batch = self._planned(bucket, inside[start : start + size])
        # A batch is due when its last utterance comes. What waited before is
        # less than a batch, so that utterance is always one of this epoch.
        found.append((int(places[start + size - 1 - before]), batch))
      self._waiting[number] = inside[whole:]
    return [batch for _, batch in sorted(found, key=lambda pair: pair[0])]

  def _flush(self) -> list[PlannedBatch]:
    """Moves what is left over to longer buckets, so few rows stay empty."""
    batches: list[PlannedBatch] = []
    carried = _NO_DRAWS
    for number, bucket in enumerate(self._buckets):
      # Of the same frames or more; but its tokens may be fewer.
      fits = self._tokens[carried.indices] <= bucket.max_tokens
      inside = carried[fits] + self._waiting[number]
      size = bucket.batch_size
      whole = len(inside) - len(inside) % size
      for start in range(0, whole, size):
        batches.append(self._planned(bucket, inside[start : start + size]))
      carried = carried[~fits] + inside[whole:]
      self._waiting[number] = _NO_DRAWS
    # The longest bucket holds everything, so only it can stay incomplete.
    if len(carried):
      batches.append(self._planned(self._buckets[-1], carried))
    return batches

  def _planned(self, bucket: Bucket, drawn: _Draws) -> PlannedBatch:
    return PlannedBatch(
      bucket,
      tuple(drawn.indices.tolist()),
      tuple(self._factors[i] for i in drawn.speeds),
      tuple(drawn.rounds.tolist()),
    )


def _bucket_numbers(
  frames: Int[np.ndarray, 'n'],
  items: Sequence[Item],
  indices: Int[np.ndarray, 'n'],
  buckets: Sequence[Bucket],
) -> Int[np.ndarray, 'n']:
  """The first bucket that holds each item; ValueError names one without."""
  tokens = _tokens(items)[indices]
  numbers = np.full(len(frames), -1)
  # From the largest on, so that the first one that fits is written last.
  for number in reversed(range(len(buckets))):
    bucket = buckets[number]
    fits = (frames <= bucket.max_frames) & (tokens <= bucket.max_tokens)
    numbers[fits] = number
  if (numbers < 0).any():
    key = items[int(indices[np.argmin(numbers)])].key
    raise ValueError(f'utterance {key!r} fits no bucket')
  return numbers


def _mix(
  items: Sequence[Item], shares: Sequence[float], seed: int, epoch: int
) -> tuple[Int[np.ndarray, 'n'], Int[np.ndarray, 'n']]:
  """An epoch of mixed sources: utterances, and how often each came before.

  Each source is gone through in shuffled rounds of its own, and an epoch goes
  on where the last one ended: no utterance comes n + 1 times before the
  others of its source have come n times.
  """
  parts = np.fromiter((item.part for item in items), int, len(items))
  indices, rounds = [], []
  for part, share in enumerate(shares):
    members = np.flatnonzero(parts == part)
    count = max(1, round(share * len(items)))
    # The source without end, as places 0, 1, 2, ...; an epoch is a stretch of
    # it, which may begin and end in the middle of a round.
    places = np.arange(epoch * count, (epoch + 1) * count)
    for number in np.unique(places // len(members)):
      # A round is shuffled alike in each epoch that has a part of it.
      rng = generator(seed, 'mix', part, int(number))
      shuffled = members[rng.permutation(len(members))]
      inside = places[places // len(members) == number] % len(members)
      indices.append(shuffled[inside])
      rounds.append(np.full(len(inside), number))
  return np.concatenate(indices), np.concatenate(rounds)


def plan_once(
  items: Sequence[Item],
  buckets: Sequence[Bucket],
  config: config_lib.DataConfig,
) -> list[PlannedBatch]:
  """Plans an evaluation: sorted by length, speed 1, every item once."""
  frames = _all_num_frames(_seconds(items), np.ones(()), config.features)
  chosen = _bucket_numbers(frames, items, np.arange(len(items)), buckets)
  # Neighbours are of like length, which leaves little padding.
  order = np.argsort(frames, kind='stable')
  batches = []
  for number, bucket in enumerate(buckets):
    inside = order[chosen[order] == number].tolist()
    for start in range(0, len(inside), bucket.batch_size):
      indices = tuple(inside[start : start + bucket.batch_size])
      ones = (1.0,) * len(indices)
      batches.append(PlannedBatch(bucket, indices, ones, (0,) * len(indices)))
  return batches


def of_host(
  planned: PlannedBatch, *, host_index: int, num_hosts: int
) -> PlannedBatch:
  """The rows of a batch that one host loads.

  Args:
    planned: the global batch.
    host_index: number of the host.
    num_hosts: hosts; each takes as many neighbouring rows as the others.

  Returns:
    A batch of B / num_hosts rows; the hosts' batches, one behind the other,
    are the global one.

  Raises:
    ValueError: if the hosts do not divide B.
  """
  size, rest = divmod(planned.bucket.batch_size, num_hosts)
  if rest:
    raise ValueError(
      f'{num_hosts} hosts cannot share batches of '
      f'{planned.bucket.batch_size} rows; batch sizes must be multiples of it'
    )
  rows = slice(host_index * size, (host_index + 1) * size)
  return PlannedBatch(
    dataclasses.replace(planned.bucket, batch_size=size),
    planned.indices[rows],
    planned.speeds[rows],
    planned.rounds[rows],
  )
