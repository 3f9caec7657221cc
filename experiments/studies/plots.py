"""Dev error rates of all arms, with and without the dense training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reporting import drawing
from experiments.studies import tables

# A colour for each letter, in every study, whatever arms it has.
_COLOURS = dict(zip('abcdef', drawing.PALETTE[:6], strict=True))
# The lower panel ends so far above the start, to show what is below it.
_HEADROOM = 1.5


@drawing.styled
def curves(group: tables.Group) -> bytes | None:
  """Draws a panel over all updates, and one over those of each arm.

  The second one has no (a), and the range in which those differ that continue
  it. Each panel is there if it has something to show. What starts from fresh
  weights is dashed.

  Args:
    group: entries of one study and seed, by letter.

  Returns:
    A PNG; None if there is no curve.
  """
  drawn = [entry for entry in group.values() if entry['dev']]
  later = [entry for entry in drawn if entry['letter'] != 'a']
  # Without a curve of (a) both panels would be the same.
  shown = [(drawn, True)] if len(later) < len(drawn) else []
  if later:
    shown.append((later, False))
  if not shown:
    return None
  figure = drawing.new_figure(0.8 + 3.4 * len(shown))
  panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
  for axes, (entries, in_all) in zip(panels, shown, strict=True):
    _draw_panel(axes, entries, group, in_all=in_all)
  if later:
    _zoom(panels[-1], later, group)
  panels[0].set_title('Dev WER of the CTC best path')
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper left', ncols=3)
  return drawing.to_png(figure)


def _draw_panel(
  axes: Any,
  entries: Sequence[tables.Entry],
  group: tables.Group,
  *,
  in_all: bool,
) -> None:
  for entry in entries:
    _draw(axes, entry, group, in_all=in_all)
  if 'a' in group and len(group) > 1:
    axes.axhline(
      tables.start_rate(group),
      color=drawing.GREY,
      ls=':',
      lw=1.2,
      label='best of (a)',
    )
  values = [
    np.array([wer for _, wer in _points(entry, group)]) for entry in entries
  ]
  # Not logarithmic: differences are read off in per cent of words.
  drawing.value_axis(axes, values, wide=False)
  drawing.step_axis(axes)
  axes.set_xlabel(
    'updates, those of (a) included' if in_all else 'updates of the arm itself'
  )
  axes.set_ylabel('per cent')


def _draw(
  axes: Any, entry: tables.Entry, group: tables.Group, *, in_all: bool
) -> None:
  points = _points(entry, group)
  dense = tables.start_of(entry, group)
  # What continues (a) begins where (a) has ended.
  offset = dense['updates'] if dense and in_all else 0
  axes.plot(
    [offset + step for step, _ in points],
    [wer for _, wer in points],
    marker='.',
    ls='-' if entry['start'] else '--',
    color=_COLOURS[entry['letter']],
    label=tables.name(entry),
  )


def _points(
  entry: tables.Entry, group: tables.Group
) -> list[tuple[int, float]]:
  """Step and error rate; what continues begins where its start was."""
  dense = tables.start_of(entry, group)
  start = [(0, tables.rate(dense, 'dev'))] if dense else []
  return start + [(point['step'], point['wer']) for point in entry['dev']]


def _zoom(
  axes: Any, entries: Sequence[tables.Entry], group: tables.Group
) -> None:
  """Cuts off what lies far above the start: (c) on its long way down."""
  if 'a' not in group:
    return
  rates = [wer for entry in entries for _, wer in _points(entry, group)]
  start = tables.start_rate(group)
  axes.set_ylim(0.9 * min(start, *rates), _HEADROOM * start)
