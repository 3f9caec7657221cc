"""Utterances that are not trained on: counted, named, and when to stop."""

import collections
from collections.abc import Iterable
import dataclasses
import os
import pathlib
from typing import Protocol

from u2moe_jax.checkpoint import processes
from u2moe_jax.training import json_lines


class Skip(Protocol):
  """What the data side says of an utterance it leaves out."""

  @property
  def key(self) -> str:
    """Its name."""

  @property
  def reason(self) -> str:
    """A short code to count by."""

  @property
  def detail(self) -> str:
    """One line: what, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class Note:
  """A `Skip` that another process told of."""

  key: str
  reason: str
  detail: str


def shared(skips: Iterable[Skip]) -> list[Note]:
  """Those of all processes; each must call it, and gets the same."""
  own = [(skip.key, skip.reason, skip.detail) for skip in skips]
  return [Note(*each) for part in processes.gather(own) for each in part]


class BadDataError(ValueError):
  """Too much data cannot be used; the message gives the reasons."""


class SkipLog:
  """skipped.jsonl: a line for each utterance that is left out, once.

  What is bad is found again in every epoch, and after every restart; it is
  still one utterance. With several hosts each must be told the same (see
  `shared`), and the first one writes.

  Attributes:
    counts: utterances by reason, all splits.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    num_utterances: int,
    max_share: float = 1.0,
    strict: bool = False,
  ):
    """Reads what was left out before.

    Args:
      workdir: the work directory.
      num_utterances: of all splits, those left out included.
      max_share: of them that may be left out.
      strict: stop at the first one.
    """
    self._path = pathlib.Path(workdir) / 'skipped.jsonl'
    self._num_utterances = num_utterances
    self._max_share = max_share
    self._strict = strict
    self._known: set[tuple[str, str]] = set()
    self.counts: collections.Counter[str] = collections.Counter()
    # Only the first process writes to the file, so only it mends it.
    if processes.is_first():
      json_lines.forget_torn_line(self._path)
    for record in json_lines.read(self._path):
      self._count(
        record.get('split', ''), record.get('key', ''), record.get('reason', '')
      )

  def _count(self, split: str, key: str, reason: str) -> bool:
    """Counts an utterance; False if it was known."""
    if (split, key) in self._known:
      return False
    self._known.add((split, key))
    self.counts[reason] += 1
    return True

  @property
  def total(self) -> int:
    """Utterances left out."""
    return len(self._known)

  def add(self, skips: Iterable[Skip], *, split: str = 'train') -> None:
    """Notes utterances.

    Raises:
      BadDataError: for any if strict, or if they are too many.
    """
    new = [s for s in skips if self._count(split, s.key, s.reason)]
    if not new:
      return
    if processes.is_first():
      json_lines.append(
        self._path,
        [
          {'key': s.key, 'reason': s.reason, 'detail': s.detail, 'split': split}
          for s in new
        ],
      )
    self.check(new[0])

  def check(self, example: Skip | None = None) -> None:
    """Raises BadDataError if what is known by now is too much."""
    if not self.total:
      return
    first = f'; {example.key}: {_say(example)}' if example else ''
    if self._strict:
      raise BadDataError(
        f'{self.total} of {self._num_utterances} utterances cannot be used '
        f'({self.reasons()}){first}; {self._path} names all found so far; '
        'correct them, or train without --strict'
      )
    if self.total > self._max_share * self._num_utterances:
      raise BadDataError(
        f'{self.total} of {self._num_utterances} utterances cannot be used '
        f'({self.reasons()}), more than data.max_skipped={self._max_share:g}'
        f'{first}; {self._path} names all found so far'
      )

  def reasons(self) -> str:
    """The counts, the largest first."""
    return ', '.join(f'{n} {reason}' for reason, n in self.counts.most_common())


def _say(skip: Skip) -> str:
  return skip.detail or skip.reason
