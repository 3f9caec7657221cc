"""Intervals of a change, from made-up errors."""

import numpy as np
import pytest

from experiments.studies import resampling


def test_a_change_that_every_utterance_shows_is_sure():
  errors = np.arange(1, 50)
  low, high = resampling.change_interval(errors, 2 * errors)
  assert low == pytest.approx(-50)
  assert high == pytest.approx(-50)


def test_an_interval_holds_the_change_and_shrinks_with_the_root():
  rng = np.random.default_rng(0)
  theirs = rng.poisson(2.0, 6400)
  ours = rng.binomial(theirs, 0.9) + rng.poisson(0.1, 6400)
  widths = []
  for count in (400, 6400):
    found = resampling.change_interval(ours[:count], theirs[:count])
    change = 100 * (ours[:count].sum() / theirs[:count].sum() - 1)
    assert found[0] < change < found[1]
    widths.append(found[1] - found[0])
  assert 3 < widths[0] / widths[1] < 5.3


def test_pairs_count():
  """The same errors in another order leave chance in; in the same, none."""
  rng = np.random.default_rng(1)
  errors = rng.poisson(2.0, 300)
  assert resampling.change_interval(errors, errors) == (0.0, 0.0)
  low, high = resampling.change_interval(errors, rng.permutation(errors))
  assert low < -3
  assert high > 3


def test_draws_without_an_error_are_left_out():
  low, high = resampling.change_interval([0, 1, 0], [1, 0, 0])
  assert np.isfinite([low, high]).all()
