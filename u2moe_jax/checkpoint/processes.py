"""What the processes of one run do together; one alone does it at once.

With several hosts every process runs the same program. Files that belong to
the whole run are written by the first one; the others wait where they are
about to read them.
"""

from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


def is_first() -> bool:
  """Whether this process writes what belongs to the whole run."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Returns when every process has come here; `name` is for messages."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def say(text: str) -> None:
  """Prints a line, once."""
  if is_first():
    print(text, flush=True)


def own_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """The path for the first process, STEM.N.SUFFIX for the others."""
  path = pathlib.Path(path)
  if is_first():
    return path
  return path.with_stem(f'{path.stem}.{jax.process_index()}')


def gather(value: Any) -> Sequence[Any]:
  """The values of all processes, by their number; all must call it.

  Args:
    value: anything that JSON holds.
  """
  if jax.process_count() == 1:
    return [value]
  # An allgather takes arrays of one shape: bytes, padded to the longest.
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.zeros(int(np.max(lengths)), np.uint8)
  padded[: len(text)] = text
  rows = multihost_utils.process_allgather(padded)  # [processes, bytes]
  return [
    json.loads(np.asarray(row)[:length].tobytes())
    for row, length in zip(rows, np.ravel(lengths), strict=True)
  ]
