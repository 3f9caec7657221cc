"""One chunk of B streams: encode, search, keep what comes next.

The rows are independent: a row without frames stays as it is, one marked as
fresh begins anew, and no row knows what the others do. So streams may join,
leave and begin segments at any chunk, and the program stays the same.
"""

import dataclasses
import functools

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import PyTree
from u2moe_jax.decoding import hotwords
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import prefix_beam
from u2moe_jax.decoding import programs
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import u2


@struct.dataclass
class StreamState:
  """What B streams carry from chunk to chunk; it does not grow.

  Attributes:
    cache: encoder state.
    beams: search state.
    margin: smallest router margin of the segment so far.
    frames: encoder frames of the segment, for its rescoring; T is 0 where
      nothing is rescored.
  """

  cache: cache_lib.StreamingCache
  beams: prefix_beam.BeamState
  margin: Float[Array, 'B']
  frames: Float[Array, 'B T D']


@struct.dataclass
class ChunkOutput:
  """What one chunk gave.

  Attributes:
    tokens: the best hypothesis so far, padded with -1.
    lengths: its tokens.
    blank: probability of the blank at each new frame, after any penalty.
  """

  tokens: Int[Array, 'B U']
  lengths: Int[Array, 'B']
  blank: Float[Array, 'B T']


def init_state(
  config: config_lib.ModelConfig,
  *,
  batch: int,
  room: int,
  capacity: int,
  beam: int,
  with_hotwords: bool,
  keep_frames: bool,
) -> StreamState:
  """The state of B streams that have heard nothing.

  Args:
    config: the model.
    batch: streams B.
    room: encoder frames of the longest segment, which is also its most tokens.
    capacity: frames of left context that are kept.
    beam: hypotheses N.
    with_hotwords: whether steps will be given a graph.
    keep_frames: whether segments are to be rescored.
  """
  dtype = jnp.dtype(config.dtype)
  shape = (batch, room if keep_frames else 0, config.encoder.model_dim)
  return StreamState(
    cache=cache_lib.init_cache(
      config.encoder, batch=batch, capacity=capacity, dtype=dtype
    ),
    beams=prefix_beam.init_state(
      batch, beam=beam, max_tokens=room, with_hotwords=with_hotwords
    ),
    margin=jnp.full((batch,), jnp.inf, jnp.float32),
    frames=jnp.zeros(shape, dtype),
  )


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames='blank_penalty',
  # XLA may write the new state where the old one was.
  donate_argnames='state',
)
def step(
  model: u2.U2MoeModel,
  params: PyTree,
  buffers: PyTree,
  features: Float[Array, 'B T_in F'],
  num_valid: Int[Array, 'B'],
  fresh: Bool[Array, 'B'],
  state: StreamState,
  *,
  blank_penalty: float,
  graph: hotwords.HotwordGraph | None = None,
) -> tuple[ChunkOutput, StreamState]:
  """Encodes and searches the next chunk.

  Args:
    model: the recogniser.
    params: its parameters.
    buffers: its buffers.
    features: a window of each stream.
    num_valid: encoder frames that count; 0 for a stream without a chunk.
    fresh: streams that begin a segment, with this chunk or a later one.
    state: after the previous chunk; it is used up.
    blank_penalty: subtracted from the blank logit.
    graph: hotwords, if the state was made with them.
  """
  # Here and not in a program of its own: rows begin anew at any chunk.
  state = _restart(state, fresh)
  variables = {'params': params}
  # Before the chunk moves it on: where the new frames go in `frames`.
  first = state.cache.offset
  encoded, cache = model.apply(
    variables, features, num_valid, buffers, state.cache, method='encode_chunk'
  )
  log_probs = model.apply(
    variables,
    encoded.frames,
    blank_penalty=blank_penalty,
    method='ctc_log_probs',
  )
  blank_id = model.config.blank_id
  beams = prefix_beam.advance(
    state.beams, log_probs, encoded.mask, blank_id=blank_id, graph=graph
  )
  margin = programs.router_margin(encoded.moe, rows=features.shape[0])
  state = StreamState(
    cache=cache,
    beams=beams,
    margin=jnp.minimum(state.margin, margin),
    frames=_keep(state.frames, encoded.frames, encoded.mask, first),
  )
  found = prefix_beam.finish(beams, graph=graph)
  output = ChunkOutput(
    tokens=found.tokens[:, 0],
    lengths=found.lengths[:, 0],
    blank=jnp.exp(log_probs[..., blank_id]),
  )
  return output, state


def _restart(state: StreamState, fresh: Bool[Array, 'B']) -> StreamState:
  """Begins a segment in some rows."""
  batch, beam, _, max_tokens = state.beams.tokens.shape
  first = prefix_beam.init_state(
    batch,
    beam=beam,
    max_tokens=max_tokens,
    with_hotwords=state.beams.beams.words is not None,
  )

  def choose(new: Array, old: Array, axis: int = 0) -> Array:
    shape = [1] * old.ndim
    shape[axis] = batch
    return jnp.where(fresh.reshape(shape), new, old)

  cache = state.cache
  return dataclasses.replace(
    state,
    # Keys and values need no clearing: with length 0 nobody looks at them.
    cache=dataclasses.replace(
      cache,
      convolution=choose(
        jnp.zeros_like(cache.convolution), cache.convolution, 1
      ),
      length=choose(jnp.zeros_like(cache.length), cache.length),
      offset=choose(jnp.zeros_like(cache.offset), cache.offset),
    ),
    beams=jax.tree.map(choose, first, state.beams),
    margin=choose(jnp.full_like(state.margin, jnp.inf), state.margin),
  )


def _keep(
  frames: Float[Array, 'B T D'],
  new: Float[Array, 'B chunk D'],
  mask: Bool[Array, 'B chunk'],
  first: Int[Array, 'B'],
) -> Float[Array, 'B T D']:
  """Writes the new frames that count behind the old ones."""
  batch, room, _ = frames.shape
  place = first[:, None] + jnp.arange(new.shape[1])[None]
  place = jnp.where(mask, place, room)  # or dropped
  # Each row writes at its own place, since streams begin at different times.
  rows = jnp.arange(batch)[:, None]
  return frames.at[rows, place].set(new, mode='drop')


def read_row(
  state: StreamState,
  row: int,
  *,
  num_frames: int,
  graph: hotwords.HotwordGraph | None = None,
) -> tuple[hypotheses.Hypotheses, Float[Array, '1 T D'], Bool[Array, '1 T']]:
  """Reads one stream: its n-best list, frames, and which of them count.

  Args:
    state: after its last chunk.
    row: the stream.
    num_frames: frames T to read, which must hold its segment; static.
    graph: hotwords, if the state was made with them.
  """
  # Keys and values stay out of it: with their size the program would change.
  heard = state.beams, state.margin, state.cache.offset, state.frames
  return _read_row(heard, np.int32(row), num_frames=num_frames, graph=graph)


@functools.partial(jax.jit, static_argnames='num_frames')
def _read_row(
  heard: tuple[prefix_beam.BeamState, Array, Array, Array],
  row: Int[Array, ''],
  *,
  num_frames: int,
  graph: hotwords.HotwordGraph | None,
) -> tuple[hypotheses.Hypotheses, Float[Array, '1 T D'], Bool[Array, '1 T']]:
  # A slice of one keeps the batch axis, so the programs of a batch apply.
  pick = lambda x: lax.dynamic_slice_in_dim(x, row, 1, axis=0)
  beams, margin, offset, frames = jax.tree.map(pick, heard)
  found = prefix_beam.finish(beams, graph=graph)
  # Behind them may stand frames of an earlier segment.
  mask = jnp.arange(num_frames)[None] < offset[:, None]
  margin = jnp.minimum(found.margin, margin)
  found = dataclasses.replace(found, margin=margin)
  return found, frames[:, :num_frames], mask


def grow(state: StreamState, *, room: int, capacity: int) -> StreamState:
  """Makes room for longer segments; what is known stays.

  It is rare, so it is done on the host, where it compiles nothing.

  Args:
    state: the state so far.
    room: as in `init_state`, at least the old one.
    capacity: likewise; more than the old one only with all left context.

  Returns:
    The state in host arrays.
  """
  state = jax.device_get(state)

  def pad(
    x: np.ndarray,
    axis: int,
    missing: int,
    value: int = 0,
    *,
    front: bool = False,
  ) -> np.ndarray:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (missing, 0) if front else (0, missing)
    return np.pad(x, widths, constant_values=value)

  # The newest frame stands last, so the room for older ones is in front.
  more = capacity - state.cache.capacity
  cache = dataclasses.replace(
    state.cache,
    key=pad(state.cache.key, 2, more, front=True),
    value=pad(state.cache.value, 2, more, front=True),
  )
  more = room - state.beams.tokens.shape[-1]
  beams = dataclasses.replace(
    state.beams,
    tokens=pad(state.beams.tokens, -1, more, -1),
    times=pad(state.beams.times, -1, more, -1),
  )
  frames = pad(state.frames, 1, more) if state.frames.size else state.frames
  return dataclasses.replace(state, cache=cache, beams=beams, frames=frames)
