"""Whether programs fit the memory of a device, told before the first step."""

import os
import pathlib

import jax

from u2moe_jax.training import errors
from u2moe_jax.training import programs as programs_lib

GIB = 2**30
_CGROUP_LIMIT = pathlib.Path('/sys/fs/cgroup/memory.max')
_ADVICE = (
  'lower data.batch_frames or data.max_batch_size (all buckets), let '
  '`python -m experiments.profile_buckets` find data.batch_sizes (each '
  'bucket), lower data.max_seconds (the longest utterances), or set '
  'model.encoder.remat'
)


def limit() -> int | None:
  """Bytes that one device has; None if nobody tells.

  For a CPU it is the machine's memory, or what its container may take of it.
  """
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return (device.memory_stats() or {}).get('bytes_limit')
  total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  try:
    return min(total, int(_CGROUP_LIMIT.read_text(encoding='ascii')))
  except (OSError, ValueError):  # no container, or one without a limit
    return total


def require_fit(program: programs_lib.Program, limit_bytes: int | None) -> None:
  """Checks what the compiler tells against what there is.

  Raises:
    errors.OutOfMemoryError: if the program needs more.
  """
  needed = program.memory_bytes
  if needed is None or limit_bytes is None or needed <= limit_bytes:
    return
  raise errors.OutOfMemoryError(
    f'the {program.name} step of the bucket {describe(program.shape)} needs '
    f'{needed / GIB:.1f} GiB and a device has {limit_bytes / GIB:.1f} GiB; '
    f'{_ADVICE}'
  )


def explain(
  error: Exception, name: str, shape: programs_lib.Shape
) -> Exception:
  """The error of a step; one that says what to lower, if memory ran out."""
  text = str(error)
  # JAX has one class for all errors of a device; only the words differ.
  if 'RESOURCE_EXHAUSTED' not in text and 'Out of memory' not in text:
    return error
  line = text.strip().splitlines()[0]
  return errors.OutOfMemoryError(
    f'memory ran out in the {name} step of the bucket {describe(shape)} '
    f'({line}); {_ADVICE}'
  )


def describe(shape: programs_lib.Shape) -> str:
  """A shape in words."""
  return (
    f'of {shape.frames} frames x {shape.tokens} tokens x {shape.rows} '
    'utterances'
  )
