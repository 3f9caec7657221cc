"""Arrays in one file that is mapped into memory instead of being read.

FOLDER/
  arrays.bin    one array behind the other, in C order, little-endian
  arrays.json   of each array its path, type, shape and offset in the file

Every array begins at a multiple of 64 bytes, which is what JAX asks of memory
that it takes over on CPU as it lies: nothing is copied, a page is read when it
is first used, and processes on one machine share it.
"""

from collections.abc import Iterable
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from u2moe_jax.checkpoint import contents

ALIGNMENT = 64
_DATA, _INDEX = 'arrays.bin', 'arrays.json'

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class _Entry:
  """Where an array lies."""

  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def num_bytes(self) -> int:
    return self.dtype.itemsize * math.prod(self.shape)


def write(folder: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
  """Writes arrays, one in memory at a time.

  Args:
    folder: to write into; it is made.
    arrays: paths and arrays; asked for the next when one is written.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  index: dict[str, dict[str, Any]] = {}
  with (folder / _DATA).open('wb') as file:
    for path, array in arrays:
      # Zeros up to the next multiple.
      file.write(bytes(-file.tell() % ALIGNMENT))
      index[path] = {
        'dtype': array.dtype.name,
        'shape': list(array.shape),
        'offset': file.tell(),
      }
      # As bytes: bfloat16 has no buffer that a file would take.
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  (folder / _INDEX).write_text(json.dumps(index), encoding='utf-8')


def read(folder: Path) -> dict[str, np.ndarray]:
  """Maps the arrays; they cannot be written to.

  Raises:
    contents.CheckpointError: if a file is missing, damaged or too short.
  """
  folder = pathlib.Path(folder)
  index = _read_index(folder / _INDEX)
  file = folder / _DATA
  needed = max(entry.offset + entry.num_bytes for entry in index.values())
  try:
    # Reading behind the end of a mapped file kills the process.
    size = file.stat().st_size
    if size < needed:
      raise contents.CheckpointError(
        f'{file}: has {size} bytes and should have {needed}; copy it again'
      )
    data = np.asarray(np.memmap(file, np.uint8, mode='r'))
  except OSError as error:
    raise contents.CheckpointError(f'{file}: {error.strerror}') from error
  return {path: _view(data, entry) for path, entry in index.items()}


def _view(data: np.ndarray, entry: _Entry) -> np.ndarray:
  raw = data[entry.offset : entry.offset + entry.num_bytes]
  return raw.view(entry.dtype).reshape(entry.shape)


def _read_index(file: pathlib.Path) -> dict[str, _Entry]:
  try:
    tree = json.loads(file.read_text(encoding='utf-8'))
    entries = {
      path: _Entry(
        jnp.dtype(each['dtype']), tuple(each['shape']), each['offset']
      )
      for path, each in tree.items()
    }
  except OSError as error:
    raise contents.CheckpointError(f'{file}: {error.strerror}') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise contents.CheckpointError(f'{file}: no index ({error})') from error
  if not entries:
    raise contents.CheckpointError(f'{file}: names no arrays')
  return entries
