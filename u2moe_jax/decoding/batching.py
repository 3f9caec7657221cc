"""Utterances of like length, padded to one of few shapes."""

import collections
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import itertools

import numpy as np

# Padded lengths begin here and grow by this factor: few shapes compile, little
# is padded.
_SHORTEST_FRAMES = 100
_LENGTH_GROWTH = 1.4
_MAX_ROWS = 64


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
  """Utterances padded to one shape; rows behind them are empty.

  Attributes:
    indices: positions of the utterances in the caller's list.
    features: (rows, padded frames, F).
    lengths: real frames of each row.
  """

  indices: tuple[int, ...]
  features: np.ndarray
  lengths: np.ndarray


def plan(
  lengths: Sequence[int], *, max_frames: int, smallest: int, parts: int
) -> Iterator[tuple[list[int], int, int]]:
  """Groups utterances into batches of few shapes, shortest first.

  Args:
    lengths: frames of each utterance.
    max_frames: most padded frames in a batch, unless a row has more.
    smallest: shortest padded length.
    parts: the rows are a multiple of this.

  Yields:
    (indices, padded frames, padded rows).
  """
  padded = _merged(
    [_padded_frames(max(length, smallest)) for length in lengths], max_frames
  )
  order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
  start = 0
  while start < len(order):
    frames = padded[order[start]]
    # A batch has a budget in frames, so memory does not hang on the lengths; at
    # least one row for each device.
    rows = max(1, min(_MAX_ROWS * parts, max_frames // frames) // parts) * parts
    # In order of length those of one shape stand together.
    indices = [i for i in order[start : start + rows] if padded[i] == frames]
    # A lone utterance keeps a shape of its own, so transcribe() is not
    # charged for empty rows.
    yield indices, frames, parts if len(order) == 1 else rows
    start += len(indices)


def _padded_frames(length: int) -> int:
  frames = _SHORTEST_FRAMES
  while frames < length:
    frames = int(frames * _LENGTH_GROWTH)
  return frames


def _merged(padded: Sequence[int], max_frames: int) -> list[int]:
  """Lengths in fewer shapes: the next longer one for those that fill none.

  A batch that is not full has empty rows, so what fits into one batch of the
  next longer shape is not worth compiling a shape for.
  """
  counts = collections.Counter(padded)
  sizes = sorted(counts)
  chosen = {size: size for size in sizes}
  for size, longer in itertools.pairwise(sizes):
    if counts[size] * longer <= max_frames:
      counts[longer] += counts[size]
      # What had been moved to this size before moves on with it.
      chosen |= {each: longer for each in sizes if chosen[each] == size}
  return [chosen[size] for size in padded]


def pad(
  indices: Sequence[int],
  features: Sequence[np.ndarray],
  padded_frames: int,
  rows: int,
  num_bins: int,
) -> PaddedBatch:
  """Pads utterances to one shape."""
  batch = np.zeros((rows, padded_frames, num_bins), np.float32)
  lengths = np.zeros((rows,), np.int32)
  for row, frames in enumerate(features):
    batch[row, : len(frames)] = frames
    lengths[row] = len(frames)
  return PaddedBatch(tuple(indices), batch, lengths)
