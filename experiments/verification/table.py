"""The table and the last line."""

from collections.abc import Sequence
import json

import numpy as np

from experiments.verification import compare

_Named = tuple[str, compare.Row]


def line(case: str, row: compare.Row) -> str:
  """One row: case, quantity, error, tolerance, verdict, note."""
  verdict = 'pass' if row.passed else 'FAIL'
  note = '' if row.passed or not row.note else f'  {row.note}'
  return (
    f'{case:24} {row.quantity:72} {row.error:9.2e} {row.tolerance:8.1e} '
    f'{verdict}{note}'
  )


def header() -> str:
  """Names of the columns."""
  return (
    f'{"case":24} {"quantity":72} {"error":>9} {"limit":>8} (error: largest '
    'absolute one; of exact quantities how many differ)'
  )


def summary(rows: Sequence[_Named], *, cases: int) -> str:
  """One JSON object; `worst` is the largest error in units of its limit."""
  worst = max(rows, key=lambda named: named[1].share, default=None)
  return json.dumps(
    {
      'cases': cases,
      'quantities': len(rows),
      'failed': sum(not row.passed for _, row in rows),
      'worst': None if worst is None else _worst(*worst),
    }
  )


def _worst(case: str, row: compare.Row) -> dict[str, object]:
  return {
    'case': case,
    'quantity': row.quantity,
    'error': float(f'{row.error:.3g}') if np.isfinite(row.error) else None,
    'tolerance': float(f'{row.tolerance:.3g}'),
  }
