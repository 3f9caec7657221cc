"""Minutes spent and to come, with literals."""

from experiments.studies import budget
from experiments.studies import design
from experiments.wiring import upcycling
from u2moe_jax import config as config_lib


def _arms(tmp_path):
  recipe = design.Recipe(
    config=config_lib.Config(), growth=upcycling.Request(num_experts=4)
  )
  corpora = {'builtin': design.prepared(tmp_path)}
  lengths = design.Lengths(dense=600, more=200)
  return list(design.arms('builtin', 0, recipe, lengths, corpora))


def _entry(updates, seconds, besides, active=500):
  return {
    'updates': updates,
    'seconds': seconds,
    'wall_seconds': seconds + besides,
    'parameters': 500 if active == 500 else 1000,
    'active_parameters': active,
  }


def test_what_is_to_come_costs_what_it_did(tmp_path):
  arms = _arms(tmp_path)
  # A minute for a hundred updates, two for the rest; so 2 + 2 for (b), and 1.3
  # times that for 1,400 updates and four arms with experts.
  entries = [_entry(600, 360, 120)]
  assert budget.minutes(entries) == 8
  found = budget.minutes_to_come(entries, arms)
  assert round(found, 6) == 2 + 2 + 1.3 * (14 + 4 * 2)
  # Once (c) has been measured, its cost counts.
  entries += [_entry(200, 120, 120), _entry(800, 960, 180, active=700)]
  assert round(budget.minutes_to_come(entries, arms), 6) == 3 * (4 + 3)
  done = entries + [_entry(200, 240, 60, active=700)] * 3
  assert budget.minutes_to_come(done, arms) == 0


def test_a_model_that_was_only_decoded_tells_nothing(tmp_path):
  assert budget.minutes_to_come([_entry(0, 0, 90)], _arms(tmp_path)) == 0


def test_too_long_is_said():
  assert budget.verdict('quick', 30.2, 41.0) == (
    '30 minutes spent, about 41 to come (quick form: under 90 on 2 cores)'
  )
  assert 'OVER the 90 of the quick form' in budget.verdict('quick', 50, 41)
  assert 'OVER' in budget.verdict('quick', 91, 0)
  # The full form has no aim.
  assert budget.verdict('full', 500, 0) == '500 minutes spent'
