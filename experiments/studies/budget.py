"""What a study has taken, and what it will."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

from experiments.studies import design

# Minutes on 2 cores that a form aims at.
AIMS: Mapping[str, float] = {'quick': 90.0}
# What has experts costs so many times what is dense, until it was measured.
_EXPERTS_COST = 1.3


def minutes(entries: Sequence[Mapping[str, Any]]) -> float:
  """Wall time of arms, over all sittings."""
  return sum(entry['wall_seconds'] for entry in entries) / 60


def minutes_to_come(
  entries: Sequence[Mapping[str, Any]], arms: Sequence[design.Arm]
) -> float:
  """Minutes that the arms which are not done will take.

  An update is taken to cost what it did so far, and each arm what the others
  needed besides updates: compiling, evaluating, decoding. Decoding alone is
  taken to cost nothing.

  Args:
    entries: of the arms that are done, the first ones.
    arms: all.
  """
  known = {}
  # Apart, since an update with experts costs more.
  for has_experts in (False, True):
    same = [
      entry
      for entry in entries
      if entry['updates']
      # Of experts only those that a frame visits are active.
      and (entry['active_parameters'] < entry['parameters']) == has_experts
    ]
    if same:
      known[has_experts] = _Cost.mean(same)
  if not known:
    return 0.0
  # Of one kind nothing may be known yet; then it is guessed from the other.
  dense = known.get(False) or known[True].times(1 / _EXPERTS_COST)
  costs = {False: dense, True: known.get(True) or dense.times(_EXPERTS_COST)}
  # Arms are done in order, so the rest is to come.
  to_come = [arm for arm in arms[len(entries) :] if arm.config is not None]
  return sum(costs[arm.has_experts].seconds(arm) for arm in to_come) / 60


@dataclasses.dataclass(frozen=True)
class _Cost:
  """Seconds of an update, and of all else that an arm needs."""

  update: float
  besides: float

  @classmethod
  def mean(cls, entries: Sequence[Mapping[str, Any]]) -> '_Cost':
    seconds = sum(entry['seconds'] for entry in entries)
    wall = sum(entry['wall_seconds'] for entry in entries)
    updates = sum(entry['updates'] for entry in entries)
    return cls(seconds / updates, (wall - seconds) / len(entries))

  def times(self, factor: float) -> '_Cost':
    return _Cost(factor * self.update, factor * self.besides)

  def seconds(self, arm: design.Arm) -> float:
    assert arm.config is not None
    return self.update * arm.config.train.num_steps + self.besides


def verdict(form: str, spent: float, to_come: float) -> str:
  """One line: minutes spent, to come, and the aim if there is one."""
  line = f'{spent:.0f} minutes spent'
  if to_come:
    line += f', about {to_come:.0f} to come'
  aim = AIMS.get(form)
  if aim is None:
    return line
  if spent + to_come <= aim:
    return f'{line} ({form} form: under {aim:.0f} on 2 cores)'
  return (
    f'{line}: OVER the {aim:.0f} of the {form} form; this machine is slower, '
    'or busy'
  )
