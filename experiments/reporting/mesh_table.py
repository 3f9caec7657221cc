"""The rows of a mesh sweep as JSON, CSV, a table and a plot."""

from collections.abc import Mapping
from collections.abc import Sequence
import csv
import io
import json
import os
import pathlib
from typing import Any

_MIB, _GIB = 2**20, 2**30
_AXES = 'data x fsdp x expert x tensor'

# (heading, key, divisor, decimals) of the table.
_COLUMNS = (
  ('step ms', 'step_s', 1e-3, 1),
  ('audio s/s', 'audio_seconds_per_second', 1, 0),
  ('MFU', 'mfu', 1, 3),
  ('total GiB', 'total_bytes', _GIB, 2),
  ('parameters MiB', 'parameter_bytes', _MIB, 0),
  ('optimizer MiB', 'optimizer_bytes', _MIB, 0),
  ('activations GiB', 'activation_bytes', _GIB, 2),
  ('temporary GiB', 'temporary_bytes', _GIB, 2),
  ('traffic GiB', 'collective_bytes', _GIB, 2),
  ('GFLOP', 'flops', 1e9, 0),
  ('times the work', 'redundancy', 1, 2),
  ('compile s', 'compile_s', 1, 1),
)
_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all')


def ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The best first: by step time, else by traffic; failures last."""

  def key(row: Mapping[str, Any]):
    time = row.get('step_s')
    return (
      'error' in row,
      time if time is not None else float('inf'),
      row.get('collective_bytes', 0.0),
      row.get('total_bytes', 0),
    )

  return sorted(rows, key=key)


def line(row: Mapping[str, Any]) -> str:
  """A row as it is announced."""
  if 'error' in row:
    return f'{row["shape"]}: {row["error"]}'
  step = ''
  if row.get('step_s') is not None:
    step = f'{1e3 * row["step_s"]:.1f} ms a step, '
  return (
    f'{row["shape"]}: {step}{row["total_bytes"] / _GIB:.2f} GiB, '
    f'{row["collective_bytes"] / _GIB:.2f} GiB of traffic, '
    f'{row["flops"] / 1e9:.0f} GFLOP, compiled in {row["compile_s"]:.1f} s'
  )


def write(
  out: pathlib.Path,
  sweep: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  left_out: Mapping[str, str],
) -> None:
  """Writes sweep.json, sweep.csv, sweep.md and, with matplotlib, sweep.png.

  Args:
    out: the folder.
    sweep: what the rows have in common.
    rows: of the shapes that were looked at.
    left_out: shapes that do not fit, and why.
  """
  rows = ordered(rows)
  whole = {'sweep': sweep, 'rows': rows, 'left_out': left_out}
  _replace(out / 'sweep.json', json.dumps(whole, indent=1).encode() + b'\n')
  _replace(out / 'sweep.csv', to_csv(rows).encode())
  _replace(out / 'sweep.md', to_markdown(sweep, rows, left_out).encode())
  picture = to_png(rows)
  if picture is not None:
    _replace(out / 'sweep.png', picture)


def _replace(path: pathlib.Path, content: bytes) -> None:
  unfinished = path.with_name(path.name + '.tmp')
  unfinished.write_bytes(content)
  os.replace(unfinished, path)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
  """One level: `collectives` becomes a count and bytes of each kind."""
  flat = {key: value for key, value in row.items() if key != 'collectives'}
  for kind, traffic in row.get('collectives', {}).items():
    for name, value in traffic.items():
      flat[f'{kind} {name}'] = value
  return flat


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """Every figure of every row."""
  flat = [_flat(row) for row in rows]
  # Rows may have different collectives; the first row to have one places it.
  names = list(dict.fromkeys(name for row in flat for name in row))
  text = io.StringIO()
  writer = csv.DictWriter(text, names, lineterminator='\n')
  writer.writeheader()
  writer.writerows(flat)
  return text.getvalue()


def to_markdown(
  sweep: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  left_out: Mapping[str, str],
) -> str:
  """A sorted table of figures for one device, and what is not in it."""
  good = [row for row in rows if 'error' not in row]
  # A simulated sweep has no step times: columns without a figure go.
  shown = [
    column
    for column in _COLUMNS
    if any(row.get(column[1]) is not None for row in good)
  ]
  kinds = [k for k in _KINDS if any(k in row['collectives'] for row in good)]
  heads = [_AXES, *(c[0] for c in shown), *(f'{k} GiB' for k in kinds)]
  lines = [
    f'{sweep["devices"]} {"simulated " if sweep["simulate"] else ""}devices, '
    f'{sweep["batch"]} utterances of {sweep["seconds"]:g} s; figures of one '
    'device and one step.',
    '',
    f'| {" | ".join(heads)} |',
    f'|{" --- |" * len(heads)}',
  ]
  for row in good:
    cells = [row['shape'], *(_cell(row, *c[1:]) for c in shown)]
    cells += [
      f'{row["collectives"].get(k, {"bytes": 0})["bytes"] / _GIB:.2f}'
      for k in kinds
    ]
    lines.append(f'| {" | ".join(cells)} |')
  for row in rows:
    if 'error' in row:
      lines.append(f'| {row["shape"]} | failed: {_plain(row["error"])} |')
  if left_out:
    lines += ['', 'Do not fit:', '']
    lines += [f'- {name}: {_plain(why)}' for name, why in left_out.items()]
  return '\n'.join(lines) + '\n'


def _cell(
  row: Mapping[str, Any], key: str, divisor: float, decimals: int
) -> str:
  value = row.get(key)
  return '' if value is None else f'{value / divisor:.{decimals}f}'


def _plain(text: str) -> str:
  return ' '.join(text.replace('|', '/').split())


def to_png(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
  """Memory and traffic of each shape; None without matplotlib or figures."""
  good = [row for row in rows if 'error' not in row]
  try:
    # matplotlib is no part of the core.
    from experiments.reporting import drawing
  except ImportError:
    return None
  # More bars cannot be told apart; the best are first.
  return _draw(drawing, good[:40]) if good else None


def _draw(drawing: Any, rows: Sequence[Mapping[str, Any]]) -> bytes:
  @drawing.styled
  def draw():
    figure = drawing.new_figure(1.4 + 0.2 * len(rows))
    memory, traffic = figure.subplots(1, 2, sharey=True)
    names = [row['shape'] for row in rows]
    parts = (
      ('parameter_bytes', 'parameters'),
      ('optimizer_bytes', 'optimizer'),
      ('temporary_bytes', 'temporary'),
    )
    _stack(memory, names, parts, [dict(row) for row in rows], drawing)
    memory.set_title('memory, GiB')
    flat = [
      {k: t['bytes'] for k, t in row['collectives'].items()} for row in rows
    ]
    kinds = dict.fromkeys(kind for row in flat for kind in row)
    _stack(traffic, names, [(k, k) for k in kinds], flat, drawing)
    traffic.set_title('traffic a step, GiB')
    # Bars grow from below, and the best row belongs on top; both panels share
    # it.
    memory.invert_yaxis()
    return drawing.to_png(figure)

  return draw()


def _stack(
  axes: Any,
  names: Sequence[str],
  parts: Sequence[tuple[str, str]],
  rows: Sequence[Mapping[str, Any]],
  drawing: Any,
) -> None:
  """Bars of several parts behind each other, one bar a shape."""
  left = [0.0] * len(names)
  for (key, label), colour in zip(
    parts, drawing.categorical(max(len(parts), 1)), strict=False
  ):
    values = [row.get(key, 0) / _GIB for row in rows]
    axes.barh(names, values, left=left, color=colour, label=label)
    left = [a + b for a, b in zip(left, values, strict=True)]
  if parts:
    axes.legend(loc='upper right', fontsize=7)
  axes.grid(axis='y', visible=False)
