"""Dev error rates of all arms, with and without the dense training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reporting import drawing
from experiments.studies import tables

# Fresh weights dashed, so that (a) and (c) are told from what continues them.
_COLOURS = dict(zip('abcdef', drawing.PALETTE[:6], strict=True))


@drawing.styled
def curves(group: tables.Group) -> bytes | None:
  """Draws a panel over all updates, and one over those of each arm.

  Args:
    group: entries of one study and seed, by letter.

  Returns:
    A PNG; None if there is no curve.
  """
  drawn = [entry for entry in group.values() if entry['dev']]
  if not drawn:
    return None
  figure = drawing.new_figure(7.2)
  above, below = figure.subplots(2, 1)
  for axes, in_all in ((above, True), (below, False)):
    shown = [e for e in drawn if in_all or e['letter'] != 'a']
    for entry in shown:
      _draw(axes, entry, group, in_all=in_all)
    _fit(axes, shown, group)
    drawing.step_axis(axes)
    axes.set_ylabel('per cent')
  above.set_title('Dev WER, greedy')
  below.set_title('Without the dense training')
  below.set_xlabel('updates of the arm itself')
  above.set_xlabel('updates, those of the dense training included')
  drawing.legend_above(above, columns=len(drawn))
  return drawing.to_png(figure)


def _draw(
  axes: Any, entry: tables.Entry, group: tables.Group, *, in_all: bool
) -> None:
  points = _points(entry, group)
  dense = tables.start_of(entry, group)
  offset = dense['updates'] if dense and in_all else 0
  axes.plot(
    [offset + step for step, _ in points],
    [wer for _, wer in points],
    marker='.',
    ls='-' if entry['start'] else '--',
    color=_COLOURS[entry['letter']],
    label=f'({entry["letter"]})',
  )


def _points(
  entry: tables.Entry, group: tables.Group
) -> list[tuple[int, float]]:
  """Step and error rate; what continues begins where its start was."""
  dense = tables.start_of(entry, group)
  start = [(0, tables.rate(dense, 'dev'))] if dense else []
  return start + [(point['step'], point['wer']) for point in entry['dev']]


def _fit(axes: Any, shown: Sequence[tables.Entry], group: tables.Group) -> None:
  values = [
    np.array([wer for _, wer in _points(entry, group)]) for entry in shown
  ]
  if values:
    drawing.value_axis(axes, values)
