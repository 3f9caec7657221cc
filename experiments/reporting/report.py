"""Results as a table for a terminal, and as a page that stands alone."""

import base64
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import html
import math
import os
import pathlib
from typing import Any

Result = Mapping[str, Any]

_MISSING = '-'


@dataclasses.dataclass(frozen=True)
class Figure:
  """A picture of the report.

  Attributes:
    title: its heading.
    png: contents of the file, or where it lies.
    caption: how to read it.
  """

  title: str
  png: bytes | str | os.PathLike[str]
  caption: str = ''


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells as text.

  Attributes:
    header: one name per column.
    rows: cells.
    num_labels: columns that hold names, not numbers; they come first.
  """

  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  num_labels: int


def results_table(results: Sequence[Result]) -> Table:
  """Lays out error rates and speed, one row per result.

  Args:
    results: entries with mode, context, streaming, wer, cer, rtf,
      chunk_ms_p50, chunk_ms_p95; a number may be missing or None. A context
      that is a number is a chunk size, -1 for full context.
  """
  columns: dict[str, Callable[[Result], str]] = {
    'WER %': lambda result: _number(result.get('wer'), 2),
    'CER %': lambda result: _number(result.get('cer'), 2),
    'RTF': lambda result: _number(result.get('rtf'), 3),
  }
  if any(result.get('chunk_ms_p50') is not None for result in results):
    columns |= {
      'chunk p50 ms': lambda r: _number(r.get('chunk_ms_p50'), 1),
      'chunk p95 ms': lambda r: _number(r.get('chunk_ms_p95'), 1),
    }
  return _table(results, columns)


def snr_table(results: Sequence[Result]) -> Table | None:
  """Lays out WER per SNR band; None if no result has `wer_by_snr`."""
  bands = dict.fromkeys(
    band for result in results for band in result.get('wer_by_snr') or ()
  )
  if not bands:
    return None

  def cell(band: str) -> Callable[[Result], str]:
    # A function, so that each column keeps its band; a lambda made in the loop
    # would see the last one.
    return lambda result: _number(result['wer_by_snr'].get(band), 2)

  return _table(
    [result for result in results if result.get('wer_by_snr')],
    {band: cell(band) for band in bands},
  )


def _table(
  results: Sequence[Result], columns: Mapping[str, Callable[[Result], str]]
) -> Table:
  return Table(
    header=('mode', 'context', 'path', *columns),
    rows=tuple(
      (*_labels(result), *(cell(result) for cell in columns.values()))
      for result in results
    ),
    num_labels=3,
  )


def _labels(result: Result) -> tuple[str, str, str]:
  context = result.get('context', _MISSING)
  if isinstance(context, int):
    context = 'full' if context < 0 else f'chunk {context}'
  path = 'streaming' if result.get('streaming') else 'offline'
  return str(result.get('mode', _MISSING)), str(context), path


def _number(value: Any, digits: int) -> str:
  if value is None or not math.isfinite(value):
    return _MISSING
  return f'{value:.{digits}f}'


def format_table(results: Sequence[Result]) -> str:
  """Renders the results for a terminal; see `results_table`.

  Returns:
    Lines of aligned columns; a second table where there are SNR bands.
  """
  text = _to_text(results_table(results))
  by_snr = snr_table(results)
  if by_snr is not None:
    text += '\n\nWER % by signal-to-noise ratio\n' + _to_text(by_snr)
  return text


def _to_text(table: Table) -> str:
  columns = list(zip(table.header, *table.rows, strict=True))
  widths = [max(map(len, column)) for column in columns]

  def line(cells: Sequence[str]) -> str:
    padded = [
      cell.ljust(width) if i < table.num_labels else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return '  '.join(padded).rstrip()

  rule = '  '.join('-' * width for width in widths)
  return '\n'.join([line(table.header), rule, *map(line, table.rows)])


def write_report(
  path: str | os.PathLike[str],
  *,
  title: str,
  results: Sequence[Result],
  figures: Sequence[Figure],
  facts: Mapping[str, str],
  notes: Sequence[str],
) -> None:
  """Writes one HTML file that needs no other file, script or network.

  Args:
    path: the file; an existing one is replaced at the end.
    title: heading.
    results: see `results_table`; may be empty.
    figures: pictures, embedded.
    facts: name to value, shown at the top.
    notes: paragraphs below the tables.
  """
  path = pathlib.Path(path)
  body = [
    f'<h1>{html.escape(title)}</h1>',
    _facts(facts),
    _results(results),
    _notes(notes),
    *map(_figure, figures),
  ]
  page = _PAGE.format(
    title=html.escape(title),
    # As an argument: its braces are none of the template's.
    style=_CSS,
    body='\n'.join(part for part in body if part),
  )
  unfinished = path.with_name(path.name + '.unfinished')
  unfinished.write_text(page, encoding='utf-8')
  os.replace(unfinished, path)


def _facts(facts: Mapping[str, str]) -> str:
  if not facts:
    return ''
  items = [
    f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>'
    for name, value in facts.items()
  ]
  return f'<dl>\n{_lines(items)}\n</dl>'


def _results(results: Sequence[Result]) -> str:
  if not results:
    return ''
  parts = ['<h2>Results</h2>', _to_html(results_table(results))]
  by_snr = snr_table(results)
  if by_snr is not None:
    heading = '<h3>WER by signal-to-noise ratio, per cent</h3>'
    parts += [heading, _to_html(by_snr)]
  return _lines(parts)


def _to_html(table: Table) -> str:
  def row(tag: str, cells: Sequence[str]) -> str:
    inner = ''.join(
      f'<{tag}{"" if i < table.num_labels else numeric}>{html.escape(cell)}'
      f'</{tag}>'
      for i, cell in enumerate(cells)
    )
    return f'<tr>{inner}</tr>'

  numeric = ' class="number"'
  head = row('th', table.header)
  body = _lines([row('td', cells) for cells in table.rows])
  return (
    f'<div class="wide"><table>\n<thead>{head}</thead>\n'
    f'<tbody>\n{body}\n</tbody>\n</table></div>'
  )


def _notes(notes: Sequence[str]) -> str:
  return _lines([f'<p>{html.escape(note)}</p>' for note in notes])


def _figure(figure: Figure) -> str:
  png = figure.png
  if not isinstance(png, bytes):
    png = pathlib.Path(png).read_bytes()
  title = html.escape(figure.title)
  caption = ''
  if figure.caption:
    caption = f'\n<figcaption>{html.escape(figure.caption)}</figcaption>'
  data = base64.b64encode(png).decode('ascii')
  return (
    f'<h2>{title}</h2>\n<figure>\n'
    f'<img alt="{title}" src="data:image/png;base64,{data}">{caption}\n'
    '</figure>'
  )


def _lines(parts: Sequence[str]) -> str:
  return '\n'.join(parts)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_CSS = """
:root {
  color-scheme: light dark;
  --ink: #222; --faint: #666; --rule: #ddd; --paper: #fff; --band: #f6f6f4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #ddd; --faint: #999; --rule: #3a3a3a; --paper: #1b1b1c;
    --band: #242426;
  }
}
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 970px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1.25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p, figcaption { max-width: 44rem; overflow-wrap: anywhere; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr));
  gap: .75rem 2rem; margin: 0; padding: 1rem 1.25rem;
  background: var(--band); border-radius: 6px;
}
dt { font-size: .8rem; color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; padding: .35rem 1.5rem .35rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--rule);
}
th { font-size: .85rem; font-weight: 600; color: var(--faint); }
th.number, td.number { text-align: right; padding: .35rem 0 .35rem 1.5rem; }
figure { margin: 0; }
img {
  display: block; max-width: 100%; height: auto;
  background: #fff; border-radius: 4px;
}
figcaption { margin-top: .6rem; font-size: .92rem; color: var(--faint); }
"""
