"""Rows of the table: one quantity, its error, its tolerance."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

# Absolute, as the golden set's README suggests them.
ENCODER = 2e-5
LOG_PROBS = 1e-4
LOSS = 1e-3
SCORE = 1e-3
EXACT = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
  """One compared quantity.

  Attributes:
    quantity: its name in the case, and what of it if it has parts.
    error: largest absolute error; for exact quantities how many differ.
    tolerance: largest error that passes.
    note: what a reader of a failure needs to know.
  """

  quantity: str
  error: float
  tolerance: float
  note: str = ''

  @property
  def passed(self) -> bool:
    return self.error <= self.tolerance  # False for NaN

  @property
  def share(self) -> float:
    """The error in units of its tolerance; of exact ones the count."""
    if np.isnan(self.error):
      return np.inf
    return self.error / self.tolerance if self.tolerance else self.error


def failed(quantity: str, note: str) -> Row:
  """A quantity that could not be compared at all."""
  return Row(quantity, np.inf, EXACT, note)


def close(
  quantity: str,
  actual: Any,
  expected: Any,
  tolerance: float,
  *,
  mask: Any = None,
) -> Row:
  """Compares numbers.

  Args:
    quantity: name of the row.
    actual: ours.
    expected: the reference's, of the same shape.
    tolerance: largest absolute error.
    mask: which entries of the leading axes count; None for all.
  """
  # So that taking the difference rounds nothing off.
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(expected, np.float64)
  if actual.shape != expected.shape:
    return failed(quantity, f'shape {actual.shape}, not {expected.shape}')
  if mask is not None:
    actual, expected = actual[np.asarray(mask)], expected[np.asarray(mask)]
  # Equal infinities (an impossible token) have no difference to take.
  same = actual == expected
  with np.errstate(invalid='ignore'):
    errors = np.where(same, 0.0, np.abs(actual - expected))
  return Row(quantity, float(errors.max(initial=0.0)), tolerance)


def equal(
  quantity: str, actual: Any, expected: Any, *, mask: Any = None
) -> Row:
  """Compares arrays of ids, flags or counts; the error is how many differ."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  if actual.shape != expected.shape:
    return failed(quantity, f'shape {actual.shape}, not {expected.shape}')
  if mask is not None:
    actual, expected = actual[np.asarray(mask)], expected[np.asarray(mask)]
  return Row(quantity, float(np.sum(actual != expected)), EXACT)


def equal_lists(
  quantity: str, actual: Sequence[Any], expected: Sequence[Any]
) -> Row:
  """Compares lists entry by entry (entries may be lists of any length)."""
  if len(actual) != len(expected):
    return failed(quantity, f'{len(actual)} entries, not {len(expected)}')
  pairs = list(zip(actual, expected))
  wrong = [i for i, (a, b) in enumerate(pairs) if _plain(a) != _plain(b)]
  note = f'first difference at {wrong[0]}' if wrong else ''
  return Row(quantity, float(len(wrong)), EXACT, note)


def close_lists(
  quantity: str,
  actual: Sequence[Any],
  expected: Sequence[Any],
  tolerance: float,
) -> Row:
  """Compares ragged lists of numbers, of equal lengths throughout."""
  if len(actual) != len(expected):
    return failed(quantity, f'{len(actual)} entries, not {len(expected)}')
  rows = [
    close(f'{quantity}[{i}]', a, b, tolerance)
    for i, (a, b) in enumerate(zip(actual, expected))
  ]
  if not rows:
    return Row(quantity, 0.0, tolerance)
  # By share, in which NaN is infinite: max() could pass over a NaN.
  worst = max(rows, key=lambda row: row.share)
  return dataclasses.replace(worst, quantity=quantity)


def _plain(value: Any) -> Any:
  """Lists and numbers without NumPy types."""
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  if isinstance(value, list | tuple):
    return [_plain(entry) for entry in value]
  return value
