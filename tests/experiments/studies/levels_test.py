"""Updates to an error rate, with literals."""

from experiments.studies import levels

_DENSE = {
  'updates': 1000,
  'seconds': 250.0,
  'dev': [{'wer': 50.0}, {'wer': 29.0}, {'wer': 30.0}],
}


def _curve(*rates):
  points = [
    {'step': 100 * i, 'wer': rate, 'seconds': 30.0 * i}
    for i, rate in enumerate(rates, 1)
  ]
  return {'dev': points}


def test_the_start_is_the_best_that_the_dense_model_ever_was():
  assert levels.start_rate(_DENSE, 28.0) == 28.0
  assert levels.start_rate(_DENSE, 31.0) == 29.0


def test_levels_are_below_the_start_and_reached():
  curves = [_curve(40.0, 22.0, 17.0)['dev'], _curve(33.0, 25.0)['dev']]
  assert levels.choose(30.0, curves) == [28.5, 27.0, 24.0, 21.0, 18.0]
  # The start itself is no level, and where nobody is better there is none.
  assert levels.choose(30.0, [_curve(30.0, 29.0)['dev']]) == []
  assert levels.choose(30.0, []) == []
  # One that the dense training has reached on its way must not count.
  assert 27.0 not in levels.choose(26.0, curves)


def test_the_first_point_at_a_level_counts():
  arm = _curve(28.0, 21.0, 24.0, 17.0)
  cost = levels.cost(arm, 21.0, _DENSE)
  assert cost == levels.Cost(
    updates=200, seconds=60.0, updates_in_all=1200, seconds_in_all=310.0
  )
  assert levels.cost(arm, 20.9, _DENSE).updates == 400
  assert levels.cost(arm, 16.9, _DENSE) is None
  # From random weights both bills are the same.
  fresh = levels.cost(arm, 21.0, None)
  assert (fresh.updates_in_all, fresh.seconds_in_all) == (200, 60.0)


def test_less_is_relative():
  assert levels.less(5.0, 20.0) == 75.0
  assert levels.less(25.0, 20.0) == -25.0
