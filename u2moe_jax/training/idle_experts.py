"""Watches for experts that no frame visits."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

_PREFIX = 'load/'
_NAMED = 5  # of one layer or many, so that a line stays a line


class IdleExperts:
  """Tells of experts that have been idle for too long; once, until they wake.

  A router that has collapsed seldom recovers by itself.
  """

  def __init__(
    self,
    num_steps: int,
    *,
    start: int = 0,
    blocks: Mapping[str, Sequence[int]] | None = None,
  ):
    """Starts to watch; every expert counts as just used.

    Args:
      num_steps: idle steps that are too many; 0: never tell.
      start: steps done before.
      blocks: blocks of each MoE layer (`ModelConfig.expert_blocks`); None:
        the first ones.
    """
    self._num_steps = num_steps
    self._start = start
    self._blocks = blocks or {}
    self._last_used: dict[str, np.ndarray] = {}
    self._told: dict[str, np.ndarray] = {}

  def update(self, step: int, values: Mapping[str, Any]) -> str | None:
    """Takes the loads of the steps since the last call.

    Args:
      step: steps done.
      values: metrics, with a mean `load/LAYER` of shape (L, E) for each MoE
        layer; one that is not a number is no evidence of idleness.

    Returns:
      A line that names the experts that are idle for too long since this
      call; None if there are none.
    """
    found = []
    for name, load in values.items():
      if not name.startswith(_PREFIX):
        continue
      layer = name.removeprefix(_PREFIX)
      for block, expert in np.argwhere(self._newly_idle(step, layer, load)):
        blocks = self._blocks.get(layer)
        number = blocks[block] if blocks else block
        found.append(f'{layer} block {number} expert {expert}')
    if not found:
      return None
    more = len(found) - _NAMED
    return (
      f'idle for {self._num_steps} steps or more: '
      + ', '.join(found[:_NAMED])
      + (f' and {more} more' if more > 0 else '')
      + '; raise train.balance_loss_weight'
    )

  def _newly_idle(self, step: int, layer: str, load: Any) -> np.ndarray:
    load = np.asarray(load)
    # Both arrays are changed where they lie. NaN is not 0 either, so numbers
    # that are none count as use.
    last = self._last_used.setdefault(layer, np.full(load.shape, self._start))
    told = self._told.setdefault(layer, np.zeros(load.shape, bool))
    used = load != 0
    last[used], told[used] = step, False
    idle = (step - last >= self._num_steps) & (self._num_steps > 0) & ~told
    told |= idle
    return idle
