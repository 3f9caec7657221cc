"""What a study has taken, and what it will."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from experiments.studies import design

# Minutes on 2 cores that a form aims at.
AIMS: Mapping[str, float] = {'quick': 90.0}
# An update with experts, in updates of a dense model, until one was measured.
_EXPERTS_COST = 1.3


def minutes(entries: Sequence[Mapping[str, Any]]) -> float:
  """Wall time of arms, over all sittings."""
  return sum(entry['wall_seconds'] for entry in entries) / 60


def minutes_to_come(
  entries: Sequence[Mapping[str, Any]], arms: Sequence[design.Arm]
) -> float:
  """Minutes that the arms which are not done will take.

  Each update is taken to cost what it did so far, with its share of compiling,
  evaluating and decoding; decoding alone is taken to cost nothing.

  Args:
    entries: of the arms that are done, the first ones.
    arms: all.
  """
  costs: dict[bool, float] = {}
  for has_experts in (False, True):
    same = [
      entry
      for entry in entries
      if (entry['active_parameters'] < entry['parameters']) == has_experts
    ]
    updates = sum(entry['updates'] for entry in same)
    if updates:
      costs[has_experts] = minutes(same) / updates
  if not costs:
    return 0.0
  costs.setdefault(True, _EXPERTS_COST * costs.get(False, 0.0))
  costs.setdefault(False, costs[True] / _EXPERTS_COST)
  return sum(
    costs[arm.has_experts] * arm.config.train.num_steps
    for arm in arms[len(entries) :]
    if arm.config is not None
  )


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
