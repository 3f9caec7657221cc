"""Reads the golden cases: copies in testdata, or the full set.

The full set (all cases, too large for this repository) is tested too when
the environment variable U2MOE_GOLDEN names its folder.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

FULL = os.environ.get('U2MOE_GOLDEN', '')
_TESTDATA = pathlib.Path(__file__).parents[1] / 'testdata'


@dataclasses.dataclass(frozen=True)
class Case:
  """One reference model: its yaml keys, weights, inputs and outputs."""

  config: Mapping[str, Any]
  sos: int
  eos: int
  num_params: int
  weights: Mapping[str, np.ndarray]
  arrays: Mapping[str, np.ndarray]
  results: Mapping[str, Any]


def load(name: str) -> Case:
  """Loads a case from testdata."""
  with np.load(_TESTDATA / f'golden_{name}.npz') as file:
    arrays = {key: _widen(file[key]) for key in file.files}
  meta = json.loads(arrays.pop('meta').tobytes())
  planes = arrays.pop('weights_half')  # low bytes, high bytes
  # Back to pairs of bytes, each of them a float16.
  half = np.ascontiguousarray(planes.T).view(np.float16)[:, 0]
  weights = _split(half, meta['half'])
  weights |= _split(arrays.pop('weights_single'), meta['single'])
  return Case(
    meta['config'],
    meta['sos'],
    meta['eos'],
    meta['n_params'],
    weights,
    arrays,
    meta,
  )


def load_full(name: str) -> Case:
  """Loads a case of the full set."""
  folder = pathlib.Path(FULL) / name
  meta = json.loads((folder / 'config.json').read_text())
  return Case(
    meta['wenet_config'],
    meta['sos'],
    meta['eos'],
    meta['n_params'],
    dict(np.load(folder / 'weights.npz')),
    {key: _widen(a) for key, a in np.load(folder / 'io.npz').items()},
    json.loads((folder / 'results.json').read_text()),
  )


def units() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Arrays and numbers of the cases without a model."""
  with np.load(_TESTDATA / 'golden_units.npz') as file:
    arrays = {key: _widen(file[key]) for key in file.files}
  return arrays, json.loads(arrays.pop('results').tobytes())


def _widen(array: np.ndarray) -> np.ndarray:
  """float32 and int32 from how they are stored."""
  if array.dtype == np.float16:
    return array.astype(np.float32)
  return array.astype(np.int32) if array.dtype == np.int64 else array


def _split(flat: np.ndarray, shapes: Mapping[str, list[int]]):
  result, start = {}, 0
  for name, shape in shapes.items():
    size = int(np.prod(shape))
    result[name] = flat[start : start + size].reshape(shape).astype(np.float32)
    start += size
  return result
