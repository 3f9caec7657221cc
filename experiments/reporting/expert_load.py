"""How evenly the routers use their experts.

Blocks and experts have the numbers that `--where` and the alarm for idle experts
give them, from 0.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

from matplotlib import colors
from matplotlib import ticker
import numpy as np

from experiments.reporting import drawing
from experiments.reporting import metrics_log

_PREFIX = 'load/'
_STARVED, _IDEAL, _CROWDED = '#2166ac', '#f7f7f4', '#d6604d'
_ROW_INCHES = 0.27
# Of each MoE layer the blocks that have it (`ModelConfig.expert_blocks`); the
# first ones where nothing is known.
Blocks = Mapping[str, Sequence[int]]


def recent_load(
  log: metrics_log.MetricsLog, *, num_windows: int = 10
) -> dict[str, np.ndarray]:
  """Averages the load over the last logged windows.

  Args:
    log: what a run logged.
    num_windows: how many.

  Returns:
    Layer name to shares of shape (L, E), a row sums to 1; empty for a dense
    model.
  """
  result = {}
  for name in sorted(log.names(_PREFIX), key=forward_order):
    load = log.series('train', _PREFIX + name).finite()
    # Windows, layers, experts: [N, L, E].
    if len(load) and load.values.ndim == 3:
      result[name] = load.values[-num_windows:].mean(axis=0)  # [L, E]
  return result


def forward_order(name: str) -> tuple[int, str]:
  """Sorts layers: encoder before decoders, macaron before final."""
  order = ['encoder.macaron', 'encoder.final', 'forward_decoder.ffn']
  return order.index(name) if name in order else len(order), name


def block_of(name: str, layer: int, blocks: Blocks | None) -> int:
  """The number of the block of row `layer` of a load."""
  return (blocks or {}).get(name, range(layer + 1))[layer]


@drawing.styled
def plot_heat_map(
  load: Mapping[str, np.ndarray], blocks: Blocks | None = None
) -> bytes | None:
  """Draws a row per layer and a column per expert.

  Args:
    load: layer name to shares (L, E); see `recent_load`.
    blocks: numbers of the L blocks of each.

  Returns:
    A PNG; None if there is no MoE layer.
  """
  if not load:
    return None
  # Encoder and decoders may have different numbers of experts.
  widest = max(each.shape[1] for each in load.values())
  num_rows = sum(len(each) for each in load.values())
  figure = drawing.new_figure(1.2 + _ROW_INCHES * (num_rows + len(load)))
  panels = figure.subplots(
    len(load), 1, squeeze=False, height_ratios=[len(x) for x in load.values()]
  )[:, 0]
  for axes, (name, shares) in zip(panels, load.items()):
    image = _draw_layers(axes, name, shares, widest, blocks)
  panels[-1].set_xticks(range(widest))
  panels[-1].set_xlabel('expert')
  panels[0].set_title('Share of frames or tokens, per cent')
  _draw_scale(figure, image, panels)
  return drawing.to_png(figure)


def _draw_layers(
  axes: Any,
  name: str,
  shares: np.ndarray,
  widest: int,
  blocks: Blocks | None,
) -> Any:
  num_layers, num_experts = shares.shape
  relative = shares * num_experts  # 1 is ideal
  image = axes.imshow(
    relative,
    cmap=colors.LinearSegmentedColormap.from_list(
      'load', [_STARVED, _IDEAL, _CROWDED]
    ),
    # White, the middle, is the even share; all from twice that on is full red.
    norm=colors.Normalize(0, 2),
    aspect='auto',
  )
  # Cells lie around whole numbers; the same columns in every panel.
  axes.set_xlim(-0.5, widest - 0.5)
  axes.set_xticks([])
  axes.set_yticks(
    range(num_layers),
    [f'{name} {block_of(name, layer, blocks)}' for layer in range(num_layers)],
  )
  _clear_frame(axes)
  if num_experts <= drawing.MOST_NAMED:
    _number_cells(axes, shares, relative)
  return image


def _number_cells(axes: Any, shares: np.ndarray, relative: np.ndarray) -> None:
  for (layer, expert), share in np.ndenumerate(shares):
    # Ink that can be read: the cells at both ends of the scale are dark.
    dark = abs(relative[layer, expert] - 1) > 0.7
    axes.text(
      expert,
      layer,
      f'{100 * share:.0f}',
      ha='center',
      va='center',
      fontsize=8,
      color='white' if dark else '#222222',
    )


def _clear_frame(axes: Any) -> None:
  axes.grid(visible=False)
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0)


def _draw_scale(figure: Any, image: Any, panels: Any) -> None:
  bar = drawing.colour_bar(figure, image, ax=list(panels), extend='max')
  bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=['0', '½', '1', '1½', '2'])
  bar.set_label('times the ideal share, 1/E')


@drawing.styled
def plot_over_training(
  log: metrics_log.MetricsLog, blocks: Blocks | None = None
) -> bytes | None:
  """Draws the least balanced layer, and every router's entropy, over time.

  Args:
    log: what a run logged.
    blocks: numbers of the blocks of each layer.

  Returns:
    A PNG; None if there is no MoE layer.
  """
  load = recent_load(log)
  if not load:
    return None
  figure = drawing.new_figure(6)
  above, below = figure.subplots(2, 1, sharex=True)
  name, layer = least_balanced(load)
  series = log.series('train', _PREFIX + name).finite()
  _draw_shares(above, series, layer)
  number = block_of(name, layer, blocks)
  above.set_title(f'Load of {name}, block {number}')
  num_experts = {name: shares.shape[1] for name, shares in load.items()}
  _draw_entropies(below, log, num_experts)
  drawing.step_axis(below)
  return drawing.to_png(figure)


def least_balanced(load: Mapping[str, np.ndarray]) -> tuple[str, int]:
  """Finds the layer farthest from equal shares, as (name, index in L)."""
  spread = {
    # Relative to the mean, 1/E: layers may have different numbers of experts.
    (name, layer): float(np.std(row) * len(row))
    for name, shares in load.items()
    for layer, row in enumerate(shares)
  }
  return max(spread, key=lambda key: spread[key])


def _draw_shares(axes: Any, series: metrics_log.Series, layer: int) -> None:
  shares = 100 * metrics_log.smooth(series.values[:, layer])  # [N, E]
  num_experts = shares.shape[1]
  palette = drawing.categorical(num_experts)
  for expert, color in enumerate(palette):
    axes.plot(series.steps, shares[:, expert], color=color)
  axes.axhline(100 / num_experts, color=drawing.GREY, ls='--', lw=1)
  axes.set_ylim(bottom=0)
  axes.yaxis.set_major_locator(ticker.MaxNLocator(6))
  axes.set_ylabel('per cent')
  drawing.expert_legend(axes, palette)


def _draw_entropies(
  axes: Any, log: metrics_log.MetricsLog, num_experts: Mapping[str, int]
) -> None:
  for name, color in zip(num_experts, drawing.categorical(len(num_experts))):
    entropy = log.series('train', f'entropy/{name}').finite()
    if len(entropy):
      mean = metrics_log.smooth(entropy.values.mean(axis=1))  # [N]
      axes.plot(entropy.steps, mean, color=color, label=name)
  for count in set(num_experts.values()):
    # The entropy of equal shares, log E.
    axes.axhline(math.log(count), color=drawing.GREY, ls='--', lw=1)
  # With one expert there is no entropy, and still an axis.
  axes.set_ylim(0, 1.08 * math.log(max(num_experts.values())) or 1)
  axes.set_title('Router entropy')
  axes.set_ylabel('nats, mean over layers')
  if axes.get_legend_handles_labels()[0]:
    drawing.legend_above(axes, columns=len(num_experts))
