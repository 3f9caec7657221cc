"""One look for all plots: canvas, palette, axes; PNG bytes out.

Figures are made without pyplot: no global state, no window, always Agg.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import io
from typing import Any
from typing import ParamSpec
from typing import TypeVar

import matplotlib
from matplotlib import figure as figure_lib
from matplotlib import font_manager
from matplotlib import ft2font
from matplotlib import layout_engine
from matplotlib import patches
from matplotlib import ticker
from matplotlib.backends import backend_agg
import numpy as np

DPI = 110
WIDTH = 8.6  # inches; 946 pixels, a page's text column
MOST_NAMED = 16  # experts that a legend or a cell has room for

# Okabe and Ito's colours, told apart by colour-blind readers as well.
PALETTE = (
  '#0072b2',
  '#e69f00',
  '#009e73',
  '#cc79a7',
  '#56b4e9',
  '#d55e00',
  '#f0e442',
  '#666666',
)
GREY = '#8a8a8a'
_INK = '#333333'
_GRID = '#e4e4e4'

_FONT = 'DejaVu Sans'  # comes with matplotlib
_STYLE = {
  'font.family': _FONT,
  'font.size': 9,
  'axes.titlesize': 10,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.titlepad': 8,
  'axes.edgecolor': GREY,
  'axes.labelcolor': _INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': _GRID,
  'legend.frameon': False,
  'legend.borderaxespad': 0,
  'text.color': _INK,
  'text.parse_math': False,  # a token may be a dollar sign
  'xtick.color': _INK,
  'ytick.color': _INK,
  'lines.linewidth': 1.6,
  'savefig.facecolor': 'white',
}

_P = ParamSpec('_P')
_R = TypeVar('_R')


def styled(function: Callable[_P, _R]) -> Callable[_P, _R]:
  """Runs a plot function in the house style, and leaves none of it behind."""

  @functools.wraps(function)
  def inside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
    with matplotlib.rc_context(_STYLE):
      return function(*args, **kwargs)

  return inside


def new_figure(height: float) -> Any:
  """A figure of the page's width; height in inches."""
  layout = layout_engine.ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
  figure = figure_lib.Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
  # It attaches itself to the figure.
  backend_agg.FigureCanvasAgg(figure)
  return figure


def to_png(figure: Any) -> bytes:
  """Renders a figure."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=DPI)
  return buffer.getvalue()


def categorical(count: int) -> list[Any]:
  """Colours that are told apart, as well as so many can be."""
  if count <= len(PALETTE):
    return list(PALETTE[:count])
  return list(matplotlib.colormaps['turbo'](np.linspace(0.05, 0.95, count)))


def legend_above(axes: Any, *, columns: int, **kwargs: Any) -> None:
  """Puts the legend on the title's line, right, off the data."""
  axes.legend(
    loc='lower right',
    bbox_to_anchor=(1, 1.02),
    ncols=columns,
    columnspacing=1.2,
    handlelength=1.4,
    handletextpad=0.5,
    **kwargs,
  )


def step_axis(axes: Any) -> None:
  """Labels the horizontal axis with updates."""
  axes.set_xlabel('updates')
  axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
  axes.xaxis.set_major_formatter(
    ticker.FuncFormatter(lambda value, _: f'{value:,.0f}')
  )


def colour_bar(figure: Any, image: Any, **kwargs: Any) -> Any:
  """Adds a colour bar, no longer than four inches."""
  bar = figure.colorbar(
    image,
    pad=0.015,
    aspect=30,
    shrink=min(0.95, 4 / figure.get_figheight()),
    **kwargs,
  )
  bar.outline.set_visible(False)
  return bar


def expert_legend(axes: Any, palette: Sequence[Any]) -> None:
  """Names the experts by colour, if there are not too many."""
  if len(palette) > MOST_NAMED:
    return
  handles = [
    patches.Patch(color=color, label=f'{expert}')
    for expert, color in enumerate(palette)
  ]
  # The first one says what the numbers are.
  handles[0].set_label('expert 0')
  legend_above(axes, columns=min(len(palette), 8), handles=handles)


def value_axis(
  axes: Any, values: Sequence[np.ndarray], *, wide: bool = True
) -> None:
  """Fits the vertical axis to what is drawn.

  Args:
    axes: where it is drawn.
    values: all of it, finite.
    wide: take a logarithmic scale if the values span more than a decade.
  """
  everything = np.concatenate([np.ravel(each) for each in values])
  lowest, highest = everything.min(), everything.max()
  if wide and lowest > 0 and highest > 10 * lowest:
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    # The ticks at 2 and 5 are named already.
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.yaxis.set_major_formatter(
      ticker.FuncFormatter(lambda value, _: f'{value:g}')
    )
  # From 0 on, so that heights can be compared; and all values may be 0.
  elif lowest >= 0:
    axes.set_ylim(0, highest * 1.08 or 1)


def printable(text: str, instead: str) -> str:
  """The text, or what stands for it where the font lacks a character."""
  font = _font()
  # Glyph 0 is the box that stands for what a font lacks.
  known = text and all(font.get_char_index(ord(c)) for c in text)
  return text if known else instead


@functools.cache
def _font() -> ft2font.FT2Font:
  return font_manager.get_font(font_manager.findfont(_FONT))
