"""Training curves: losses and dev WER, learning rate, gradients, speed."""

import dataclasses
from typing import Any

import numpy as np

from experiments.reporting import drawing
from experiments.reporting import metrics_log

_LOSSES = {
  'loss': 'weighted sum',
  'loss_ctc': 'CTC',
  'loss_l2r': 'left-to-right',
  'loss_r2l': 'right-to-left',
}


@dataclasses.dataclass(frozen=True)
class _Panel:
  """How to draw one quantity."""

  title: str
  unit: str
  factor: float = 1
  wide: bool = False  # may take a logarithmic scale
  noisy: bool = True  # draw a moving average as well


@drawing.styled
def plot_losses(log: metrics_log.MetricsLog) -> bytes | None:
  """Draws the parts of the loss, and below them the dev WER.

  Args:
    log: what a run logged.

  Returns:
    A PNG; None if there is no finite loss.
  """
  parts = [
    (label, log.series('train', name).finite(), log.series('dev', name))
    for name, label in _LOSSES.items()
  ]
  parts = [part for part in parts if len(part[1])]
  if not parts:
    return None
  wer = log.series('dev', 'wer').finite()
  if len(wer):
    figure = drawing.new_figure(6.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
    _draw_losses(above, parts)
    _draw_wer(below, wer)
    drawing.step_axis(below)
  else:
    figure = drawing.new_figure(4)
    axes = figure.subplots()
    _draw_losses(axes, parts)
    drawing.step_axis(axes)
  return drawing.to_png(figure)


def _draw_losses(axes: Any, parts: list[tuple]) -> None:
  values = []
  has_dev = False
  for number, (label, train, dev) in enumerate(parts):
    dev, color = dev.finite(), drawing.PALETTE[number]
    # The decoders' losses nearly coincide: the last must not hide the others.
    last = number == len(parts) - 1
    style = (0, (2, 2)) if last else '-'
    _draw_smoothed(axes, train, color=color, label=label, ls=style)
    size = 3.5 if last else 6
    axes.plot(dev.steps, dev.values, 'o', color=color, ms=size, mec='white')
    # The axis must hold the dots too.
    values += [train.values, dev.values]
    has_dev |= len(dev) > 0
  if has_dev:
    # No data: one grey dot for the legend, instead of one a colour.
    axes.plot([], [], 'o', color=drawing.GREY, label='on the dev set')
  drawing.value_axis(axes, values)
  axes.set_title('Loss')
  axes.set_ylabel('nats')
  drawing.legend_above(axes, columns=len(parts) + 1)


def _draw_wer(axes: Any, wer: metrics_log.Series) -> None:
  best = int(np.argmin(wer.values))
  axes.plot(wer.steps, wer.values, 'o-', color=drawing.PALETTE[5], ms=5)
  drawing.value_axis(axes, [wer.values])
  axes.set_title(
    f'Dev WER, CTC best path: lowest {wer.values[best]:.2f} % at update '
    f'{wer.steps[best]:,}'
  )
  axes.set_ylabel('per cent')


@drawing.styled
def plot_optimizer(log: metrics_log.MetricsLog) -> bytes | None:
  """Draws learning rate and gradient norm; None if neither is there."""
  return _plot_panels(
    log,
    {
      'learning_rate': _Panel('Learning rate', 'step size', noisy=False),
      'gradient_norm': _Panel(
        'Gradient norm, before clipping', 'global L2 norm', wide=True
      ),
    },
  )


@drawing.styled
def plot_throughput(log: metrics_log.MetricsLog) -> bytes | None:
  """Draws training speed; None if it was not logged."""
  return _plot_panels(
    log,
    {
      'audio_seconds_per_second': _Panel(
        'Throughput, compilation included', 'seconds of sound / s'
      ),
      'data_wait_share': _Panel(
        'Waiting for data', '% of the time', factor=100
      ),
    },
  )


def _plot_panels(
  log: metrics_log.MetricsLog, wanted: dict[str, _Panel]
) -> bytes | None:
  """One panel below the other, for the quantities that were logged."""
  found = {name: log.series('train', name).finite() for name in wanted}
  found = {name: series for name, series in found.items() if len(series)}
  if not found:
    return None
  figure = drawing.new_figure(0.5 + 2 * len(found))
  panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
  for axes, (name, series) in zip(panels, found.items()):
    panel = wanted[name]
    series = metrics_log.Series(series.steps, panel.factor * series.values)
    draw = _draw_smoothed if panel.noisy else _draw_line
    draw(axes, series, color=drawing.PALETTE[0])
    drawing.value_axis(axes, [series.values], wide=panel.wide)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
  drawing.step_axis(panels[-1])
  return drawing.to_png(figure)


def _draw_smoothed(
  axes: Any, series: metrics_log.Series, *, color: str, **kwargs: Any
) -> None:
  """The windows as they were, faint, and a line through them."""
  axes.plot(series.steps, series.values, color=color, alpha=0.3, lw=1)
  smoothed = metrics_log.smooth(series.values)
  series = metrics_log.Series(series.steps, smoothed)
  _draw_line(axes, series, color=color, **kwargs)


def _draw_line(axes: Any, series: metrics_log.Series, **kwargs: Any) -> None:
  # A line through one point is invisible.
  marker = '.' if len(series) < 3 else None
  axes.plot(series.steps, series.values, marker=marker, **kwargs)
