"""Which check is responsible for which quantity; what has none has failed."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import re
from typing import Any

from experiments.verification import compare
from experiments.verification import port


@dataclasses.dataclass(frozen=True)
class Quantity:
  """Something a case holds.

  Attributes:
    path: file and keys, as in `results/loss/full_context/loss`.
    value: what the reference has.
    names: the named groups of the pattern, None where one is absent.
  """

  path: str
  value: Any
  names: Mapping[str, str | None]

  def integer(self, name: str, default: int) -> int:
    """A number that stands in the name."""
    text = self.names.get(name)
    return default if text is None else int(text)

  def number(self, name: str, default: float) -> float:
    """A number that stands in the name."""
    text = self.names.get(name)
    return default if text is None else float(text)

  def text(self, name: str) -> str:
    """A part of the name."""
    return self.names.get(name) or ''


Check = Callable[[port.Port, Quantity], Iterable[compare.Row]]


@dataclasses.dataclass(frozen=True)
class Rule:
  """Paths that match the whole pattern belong to the check.

  Attributes:
    pattern: regular expression; numbers in names are named groups.
    check: compares; None for what is no quantity.
    reason: why it is none.
  """

  pattern: str
  check: Check | None
  reason: str = ''


def verify(subject: port.Port, rules: Sequence[Rule]) -> Iterator[compare.Row]:
  """Checks everything a case holds.

  A quantity without a rule, and one whose check cannot be carried out, are
  failures.
  """
  # An empty one would pass for a quantity that no rule knows.
  files = {name: tree for name, tree in subject.case.tree.items() if tree}
  for path, value, rule, match in _claims(files, rules, ''):
    if rule is None or match is None:
      yield compare.failed(path, 'no check knows this quantity')
    elif rule.check is not None:
      quantity = Quantity(path, value, match.groupdict())
      yield from _checked(subject, quantity, rule.check)


def _claims(
  tree: Mapping[str, Any], rules: Sequence[Rule], prefix: str
) -> Iterator[tuple[str, Any, Rule | None, re.Match | None]]:
  """The quantities of a tree, each with the first rule that claims it."""
  for key, value in tree.items():
    # Before going down: a rule may claim a whole branch, such as a histogram.
    path = f'{prefix}{key}'
    for rule in rules:
      match = re.fullmatch(rule.pattern, path)
      if match is not None:
        yield path, value, rule, match
        break
    else:
      # for-else: no rule has claimed it. A branch is looked into, a leaf is
      # reported.
      if isinstance(value, Mapping) and value:
        yield from _claims(value, rules, f'{path}/')
      else:
        yield path, value, None, None


def _checked(
  subject: port.Port, quantity: Quantity, check: Check
) -> list[compare.Row]:
  try:
    rows = list(check(subject, quantity))
  except Exception as error:  # whatever it is, the quantity is not verified
    line = ' '.join(str(error).split())[:200]
    return [compare.failed(quantity.path, f'{type(error).__name__}: {line}')]
  return rows or [compare.failed(quantity.path, 'nothing to compare')]
