"""Masks from lengths and chunks; True means valid, or may look."""

import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import Key
from u2moe_jax.array_types import Size
from u2moe_jax.array_types import typechecked

# The longest training chunk, in milliseconds of a 10 ms frame shift: 25
# frames after x4 subsampling, 16 after x6, 12 after x8.
MAX_CHUNK_INPUT_FRAMES = 100


@typechecked
def length_mask(
  lengths: Int[Array, 'B'], *, max_length: Size
) -> Bool[Array, 'B T']:
  """Marks the positions below each length."""
  return jnp.arange(max_length)[None, :] < lengths[:, None]  # [B, T]


@typechecked
def causal_mask(size: int) -> Bool[Array, 'U U']:
  """Lets position i look at positions up to and including i."""
  positions = jnp.arange(size)
  return positions[None, :] <= positions[:, None]


@typechecked
def chunk_mask(
  size: Size,
  *,
  chunk_size: int | Int[Array, ''],
  left_chunks: int | Int[Array, ''] = -1,
) -> Bool[Array, 'T T']:
  """Lets a frame look at its own chunk and at `left_chunks` before it.

  Args:
    size: frames T.
    chunk_size: frames per chunk; 0 or less means one chunk of full context.
    left_chunks: chunks of left context; negative means all.

  Returns:
    The mask, query frames in rows.
  """
  # Both numbers may be traced: training draws them in every step, and a new
  # chunk size must not be a new program. At least 1, to divide by.
  chunk_size = jnp.asarray(chunk_size)
  chunk_size = jnp.where(chunk_size <= 0, max(size, 1), chunk_size)
  chunk = jnp.arange(size) // chunk_size  # [T]
  query, key = chunk[:, None], chunk[None, :]  # [T, 1], [1, T]
  left = jnp.asarray(left_chunks)
  return (key <= query) & ((left < 0) | (key >= query - left))


@typechecked
def draw_chunk(
  key: Key[Array, ''],
  *,
  num_frames: int | Int[Array, ''],
  rate: int,
  with_left_chunks: bool,
) -> tuple[Int[Array, ''], Int[Array, '']]:
  """Draws one batch's training chunk (U2, arXiv 2012.05481, section 2.3).

  Half of the batches see full context; the others get a chunk of up to one
  second. The distribution is the reference's: r ~ U{1..L-1}; r > L // 2 means
  full context, else the chunk is r mod M + 1.

  Args:
    key: random key.
    num_frames: L, subsampled frames of the longest utterance of the batch.
    rate: subsampling rate, which fixes M = 100 // rate.
    with_left_chunks: also draw left chunks ~ U{0..(L-1) // chunk - 1}.

  Returns:
    (chunk_size, left_chunks), either -1 for unlimited.
  """
  size_key, left_key = jax.random.split(key)
  # One frame leaves nothing to draw; it sees itself either way.
  num_frames = jnp.maximum(jnp.asarray(num_frames, jnp.int32), 2)
  draw = jax.random.randint(size_key, (), 1, num_frames)
  full, chunk = chunk_of_draw(
    draw, num_frames, max_chunk=MAX_CHUNK_INPUT_FRAMES // rate
  )
  # A range must not be empty, and what is not needed is drawn all the same:
  # inside a program nobody knows `full`.
  num_left = jnp.maximum((num_frames - 1) // chunk, 1)
  left = jax.random.randint(left_key, (), 0, num_left)
  unlimited = jnp.full((), -1, jnp.int32)
  if not with_left_chunks:
    left = unlimited
  return jnp.where(full, unlimited, chunk), jnp.where(full, unlimited, left)


def chunk_of_draw(
  draw: int | Array, num_frames: int | Array, *, max_chunk: int
):
  """Turns r, uniform in {1..L-1}, into (full context?, chunk size).

  Works on ints and arrays.

  Args:
    draw: r.
    num_frames: L.
    max_chunk: M, the longest chunk.
  """
  return draw > num_frames // 2, draw % max_chunk + 1
