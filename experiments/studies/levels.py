"""Updates to an error rate: the arithmetic behind the study's claims."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

# Levels, as shares of the start's error rate.
_SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclasses.dataclass(frozen=True)
class Cost:
  """What it took to get to a level.

  Attributes:
    updates: of the arm itself.
    seconds: of the arm itself.
    updates_in_all: with those of the model that it started from.
    seconds_in_all: likewise.
  """

  updates: int
  seconds: float
  updates_in_all: int
  seconds_in_all: float


def start_rate(dense: Mapping[str, Any], decoded: float) -> float:
  """The lowest dev error rate of the dense training, and of its average.

  Args:
    dense: entry of arm (a).
    decoded: error rate of the averaged model, by the same search.
  """
  return min([decoded, *(point['wer'] for point in dense['dev'])])


def choose(
  start: float, curves: Sequence[Sequence[Mapping[str, Any]]]
) -> list[float]:
  """Levels that the start has not reached, and some arm has.

  Args:
    start: error rate of the dense start, per cent.
    curves: points with `wer` of each arm.

  Returns:
    Per cent, highest first.
  """
  lowest = min((p['wer'] for curve in curves for p in curve), default=start)
  levels = [round(share * start, 1) for share in _SHARES]
  # What nobody has reached compares nobody.
  return [level for level in levels if lowest <= level < start]


def cost(
  entry: Mapping[str, Any], level: float, dense: Mapping[str, Any] | None
) -> Cost | None:
  """What an arm took until its dev error rate was first at a level or below.

  Args:
    entry: of the arm.
    level: per cent.
    dense: entry of the arm that it started from; None if from random weights.

  Returns:
    None if it never got there.
  """
  for point in entry['dev']:
    if point['wer'] <= level:
      # A start that was trained is not free: in the bill of all it counts.
      before = (dense['updates'], dense['seconds']) if dense else (0, 0.0)
      return Cost(
        updates=point['step'],
        seconds=point['seconds'],
        updates_in_all=point['step'] + before[0],
        seconds_in_all=point['seconds'] + before[1],
      )
  return None


def less(ours: float, theirs: float) -> float:
  """Per cent by which ours is less; negative where it is more."""
  return 100 * (1 - ours / theirs)
