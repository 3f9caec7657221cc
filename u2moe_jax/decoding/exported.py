"""Runs exported programs (`exporting.py`): JAX, a file of arrays, no model."""

import json
import os
import pathlib
from typing import Any

import jax
from jax import export as jax_export
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import mapped

FORMAT_VERSION = 1
INDEX, ENCODE, CHUNK = 'programs.json', 'encode.bin', 'chunk.bin'

Cache = dict[str, Array]


class Programs:
  """The programs of a folder, with their parameters.

  Each compiles once for every shape that comes.

  Attributes:
    index: what programs.json says: sizes, features, the cache.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    """Opens a folder.

    Raises:
      contents.CheckpointError: if it holds no exported programs, damaged ones,
        or some of another version or kind of device.
    """
    folder = pathlib.Path(folder)
    self.index = _read_index(folder / INDEX)
    arrays = mapped.read(folder / 'params')
    # Once, or every call would bring the mapped file to the device.
    self._arrays = jax.device_put(arrays, jax.devices()[0])
    self._encode = _load(folder / ENCODE)
    self._chunk = _load(folder / CHUNK)

  def encode(
    self,
    features: Float[Array, 'B T_in F'],
    lengths: Int[Array, 'B'],
    chunk_size: int = -1,
    left_chunks: int = -1,
  ) -> dict[str, Array]:
    """Encodes whole utterances.

    Args:
      features: log-mel frames, padded; at least enough for one frame.
      lengths: real frames of each.
      chunk_size: encoder frames per chunk; -1 for full context.
      left_chunks: chunks of left context; -1 for all.

    Returns:
      `frames` (B, T, D), `log_probs` (B, T, V) of CTC, `mask` (B, T).
    """
    return self._encode(
      self._arrays,
      features,
      jnp.asarray(lengths, jnp.int32),
      jnp.int32(chunk_size),
      jnp.int32(left_chunks),
    )

  def encode_chunk(
    self,
    features: Float[Array, 'B T_in F'],
    num_valid: Int[Array, 'B'],
    cache: Cache,
  ) -> tuple[dict[str, Array], Cache]:
    """Encodes the next chunk of B streams.

    Args:
      features: `chunk_input_frames` log-mel frames of each stream; the next
        chunk begins `chunk_size * input_frames_per_frame` frames later.
      num_valid: encoder frames that count: all, fewer at the end of a stream,
        0 for a stream without a chunk.
      cache: after the previous chunk.

    Returns:
      `frames`, `log_probs` and `mask` as `encode`, of this chunk; the cache.
    """
    count = jnp.asarray(num_valid, jnp.int32)
    return self._chunk(self._arrays, features, count, cache)

  def init_cache(self, batch: int) -> Cache:
    """The cache of B streams that have heard nothing."""
    return {
      name: jnp.zeros(
        [batch if size is None else size for size in part['shape']],
        part['dtype'],
      )
      for name, part in self.index['cache'].items()
    }


def _read_index(file: pathlib.Path) -> dict[str, Any]:
  try:
    index = json.loads(file.read_text(encoding='utf-8'))
    version, platform = index['format_version'], index['platform']
  except OSError as error:
    raise contents.CheckpointError(f'{file}: {error.strerror}') from error
  except (ValueError, KeyError, TypeError) as error:
    raise contents.CheckpointError(f'{file}: no index ({error})') from error
  if version != FORMAT_VERSION:
    raise contents.CheckpointError(
      f'{file}: format version {version!r}; this program reads '
      f'{FORMAT_VERSION}: export the model again'
    )
  if platform != jax.default_backend():
    raise contents.CheckpointError(
      f'{file}: exported for {platform}, and this is {jax.default_backend()}; '
      'export the model here, or set JAX_PLATFORMS'
    )
  return index


def _load(file: pathlib.Path) -> jax.stages.Wrapped:
  """The jitted program of a file."""
  try:
    program = jax_export.deserialize(bytearray(file.read_bytes()))
  except OSError as error:
    raise contents.CheckpointError(f'{file}: {error.strerror}') from error
  except Exception as error:  # a damaged file fails in any layer of the reader
    raise contents.CheckpointError(
      f'{file}: no exported program: {contents.first_line(error)}'
    ) from error
  return jax.jit(program.call)
