"""The share of a job that is one of several, as `--shard=I/N` names it."""

import dataclasses
import re


class ShardError(ValueError):
  """A share that does not exist; says what to give."""


@dataclasses.dataclass(frozen=True)
class Shard:
  """Share `index` of `count`, counted from 0."""

  index: int = 0
  count: int = 1

  def __post_init__(self):
    if not 0 <= self.index < self.count:
      raise ShardError(
        f'--shard={self}: the number of a job counts from 0 to {self.count - 1}'
      )

  def __str__(self) -> str:
    return f'{self.index}/{self.count}'

  @property
  def stem(self) -> str:
    """I-of-N, for the names of files."""
    return f'{self.index}-of-{self.count}'


def parse(text: str | None) -> Shard:
  """Reads I/N; None is all of the work.

  Raises:
    ShardError: if it is not of that form, or I is not below N.
  """
  if text is None:
    return Shard()
  match = re.fullmatch('([0-9]+)/([1-9][0-9]*)', text)
  if match is None:
    raise ShardError(f'--shard={text} is not of the form I/N, such as 0/100')
  return Shard(int(match[1]), int(match[2]))
