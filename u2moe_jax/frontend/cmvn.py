"""Global mean and variance statistics of features: gather, merge, save, load.

Statistics are sums, so that they can be gathered in any order and by any
number of workers. Two file forms are read: WeNet's JSON, which is also the
form written, and Kaldi's text matrix.
"""

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib

from jaxtyping import Float
import numpy as np

_SMALLEST_VARIANCE = 1e-20
_JSON_KEYS = ('mean_stat', 'var_stat', 'frame_num')


@dataclasses.dataclass(frozen=True, eq=False)
class CmvnStats:
  """Sums over frames, one entry per feature bin.

  Attributes:
    sum: float64 (F,), sum of the features.
    sum_squares: float64 (F,), sum of their squares.
    count: frames summed.
  """

  sum: Float[np.ndarray, 'F']
  sum_squares: Float[np.ndarray, 'F']
  count: int

  def __post_init__(self):
    if np.ndim(self.sum) != 1 or np.shape(self.sum) != np.shape(
      self.sum_squares
    ):
      raise ValueError(
        f'CMVN sums have shapes {np.shape(self.sum)} and '
        f'{np.shape(self.sum_squares)}; both must be (F,)'
      )

  @property
  def mean(self) -> Float[np.ndarray, 'F']:
    """Mean of each bin, float64 (F,); ValueError without frames."""
    self._require_frames()
    return self.sum / self.count

  @property
  def istd(self) -> Float[np.ndarray, 'F']:
    """One over the standard deviation, float64 (F,); needs frames.

    A bin that never changes gets 1e10, as in the reference.
    """
    self._require_frames()
    # The difference of two large sums: float64, and never below 0 by rounding.
    variance = self.sum_squares / self.count - np.square(self.mean)
    return 1.0 / np.sqrt(np.maximum(variance, _SMALLEST_VARIANCE))

  def _require_frames(self) -> None:
    if self.count <= 0:
      raise ValueError('CMVN statistics over no frames have no mean')


def empty(num_bins: int) -> CmvnStats:
  """Returns statistics over no frames of `num_bins` bins."""
  return CmvnStats(np.zeros(num_bins), np.zeros(num_bins), 0)


def accumulate(stats: CmvnStats, frames: Float[np.ndarray, 'T F']) -> CmvnStats:
  """Adds the frames of one utterance.

  Args:
    stats: what was gathered before; unchanged.
    frames: features (T, F), without dither or augmentation.

  Returns:
    The statistics with the frames in them.

  Raises:
    ValueError: if the number of bins differs or a value is not finite.
  """
  if frames.ndim != 2 or frames.shape[1] != len(stats.sum):
    raise ValueError(
      f'frames have shape {frames.shape}; these CMVN statistics need '
      f'(T, {len(stats.sum)})'
    )
  # Millions of frames: in float32 later ones would be rounded away.
  frames = frames.astype(np.float64)
  added = CmvnStats(
    frames.sum(axis=0), np.square(frames).sum(axis=0), len(frames)
  )
  # A NaN or inf in any frame reaches the sum, so this checks all of them.
  if not np.isfinite(added.sum_squares).all():
    raise ValueError('frames have NaN or infinite values')
  return merge(stats, added)


def merge(a: CmvnStats, b: CmvnStats) -> CmvnStats:
  """Returns the statistics of both sets of frames together."""
  if len(a.sum) != len(b.sum):
    raise ValueError(
      f'cannot merge CMVN statistics of {len(a.sum)} and {len(b.sum)} bins'
    )
  return CmvnStats(
    a.sum + b.sum, a.sum_squares + b.sum_squares, a.count + b.count
  )


def save(path: str | os.PathLike[str], stats: CmvnStats) -> None:
  """Writes statistics as WeNet's JSON; `load` returns the very same."""
  values = (stats.sum.tolist(), stats.sum_squares.tolist(), stats.count)
  text = json.dumps(dict(zip(_JSON_KEYS, values)))
  pathlib.Path(path).write_text(text + '\n', encoding='utf-8')


def load(path: str | os.PathLike[str]) -> CmvnStats:
  """Reads WeNet's JSON or Kaldi's text form, whichever it is.

  Args:
    path: the file.

  Returns:
    Its statistics.

  Raises:
    ValueError: if it is neither form, or is damaged; names the file.
    OSError: if it cannot be read.
  """
  data = pathlib.Path(path).read_bytes()
  try:
    text = data.decode('utf-8')
    parse = _parse_json if text.lstrip().startswith('{') else _parse_kaldi
    stats = parse(text)
    _check(stats)
  # JSON and UTF-8 errors are ValueErrors; a count may be infinite.
  except (ValueError, OverflowError) as error:
    raise ValueError(
      f'{path}: not CMVN statistics (WeNet JSON, or a Kaldi matrix in text '
      f'form): {error}'
    ) from error
  return stats


def _parse_json(text: str) -> CmvnStats:
  tree = json.loads(text)
  missing = [key for key in _JSON_KEYS if key not in tree]
  if missing:
    raise ValueError(f'no key {missing[0]!r}')
  sums, squares, count = (tree[key] for key in _JSON_KEYS)
  if not isinstance(count, (int, float)):
    raise ValueError(f'frame_num is {count!r}, not a number')
  return CmvnStats(_row(sums), _row(squares), int(count))


def _parse_kaldi(text: str) -> CmvnStats:
  """Parses `[ sums... count squares... 0 ]`, with or without a key before."""
  _, opened, rest = text.partition('[')
  body, closed, _ = rest.partition(']')
  if not (opened and closed):
    raise ValueError('no matrix in brackets')
  # The last column holds the count above and nothing below.
  numbers = _row(body.split())
  if len(numbers) < 4 or len(numbers) % 2:
    raise ValueError(f'{len(numbers)} numbers are not two rows')
  first, second = numbers.reshape(2, -1)  # (2, F + 1)
  return CmvnStats(first[:-1], second[:-1], int(first[-1]))


def _row(values: Sequence[object]) -> np.ndarray:
  try:
    return np.asarray(values, np.float64)
  except TypeError as error:
    raise ValueError(f'not a list of numbers ({error})') from error


def _check(stats: CmvnStats) -> None:
  if len(stats.sum) == 0 or stats.count <= 0:
    raise ValueError('statistics over no bins or no frames')
  if not np.isfinite(np.stack([stats.sum, stats.sum_squares])).all():
    raise ValueError('NaN or infinite sums')
