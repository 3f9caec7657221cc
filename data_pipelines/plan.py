"""The batch plan: a pure function of (manifest, seed, epoch).

Step n names its utterances, their bucket and their speed factors before any
audio is opened. What turns out bad while loading leaves an empty row; it
never moves another utterance.
"""

from collections.abc import Sequence
import dataclasses
import hashlib

import numpy as np

from u2moe_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Item:
  """What the plan needs to know of an utterance.

  Attributes:
    key: its name.
    seconds: duration before any change of speed.
    num_tokens: labels.
    min_frames: encoder frames its CTC labels need, repeats included.
  """

  key: str
  seconds: float
  num_tokens: int
  min_frames: int = 0


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


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
  """One step.

  Attributes:
    bucket: the padded shape.
    indices: utterances, as positions in the source; fewer than `batch_size`
      leave empty rows.
    speeds: speed factor of each.
  """

  bucket: Bucket
  indices: tuple[int, ...]
  speeds: tuple[float, ...]


def generator(*parts: int | str) -> np.random.Generator:
  """A generator that depends on nothing but `parts`."""
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
    `too_short`, `too_long`, `too_many_tokens` or `labels_do_not_fit`.
  """
  fastest = num_frames(item.seconds, max(_speeds(config)), config.features)
  if item.seconds < config.min_seconds or fastest < min_input:
    return 'too_short'
  if item.seconds > config.max_seconds:
    return 'too_long'
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

  Boundaries are those that pad the least; a bucket more is a shape more to
  compile.

  Args:
    items: all utterances that may appear.
    config: budget and number of buckets.
    speeds: speed factors that may be drawn.
    multiple: batch sizes are multiples of it (devices along the batch).

  Returns:
    Buckets by rising `max_frames`; the last holds the longest utterance at
    its slowest.
  """
  lengths = np.array(
    [
      num_frames(item.seconds, s, config.features)
      for item in items
      for s in speeds
    ]
  )
  tokens = np.array([item.num_tokens for item in items for _ in speeds])
  bounds = _least_padding(lengths, config.num_buckets)
  buckets, low = [], -1
  for bound in bounds:
    inside = (lengths > low) & (lengths <= bound)
    rows = min(config.max_batch_size, max(1, config.batch_frames // bound))
    buckets.append(
      Bucket(
        max_frames=bound,
        max_tokens=_round_up(int(tokens[inside].max()), 4),
        batch_size=max(1, rows // multiple) * multiple,
      )
    )
    low = bound
  return _monotonic_tokens(buckets)


# Candidates for boundaries: enough to pad little, few enough to try all.
_MAX_CANDIDATES = 200


def _least_padding(lengths: np.ndarray, num_buckets: int) -> list[int]:
  """Boundaries that minimise the padded frames, by dynamic programming."""
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
    step = (below[None, 1:] - below[:, None]) * candidates[None]
    reach = np.where(step >= 0, cost[:, None] + step, np.inf)
    choices.append(np.argmin(reach, axis=0))
    cost = np.concatenate([[0], np.min(reach, axis=0)])
  bounds, j = [], len(candidates)
  for choice in reversed(choices):
    if j:
      bounds.append(int(candidates[j - 1]))
      j = int(choice[j - 1])
  return sorted(set(bounds))


def _round_up(value: int, step: int) -> int:
  return -(-value // step) * step


def _monotonic_tokens(buckets: list[Bucket]) -> list[Bucket]:
  """Lets a longer bucket take whatever a shorter one can."""
  result: list[Bucket] = []
  for bucket in buckets:
    before = result[-1].max_tokens if result else 0
    tokens = max(bucket.max_tokens, before)
    result.append(dataclasses.replace(bucket, max_tokens=tokens))
  return result


def extend_buckets(
  buckets: Sequence[Bucket],
  items: Sequence[Item],
  config: config_lib.DataConfig,
) -> list[Bucket]:
  """Adds one bucket for utterances longer than any, where there are some."""
  last = buckets[-1]
  frames = max(num_frames(item.seconds, 1.0, config.features) for item in items)
  tokens = max(item.num_tokens for item in items)
  if frames <= last.max_frames and tokens <= last.max_tokens:
    return list(buckets)
  extra = dataclasses.replace(
    last,
    max_frames=max(frames, last.max_frames),
    max_tokens=max(_round_up(tokens, 4), last.max_tokens),
  )
  return [*buckets, extra]


def plan_epoch(
  items: Sequence[Item],
  buckets: Sequence[Bucket],
  config: config_lib.DataConfig,
  *,
  seed: int,
  epoch: int,
) -> list[PlannedBatch]:
  """Plans one epoch of training.

  Args:
    items: the utterances, rejected ones left out (their `indices` here are
      positions in this sequence).
    buckets: see `make_buckets`.
    config: speeds.
    seed: of the experiment.
    epoch: number of the epoch.

  Returns:
    Batches in training order; every item appears exactly once.
  """
  rng = generator(seed, 'plan', epoch)
  speeds = _speeds(config)
  drawn = [speeds[i] for i in rng.integers(len(speeds), size=len(items))]
  waiting: list[list[int]] = [[] for _ in buckets]
  batches = []
  order = rng.permutation(len(items))
  short_first = epoch < config.short_first_epochs
  if short_first:
    order = order[np.argsort([items[i].seconds for i in order], kind='stable')]
  for index in order:
    b = _find_bucket(items[index], drawn[index], buckets, config)
    waiting[b].append(int(index))
    if len(waiting[b]) == buckets[b].batch_size:
      batches.append(_planned(buckets[b], waiting[b], drawn))
      waiting[b] = []
  batches += _flush(waiting, buckets, drawn)
  if short_first:
    return batches
  return [batches[i] for i in rng.permutation(len(batches))]


def _find_bucket(item, speed, buckets, config) -> int:
  frames = num_frames(item.seconds, speed, config.features)
  for i, bucket in enumerate(buckets):
    if frames <= bucket.max_frames and item.num_tokens <= bucket.max_tokens:
      return i
  raise ValueError(f'utterance {item.key!r} fits no bucket')


def _planned(bucket, indices, drawn) -> PlannedBatch:
  return PlannedBatch(bucket, tuple(indices), tuple(drawn[i] for i in indices))


def _flush(waiting, buckets, drawn) -> list[PlannedBatch]:
  """Moves what is left over to longer buckets, so few rows stay empty."""
  batches: list[PlannedBatch] = []
  carried: list[int] = []
  for bucket, indices in zip(buckets, waiting, strict=True):
    carried = carried + indices
    while len(carried) >= bucket.batch_size:
      batches.append(_planned(bucket, carried[: bucket.batch_size], drawn))
      carried = carried[bucket.batch_size :]
  if carried:
    batches.append(_planned(buckets[-1], carried, drawn))
  return batches


def plan_once(
  items: Sequence[Item],
  buckets: Sequence[Bucket],
  config: config_lib.DataConfig,
) -> list[PlannedBatch]:
  """Plans an evaluation: sorted by length, speed 1, every item once."""
  lengths = [num_frames(item.seconds, 1.0, config.features) for item in items]
  order = sorted(range(len(items)), key=lambda i: (lengths[i], i))
  waiting: list[list[int]] = [[] for _ in buckets]
  ones = [1.0] * len(items)
  for index in order:
    b = _find_bucket(items[index], 1.0, buckets, config)
    waiting[b].append(index)
  batches = []
  for bucket, indices in zip(buckets, waiting, strict=True):
    for start in range(0, len(indices), bucket.batch_size):
      chosen = indices[start : start + bucket.batch_size]
      batches.append(_planned(bucket, chosen, ones))
  return batches
