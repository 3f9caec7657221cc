"""Many streams in one batch: they join and leave at any chunk.

A session is one stream. Each step takes one chunk of every session that has
one ready, in one batch of a fixed number of rows; the others wait, and nobody
notices who else is there. With endpoints, a stream is cut into segments:
positions, caches and search start afresh, while times go on.
"""

from collections.abc import Iterator
import dataclasses

from absl import logging
import jax
import numpy as np

from u2moe_jax.decoding import chunks
from u2moe_jax.decoding import endpoint
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import transcript as transcript_lib
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import fbank

# Encoder frames there is room for at first; doubled when they run out.
_FIRST_ROOM = 256
# Where nothing may compile on the way, the final rescoring has these rooms for
# nodes of the prefix tree, and this share of the longest segment besides it.
_NODE_ROOMS = (128, 512)
_SHORT_SHARE = 4


@dataclasses.dataclass(frozen=True)
class Partial:
  """What is new; later sound may still change the text.

  Attributes:
    text: the words so far, of the segment under way.
    seconds: sound taken in so far.
    num_chunks: chunks processed since the last look.
    segments: those that have ended since the last look.
  """

  text: str
  seconds: float
  num_chunks: int
  segments: tuple[transcript_lib.Segment, ...] = ()


class Sessions:
  """A batch of streams.

  With `endpoints` and limited left context nothing compiles after `warm_up`,
  whatever comes; with all left context, one program for each doubling of the
  cache. Without endpoints a stream is one utterance of any length, and what is
  kept of it doubles when it is full. One thread at a time may use it.
  """

  def __init__(
    self,
    recognizer: recognizer_lib.Recognizer,
    *,
    slots: int,
    endpoints: bool = True,
  ):
    """Makes room for streams.

    Args:
      recognizer: the model and its decode config: `chunk_size` must be
        positive, `left_chunks` limits the attention cache, `mode` is
        ctc_prefix_beam_search or attention_rescoring, `endpoint` the rules.
      slots: most streams at a time.
      endpoints: whether to cut streams into segments.

    Raises:
      DecodeError: if model or config cannot stream.
    """
    if slots < 1:
      raise recognizer_lib.DecodeError(f'slots={slots}: it must be positive')
    _require_streaming(recognizer)
    self.recognizer = recognizer
    self.endpoints = endpoints
    config = recognizer.config
    # Endpoints bound a segment, so all the room it can need is there at once
    # and the program never changes.
    self._room = _FIRST_ROOM
    if endpoints:
      self._room = endpoint.max_frames(
        config.endpoint,
        frame_seconds=recognizer.frame_seconds,
        chunk_size=config.chunk_size,
      )
    self._capacity = min(_FIRST_ROOM, self._room)
    if config.left_chunks >= 0:
      self._capacity = config.left_chunks * config.chunk_size
    # A chunk needs more feature frames than it moves on by: the subsampling
    # looks ahead.
    self._window = recognizer.geometry.window(config.chunk_size)
    self._rows: list[Session | None] = [None] * slots
    self._fresh = np.ones((slots,), bool)
    self._state = self._place(
      chunks.init_state(
        recognizer.description.model,
        batch=slots,
        room=self._room,
        capacity=self._capacity,
        beam=config.beam,
        with_hotwords=recognizer.hotwords is not None,
        keep_frames=config.mode == 'attention_rescoring',
      )
    )

  def _place(self, state: chunks.StreamState) -> chunks.StreamState:
    """Where the parameters are, so that every step is the same program.

    Through the host: of arrays that are the same at first, such as empty beams,
    each gets a buffer of its own, which a step can reuse.
    """
    leaf = jax.tree.leaves(self.recognizer.params)[0]
    return jax.device_put(jax.device_get(state), leaf.sharding)

  def warm_up(self) -> None:
    """Compiles what will be needed; call it while nobody is in.

    Raises:
      DecodeError: if a stream has joined.
    """
    if any(self._rows):
      raise recognizer_lib.DecodeError('warm_up() before the streams join')
    # The second step takes the state a step made, as all later ones do.
    for _ in range(2):
      self._step({})
    for size in self._frame_sizes():
      for rooms in self._all_rooms():
        self._final(0, size, 0, rooms)

  def _frame_sizes(self) -> list[int]:
    """Encoder frames that a rescoring may have, ascending."""
    short = -(-self._room // _SHORT_SHARE)
    return [short, self._room] if self.endpoints else [self._room]

  @property
  def _node_rooms(self) -> tuple[int, ...] | None:
    return _NODE_ROOMS if self.endpoints else None

  def _all_rooms(self) -> Iterator[tuple[int, ...] | None]:
    """For each program of a rescoring the rooms that lead to it."""
    if self._node_rooms is None:
      yield None
      return
    yield from ((room,) for room in self._node_rooms)
    # No room fits, which leads to the program for lists of any size.
    yield ()

  def open(self) -> 'Session':
    """Lets a stream join.

    Raises:
      DecodeError: if all slots are taken.
    """
    if None not in self._rows:
      raise recognizer_lib.DecodeError(
        f'all {len(self._rows)} slots are taken; finish a stream, or make more'
      )
    row = self._rows.index(None)
    session = Session(self, row)
    self._rows[row] = session
    # Whoever was there before has left its state.
    self._fresh[row] = True
    return session

  def step(self) -> int:
    """Takes one chunk of every stream that has one.

    Returns:
      How many had one.
    """
    ready = {}
    for session in self._rows:
      chunk = None if session is None else session._next_chunk()
      if session is not None and chunk is not None:
        ready[session] = chunk
    if not ready:
      return 0
    self._make_room(max(session.offset for session in ready))
    output = self._step(
      {session.row: chunk for session, chunk in ready.items()}
    )
    for session, (_, count) in ready.items():
      row = session.row
      tokens = output.tokens[row, : output.lengths[row]].tolist()
      reason = session._took(count, tokens, output.blank[row, :count])
      if reason is not None:
        self._end_segment(session, reason)
    return len(ready)

  def _step(
    self, taken: dict[int, tuple[np.ndarray, int]]
  ) -> chunks.ChunkOutput:
    """One chunk of some rows: windows, and the frames that count."""
    recognizer = self.recognizer
    slots = len(self._rows)
    bins = recognizer.description.features.num_mel_bins
    # Always all rows: another number of them would be another program.
    features = np.zeros((slots, self._window, bins), np.float32)
    num_valid = np.zeros((slots,), np.int32)
    for row, (window, count) in taken.items():
      features[row, : len(window)] = window
      num_valid[row] = count
    output, self._state = chunks.step(
      recognizer.model,
      recognizer.params,
      recognizer.buffers,
      features,
      num_valid,
      # A copy: JAX may read the array later, and it is cleared below.
      self._fresh.copy(),
      self._state,
      blank_penalty=recognizer.config.blank_penalty,
      graph=recognizer.hotwords,
    )
    self._fresh[:] = False
    return jax.device_get(output)

  def _make_room(self, offset: int) -> None:
    """Doubles what is too small for the next chunk of the longest segment."""
    config = self.recognizer.config
    needed = offset + config.chunk_size
    room, capacity = self._room, self._capacity
    while needed > room:
      room *= 2
    if config.left_chunks < 0:
      while needed > capacity:
        capacity = min(2 * capacity, room)
    if (room, capacity) == (self._room, self._capacity):
      return
    seconds = max(room, capacity) * self.recognizer.frame_seconds
    logging.warning(
      'streaming: making room for %d frames (%.0f s), which compiles a program',
      capacity if config.left_chunks < 0 else room,
      seconds,
    )
    self._room, self._capacity = room, capacity
    self._state = self._place(
      chunks.grow(self._state, room=room, capacity=capacity)
    )

  def _end_segment(self, session: 'Session', reason: endpoint.Reason) -> None:
    transcript = transcript_lib.empty()
    if session.offset:
      # The shorter shape if it holds the segment: attention costs by the frame.
      size = next(s for s in self._frame_sizes() if s >= session.offset)
      transcript = self._final(
        session.row, size, session.offset, self._node_rooms
      )
    session._end_segment(transcript, reason)
    self._fresh[session.row] = True

  def _final(
    self,
    row: int,
    size: int,
    num_frames: int,
    rooms: tuple[int, ...] | None,
  ) -> transcript_lib.Transcript:
    """What a row has heard, rescored if the mode says so."""
    recognizer = self.recognizer
    found, frames, mask = chunks.read_row(
      self._state, row, num_frames=size, graph=recognizer.hotwords
    )
    if recognizer.config.mode == 'attention_rescoring':
      return next(recognizer.rescore(found, frames, mask, rooms=rooms))
    return next(recognizer.read(found, num_frames=np.array([num_frames])))

  def _release(self, row: int) -> None:
    self._rows[row] = None


class Session:
  """One stream: `accept` any number of times, then `finish` once.

  In a batch, `feed` all of them, `Sessions.step`, then `read` each.

  Attributes:
    row: its place in the batch.
    offset: encoder frames of the segment under way.
    closed: whether no more sound will come.
  """

  def __init__(self, pool: Sessions, row: int):
    recognizer = pool.recognizer
    self._pool = pool
    self._recognizer = recognizer
    self.row = row
    self.offset = 0
    features = recognizer.description.features
    self._fbank = fbank.StreamingFbank(features)
    # Feature frames from the next chunk's first on.
    self._pending = np.zeros((0, features.num_mel_bins), np.float32)
    self._num_features = 0  # feature frames heard
    self._num_samples = 0
    self._first = 0  # feature frame at which the segment begins
    self._tokens: list[int] = []
    self._num_chunks = 0
    self._segments: list[transcript_lib.Segment] = []
    self.closed = False
    self._finished = False
    self._rules = self._new_rules()

  def _new_rules(self) -> endpoint.Endpointer:
    recognizer = self._recognizer
    return endpoint.Endpointer(
      recognizer.config.endpoint, recognizer.frame_seconds
    )

  def feed(
    self, samples: np.ndarray, *, sample_rate: int | None = None
  ) -> None:
    """Takes the next samples; nothing is computed yet but features.

    Args:
      samples: mono, floats within [-1, 1] or int16; any number, also none.
      sample_rate: Hz; None means the model's rate. Another rate must be
        resampled before, since a resampler needs the whole signal.

    Raises:
      DecodeError: after `close` or `finish`, or at another rate.
      audio.AudioError: for NaN or misshapen samples; the stream goes on as if
        they had not come, and the others do not notice.
    """
    if self.closed:
      raise recognizer_lib.DecodeError(
        'accept() after finish(): start a new one'
      )
    rate = self._recognizer.description.features.sample_rate
    if sample_rate not in (None, rate):
      raise recognizer_lib.DecodeError(
        f'this stream takes {rate} Hz, not {sample_rate}; resample first'
      )
    # Before the checks: an empty piece of any shape is fine.
    if not len(samples):
      return
    samples = audio.as_mono(samples, rate, sample_rate=rate)
    self._num_samples += len(samples)
    frames = self._fbank.accept(samples)
    self._num_features += len(frames)
    self._pending = np.concatenate([self._pending, frames])

  def accept(
    self, samples: np.ndarray, *, sample_rate: int | None = None
  ) -> Partial:
    """Takes the next samples and steps until this stream is up to date.

    Args and errors: those of `feed`.
    """
    self.feed(samples, sample_rate=sample_rate)
    self._run()
    return self.read()

  def read(self) -> Partial:
    """What is new since the last look."""
    rate = self._recognizer.description.features.sample_rate
    partial = Partial(
      text=self._recognizer.text(self._tokens),
      seconds=self._num_samples / rate,
      num_chunks=self._num_chunks,
      segments=tuple(self._segments),
    )
    self._num_chunks, self._segments = 0, []
    return partial

  def close(self) -> None:
    """No more sound will come; the rest goes with the next steps."""
    self.closed = True

  def finish(self) -> tuple[transcript_lib.Segment, ...]:
    """Ends the stream and leaves.

    Returns:
      The segments that have ended since the last `read` or `accept`, and the
      last one.

    Raises:
      DecodeError: if called twice.
    """
    if self._finished:
      raise recognizer_lib.DecodeError('finish() twice: start a new stream')
    self.close()
    self._run()
    if self.offset:
      self._pool._end_segment(self, 'end')
    self.leave()
    return self.read().segments

  def leave(self) -> None:
    """Gives up the slot; what was not read is lost."""
    if not self._finished:
      self._pool._release(self.row)
    self.closed = self._finished = True

  def _run(self) -> None:
    while self._next_chunk() is not None:
      self._pool.step()

  def _next_chunk(self) -> tuple[np.ndarray, int] | None:
    """The next window, and how many encoder frames of it count."""
    size = self._recognizer.config.chunk_size
    geometry = self._recognizer.geometry
    window = geometry.window(size)
    if len(self._pending) >= window:
      return self._pending[:window], size
    if not self.closed or self._finished:
      return None
    # Less than a window is left, and yet it may be frames of two chunks.
    total = int(geometry.output_length(self._num_features - self._first))
    left = total - self.offset
    return (self._pending, min(size, left)) if left > 0 else None

  def _took(
    self, count: int, tokens: list[int], blank: np.ndarray
  ) -> endpoint.Reason | None:
    """Notes what a chunk gave, and says whether it ended the segment."""
    size = self._recognizer.config.chunk_size
    # By a chunk, not by the window: the next one needs the overlap again.
    self._pending = self._pending[size * self._recognizer.geometry.rate :]
    self.offset += count
    self._num_chunks += 1
    self._tokens = tokens
    if not self._pool.endpoints:
      return None
    return self._rules.accept(blank, has_words=bool(tokens), coming=size)

  def _end_segment(
    self, transcript: transcript_lib.Transcript, reason: endpoint.Reason
  ) -> None:
    """Begins the next segment; times of this one count from the start."""
    shift = self._recognizer.description.features.frame_shift_ms / 1000
    start = self._first * shift
    # Encoder frames of the segment, in the feature frames they moved on by.
    self._first += self.offset * self._recognizer.geometry.rate
    rate = self._recognizer.description.features.sample_rate
    # At the end the sound decides, since less than a frame may be left over.
    end = self._num_samples / rate if reason == 'end' else self._first * shift
    self._segments.append(
      transcript_lib.Segment(
        start, end, transcript_lib.shift(transcript, start), reason
      )
    )
    self.offset, self._tokens = 0, []
    self._rules = self._new_rules()


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
