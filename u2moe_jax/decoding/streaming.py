"""One stream: sound in as it comes, growing text out, rescored at the end.

Features, encoder and search are incremental; the encoder keeps keys, values
and convolution inputs (`models.cache`), the search its beams. The words are
those of one masked pass with the same chunk size.
"""

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import PyTree
from u2moe_jax.decoding import hotwords
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import prefix_beam
from u2moe_jax.decoding import programs
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import fbank
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import u2

# Encoder frames there is room for at first; doubled when they run out.
_FIRST_ROOM = 256


@struct.dataclass
class StreamState:
  """What a stream carries from chunk to chunk.

  Attributes:
    cache: encoder state.
    beams: search state.
    margin: smallest router margin so far.
  """

  cache: cache_lib.StreamingCache
  beams: prefix_beam.BeamState
  margin: Float[Array, 'B']


@struct.dataclass
class ChunkOutput:
  """What one chunk gave.

  Attributes:
    frames: encoder frames, for the final rescoring.
    mask: real ones among them.
    found: the n-best list so far.
  """

  frames: Float[Array, 'B T D']
  mask: Bool[Array, 'B T']
  found: hypotheses.Hypotheses


@functools.partial(jax.jit, static_argnums=0, static_argnames='blank_penalty')
def chunk_step(
  model: u2.U2MoeModel,
  params: PyTree,
  buffers: PyTree,
  features: Float[Array, 'B T_in F'],
  num_valid: Int[Array, 'B'],
  state: StreamState,
  *,
  blank_penalty: float,
  graph: hotwords.HotwordGraph | None = None,
) -> tuple[ChunkOutput, StreamState]:
  """Encodes and searches the next chunk of B streams."""
  variables = {'params': params}
  encoded, cache = model.apply(
    variables, features, num_valid, buffers, state.cache, method='encode_chunk'
  )
  log_probs = model.apply(
    variables,
    encoded.frames,
    blank_penalty=blank_penalty,
    method='ctc_log_probs',
  )
  beams = prefix_beam.advance(
    state.beams,
    log_probs,
    encoded.mask,
    blank_id=model.config.blank_id,
    graph=graph,
  )
  margin = programs.router_margin(encoded.moe, rows=features.shape[0])
  state = StreamState(
    cache=cache, beams=beams, margin=jnp.minimum(state.margin, margin)
  )
  found = prefix_beam.finish(beams, graph=graph)
  output = ChunkOutput(frames=encoded.frames, mask=encoded.mask, found=found)
  return output, state


@dataclasses.dataclass(frozen=True)
class Partial:
  """The text so far; later sound may still change it.

  Attributes:
    text: the words.
    seconds: sound that went into them.
    num_chunks: chunks processed by this call.
  """

  text: str
  seconds: float
  num_chunks: int


class Stream:
  """One utterance heard chunk by chunk: `accept` any number of times, then
  `finish` once.
  """

  def __init__(self, recognizer: recognizer_lib.Recognizer):
    """Starts a stream.

    Args:
      recognizer: the model and its decode config: `chunk_size` must be
        positive, `left_chunks` limits the attention cache (-1: it doubles
        when full), `mode` is ctc_prefix_beam_search or attention_rescoring.

    Raises:
      DecodeError: if model or config cannot stream.
    """
    _require_streaming(recognizer)
    self._recognizer = recognizer
    config = recognizer.config
    geometry = recognizer.geometry
    features = recognizer.description.features
    self._fbank = fbank.StreamingFbank(features)
    self._window = geometry.window(config.chunk_size)
    self._stride = config.chunk_size * geometry.rate
    self._pending = np.zeros((0, features.num_mel_bins), np.float32)
    self._num_features = 0  # feature frames heard
    self._num_samples = 0
    self._offset = 0  # encoder frames produced
    self._outputs: list[ChunkOutput] = []
    self._finished = False
    self._room = _FIRST_ROOM
    self._state = self._first_state()

  def _first_state(self) -> StreamState:
    recognizer = self._recognizer
    config = recognizer.config
    model = recognizer.description.model
    limited = config.left_chunks >= 0
    capacity = config.left_chunks * config.chunk_size if limited else self._room
    return StreamState(
      cache=cache_lib.init_cache(
        model.encoder,
        batch=1,
        capacity=capacity,
        dtype=jnp.dtype(model.dtype),
      ),
      beams=prefix_beam.init_state(
        1,
        beam=config.beam,
        max_tokens=self._room,
        with_hotwords=recognizer.hotwords is not None,
      ),
      margin=jnp.full((1,), jnp.inf, jnp.float32),
    )

  def accept(
    self, samples: np.ndarray, *, sample_rate: int | None = None
  ) -> Partial:
    """Takes the next samples.

    Args:
      samples: mono, floats within [-1, 1] or int16; any number, also none.
      sample_rate: Hz; None means the model's rate. Another rate must be
        resampled before, since a resampler needs the whole signal.

    Raises:
      DecodeError: after `finish`, or at another rate.
      audio.AudioError: for NaN or misshapen samples; the stream goes on as if
        they had not come.
    """
    if self._finished:
      raise recognizer_lib.DecodeError(
        'accept() after finish(): start a new one'
      )
    rate = self._recognizer.description.features.sample_rate
    if sample_rate not in (None, rate):
      raise recognizer_lib.DecodeError(
        f'this stream takes {rate} Hz, not {sample_rate}; resample first'
      )
    num_chunks = 0
    if len(samples):
      samples = audio.as_mono(samples, rate, sample_rate=rate)
      self._num_samples += len(samples)
      self._push(self._fbank.accept(samples))
    while len(self._pending) >= self._window:
      self._step(self._pending[: self._window], self._chunk_size)
      self._pending = self._pending[self._stride :]
      num_chunks += 1
    return Partial(self._text(), self._num_samples / rate, num_chunks)

  @property
  def _chunk_size(self) -> int:
    return self._recognizer.config.chunk_size

  def _push(self, frames: np.ndarray) -> None:
    self._num_features += len(frames)
    self._pending = np.concatenate([self._pending, frames])

  def _step(self, window: np.ndarray, num_valid: int) -> None:
    recognizer = self._recognizer
    while self._offset + self._chunk_size > self._room:
      self._grow()
    output, self._state = chunk_step(
      recognizer.model,
      recognizer.params,
      recognizer.buffers,
      jnp.asarray(window[None]),
      jnp.full((1,), num_valid, jnp.int32),
      self._state,
      blank_penalty=recognizer.config.blank_penalty,
      graph=recognizer.hotwords,
    )
    self._outputs.append(output)
    self._offset += num_valid

  def _grow(self) -> None:
    """Doubles the room for frames (with all left context) and tokens."""
    self._room *= 2
    state = self._state
    cache = state.cache
    if self._recognizer.config.left_chunks < 0:
      cache = cache_lib.grow(cache, self._room)
    self._state = dataclasses.replace(
      state, cache=cache, beams=prefix_beam.grow(state.beams, self._room)
    )

  def _text(self) -> str:
    if not self._outputs:
      return ''
    found = self._outputs[-1].found
    length = int(found.lengths[0, 0])
    tokens = np.asarray(found.tokens[0, 0])[:length].tolist()
    return self._recognizer.text(tokens)

  def finish(self) -> recognizer_lib.Transcript:
    """Ends the utterance: the last, shorter chunk, then rescoring.

    Raises:
      DecodeError: if called twice.
    """
    if self._finished:
      raise recognizer_lib.DecodeError('finish() twice: start a new stream')
    self._finished = True
    total = self._recognizer.geometry.output_length(self._num_features)
    # What is left is less than a window, but may still be two chunks' frames
    # of the full-utterance output.
    while self._offset < total:
      window = np.zeros((self._window, self._pending.shape[1]), np.float32)
      kept = self._pending[: self._window]
      window[: len(kept)] = kept
      self._step(window, min(self._chunk_size, total - self._offset))
      self._pending = self._pending[self._stride :]
    return self._final()

  def _final(self) -> recognizer_lib.Transcript:
    recognizer = self._recognizer
    found = prefix_beam.finish(self._state.beams, graph=recognizer.hotwords)
    margin = jnp.minimum(found.margin, self._state.margin)
    found = dataclasses.replace(found, margin=margin)
    if recognizer.config.mode != 'attention_rescoring' or not self._outputs:
      return next(recognizer.read(found))
    frames = [np.asarray(o.frames)[np.asarray(o.mask)] for o in self._outputs]
    memory = np.concatenate(frames)
    padded = np.zeros((1, self._room, memory.shape[1]), memory.dtype)
    padded[0, : len(memory)] = memory
    mask = np.arange(self._room)[None] < len(memory)
    return next(
      recognizer.rescore(found, jnp.asarray(padded), jnp.asarray(mask))
    )


def _require_streaming(recognizer: recognizer_lib.Recognizer) -> None:
  config = recognizer.config
  if not recognizer.description.model.encoder.causal_conv:
    raise recognizer_lib.DecodeError(
      'this model has a non-causal convolution (encoder.causal_conv=false) '
      'and cannot stream; use decode with chunk_size=-1'
    )
  if config.chunk_size <= 0:
    raise recognizer_lib.DecodeError(
      'streaming needs a chunk size, for example chunk_size=16'
    )
  if config.mode not in ('ctc_prefix_beam_search', 'attention_rescoring'):
    raise recognizer_lib.DecodeError(
      f'mode {config.mode} cannot stream; use ctc_prefix_beam_search or '
      'attention_rescoring'
    )
