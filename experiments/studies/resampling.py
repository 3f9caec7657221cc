"""How sure a change of an error rate is, by resampling utterances."""

from collections.abc import Sequence

import numpy as np

_NUM_SAMPLES = 2000


def change_interval(
  ours: Sequence[int], theirs: Sequence[int], *, seed: int = 0
) -> tuple[float, float]:
  """95 % interval of the relative change of an error rate, per cent.

  The paired bootstrap: both models are scored on the same draws, so that what
  is hard for both cancels. The words of a draw cancel too.

  Args:
    ours: errors of each utterance.
    theirs: of the other model, in the same order; not all 0.
    seed: of the draws.
  """
  errors = np.stack([ours, theirs], axis=1).astype(np.float64)  # [N, 2]
  rng = np.random.default_rng(seed)
  draws = rng.integers(0, len(errors), (_NUM_SAMPLES, len(errors)))
  # [draws, N, 2] summed over utterances, then one row of draws for each model.
  mine, other = errors[draws].sum(axis=1).T
  kept = other > 0  # few errors: some draws have none of them
  changes = 100 * (mine[kept] / other[kept] - 1)
  # What lies between them holds 95 of 100 draws.
  low, high = np.percentile(changes, [2.5, 97.5])
  return float(low), float(high)
