"""Encoder: subsampling, blocks, chunk masks, streaming path and its caches."""

from collections.abc import Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.verification import compare
from experiments.verification import port as port_lib
from experiments.verification import registry
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import PyTree
from u2moe_jax.layers import positional
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import encoder as encoder_lib
from u2moe_jax.models import u2


@functools.partial(jax.jit, static_argnums=0)
def _encode(
  model: u2.U2MoeModel,
  params: PyTree,
  buffers: PyTree,
  features: Float[Array, 'B T_in F'],
  lengths: Int[Array, 'B'],
  chunk_size: Int[Array, ''],
  left_chunks: Int[Array, ''],
) -> encoder_lib.EncoderOutput:
  return model.apply(
    {'params': params},
    features,
    lengths,
    buffers,
    chunk_size=chunk_size,
    left_chunks=left_chunks,
    method='encode',
  )


def encode(
  port: port_lib.Port, chunk: int = -1, left: int = -1, row: int | None = None
) -> encoder_lib.EncoderOutput:
  """Encodes the batch, or one utterance without its padding."""
  chunk, left = port.chunk(chunk, left)

  def compute():
    arrays = port.case.arrays
    features, lengths = arrays['feats'], arrays['feats_lengths']
    if row is not None:
      lengths = lengths[row : row + 1]
      # Without padding, so what padding could leak in shows.
      features = features[row : row + 1, : int(lengths[0])]
    return _encode(
      port.model,
      port.params,
      port.buffers,
      jnp.asarray(features),
      jnp.asarray(lengths, jnp.int32),
      # As arrays: a chunk size more is no program more.
      jnp.asarray(chunk),
      jnp.asarray(left),
    )

  return port.once(('encode', chunk, left, row), compute)


def _output(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Encoder output of the batch, or of one utterance by itself."""
  chunk, left = quantity.integer('chunk', -1), quantity.integer('left', -1)
  row = quantity.names.get('row')
  output = encode(port, chunk, left, None if row is None else int(row))
  yield compare.close(
    quantity.path,
    output.frames,
    quantity.value,
    compare.ENCODER,
    mask=output.mask,
  )


def _mask(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  # Shape (B, 1, T) there: it is to be broadcast over queries.
  yield compare.equal(quantity.path, encode(port).mask[:, None], quantity.value)


def _embedded(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  output = encode(port)
  yield compare.close(
    quantity.path,
    output.embedded,
    quantity.value,
    compare.ENCODER,
    mask=output.mask,
  )


def _positions(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """What the reference hands to attention: a table, rotations, or zeros."""
  config = port.config.encoder
  steps = jnp.arange(quantity.value.shape[1])[None]
  if config.position == 'rope_pos':
    turn = positional.rotation(
      steps, head_dim=config.model_dim // config.num_heads
    )
    # Complex numbers there, as pairs, with an axis for the heads:
    # [B, T, 1, K/2, 2].
    ours = jnp.stack([turn.cos, turn.sin], axis=-1)[:, :, None]
  elif config.position == 'no_pos':
    ours = jnp.zeros((*steps.shape, config.model_dim))
  else:
    ours = positional.sinusoids(steps, width=config.model_dim)
  yield compare.close(quantity.path, ours, quantity.value, compare.ENCODER)


def _block(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  output = encode(port)
  ours = output.block_outputs[quantity.integer('block', 0)]
  yield compare.close(
    quantity.path, ours, quantity.value, compare.ENCODER, mask=output.mask
  )


@dataclasses.dataclass(frozen=True)
class _Streamed:
  """All utterances through the cached path, as streams of one batch.

  Attributes:
    frames: (B, T, D); valid below each length.
    caches: state after every chunk.
  """

  frames: np.ndarray
  caches: list[cache_lib.StreamingCache]


@functools.partial(jax.jit, static_argnums=0)
def _encode_chunk(
  model: u2.U2MoeModel,
  params: PyTree,
  buffers: PyTree,
  window: Float[Array, 'B T_in F'],
  num_valid: Int[Array, 'B'],
  cache: cache_lib.StreamingCache,
):
  output, cache = model.apply(
    {'params': params}, window, num_valid, buffers, cache, method='encode_chunk'
  )
  return output.frames, cache


def _stream(port: port_lib.Port, chunk: int, left: int) -> _Streamed:
  """Steps all utterances together; those that have ended are idle."""

  def compute():
    windows = _windows(port, chunk)
    # Unlimited left context still wants a static size: all chunks there are.
    capacity = chunk * (left if left >= 0 else len(windows))
    cache = cache_lib.init_cache(
      port.config.encoder, batch=len(port.lengths), capacity=capacity
    )
    frames, caches = [], []
    for step, window in enumerate(windows):
      # 0 for a stream that has ended: its row idles.
      num_valid = np.clip(port.lengths - step * chunk, 0, chunk)
      piece, cache = _encode_chunk(
        port.model,
        port.params,
        port.buffers,
        jnp.asarray(window),
        jnp.asarray(num_valid, jnp.int32),
        cache,
      )
      frames.append(np.asarray(piece))
      caches.append(jax.device_get(cache))
    return _Streamed(np.concatenate(frames, axis=1), caches)

  return port.once(('stream', chunk, left), compute)


def _windows(port: port_lib.Port, chunk: int) -> list[np.ndarray]:
  """The input window of every chunk, zeros where an utterance has ended."""
  arrays, geometry = port.case.arrays, port.geometry
  size, stride = geometry.window(chunk), chunk * geometry.rate
  num_chunks = -(-int(port.lengths.max()) // chunk)
  # A copy, in which padding is zero: a stream hears nothing behind its end.
  features = np.array(arrays['feats'])
  for row, length in enumerate(arrays['feats_lengths']):
    features[row, length:] = 0.0
  # The last window reaches beyond the features; all must be of one shape.
  missing = max((num_chunks - 1) * stride + size - features.shape[1], 0)
  features = np.pad(features, ((0, 0), (0, missing), (0, 0)))
  return [
    features[:, step * stride : step * stride + size]
    for step in range(num_chunks)
  ]


def _streamed(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  chunk, left = quantity.integer('chunk', 0), quantity.integer('left', -1)
  row = quantity.integer('row', 0)
  ours = _stream(port, chunk, left).frames[row : row + 1, : port.lengths[row]]
  yield compare.close(quantity.path, ours, quantity.value, compare.ENCODER)


def _cached(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Keys and values, convolution inputs, or output after one chunk."""
  left, step = quantity.integer('left', -1), quantity.integer('step', 0)
  row = quantity.integer('row', 0)
  chunk = quantity.integer('chunk', _cache_chunk(port, left))
  streamed = _stream(port, chunk, left)
  part = quantity.text('part')
  if part == 'y':
    stop = min((step + 1) * chunk, port.lengths[row])
    ours = streamed.frames[row : row + 1, step * chunk : stop]
  elif part == 'att':
    ours = _keys_and_values(streamed.caches[step], row)
  else:
    history = streamed.caches[step].convolution[:, row : row + 1]
    ours = history.swapaxes(2, 3)  # [L, 1, D, W - 1]
  yield compare.close(quantity.path, ours, quantity.value, compare.ENCODER)


def _keys_and_values(cache: cache_lib.StreamingCache, row: int) -> np.ndarray:
  """The filled part as (L, H, frames, 2 K)."""
  both = np.concatenate([cache.key[:, row], cache.value[:, row]], axis=-1)
  # The newest frames stand last, so what is filled is the end.
  first = cache.capacity - int(cache.length[row])
  return both[:, first:].swapaxes(1, 2)  # [L, H, P, 2 K]


def _cache_chunk(port: port_lib.Port, left: int) -> int:
  """The chunk size of the caches, which their names do not tell.

  It is the number of frames that came out at an early step, else the only
  chunk size the case streams with.
  """
  prefix = f'cache_left{left}_step'
  outputs = [
    array.shape[1]
    for name, array in port.case.arrays.items()
    if name.startswith(prefix) and name.endswith('_y')
  ]
  return max(outputs, default=_stream_chunks(port)[0])


def _stream_chunks(port: port_lib.Port) -> list[int]:
  """Chunk sizes of the streams in the case."""
  sizes = {
    int(name.removeprefix('stream_chunk').split('_')[0])
    for name in port.case.arrays
    if name.startswith('stream_chunk')
  }
  return sorted(sizes) or [0]


def _steps(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Input frames [start, end) and output offset of every chunk."""
  row, geometry = quantity.integer('row', 0), port.geometry
  length = int(port.case.arrays['feats_lengths'][row])
  rows = []
  for chunk in _stream_chunks(port):
    starts = range(0, int(port.lengths[row]), chunk)
    ours = [
      [
        offset * geometry.rate,
        min(offset * geometry.rate + geometry.window(chunk), length),
        offset,
      ]
      for offset in starts
    ]
    rows.append(compare.equal_lists(quantity.path, ours, quantity.value))
  # The name does not tell the chunk size; the one that fits was meant.
  yield min(rows, key=lambda each: each.error)


def _rate(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  yield compare.equal(quantity.path, port.geometry.rate, quantity.value)


def _right_context(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  ours = port.geometry.right_context
  yield compare.equal(quantity.path, ours, quantity.value)


def _lengths(port, quantity: registry.Quantity) -> Iterator[compare.Row]:
  yield compare.equal_lists(quantity.path, port.lengths, quantity.value)


_CHUNK = r'chunk(?P<chunk>\d+)_left(?P<left>-?\d+)'

RULES = (
  registry.Rule(
    rf'io/encoder_out_(full|{_CHUNK})(_alone_utt(?P<row>\d+))?', _output
  ),
  registry.Rule('io/(encoder|embed)_mask', _mask),
  registry.Rule('io/embed_out', _embedded),
  registry.Rule('io/embed_pos_emb', _positions),
  registry.Rule(r'io/layer(?P<block>\d+)_out', _block),
  registry.Rule(rf'io/stream_{_CHUNK}_utt(?P<row>\d+)', _streamed),
  registry.Rule(
    r'io/cache_(chunk(?P<chunk>\d+)_)?left(?P<left>-?\d+)_step(?P<step>\d+)'
    r'(_utt(?P<row>\d+))?_(?P<part>att|cnn|y)',
    _cached,
  ),
  registry.Rule(
    r'results/stream_steps_utt(?P<row>\d+)_\[start,end,offset\]', _steps
  ),
  registry.Rule('results/subsampling_rate', _rate),
  registry.Rule('results/right_context', _right_context),
  registry.Rule('results/search/encoder_lens', _lengths),
)
