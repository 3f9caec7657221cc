"""From sound to words: a model directory and a decode config, tied together."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import directory
from u2moe_jax.decoding import alignment
from u2moe_jax.decoding import batching
from u2moe_jax.decoding import endpoint
from u2moe_jax.decoding import hotwords
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import programs
from u2moe_jax.decoding import transcript as transcript_lib
from u2moe_jax.decoding import tree_rescoring
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import fbank
from u2moe_jax.layers import subsampling
from u2moe_jax.models import u2
from u2moe_jax.ops import masks
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.text import words as words_lib

Audio = str | os.PathLike[str] | np.ndarray

# Lists are cut to their longest hypothesis, rounded up to this.
_TOKEN_STEP = 64
# To find where a long recording is silent it is heard in windows, of which the
# edges, with half of their context missing, are not believed.
_WINDOW_SECONDS = 20.0
_EDGE_SECONDS = 1.0
_WINDOWS_AT_ONCE = 64


class DecodeError(ValueError):
  """A request the model cannot serve; says what to change."""


class Recognizer:
  """A recogniser for whole utterances, batched and jitted.

  Attributes:
    config: decoding settings.
    description: the model.
    tokenizer: token table, None if the checkpoint has none.
    hotwords: the phrases of `config.hotwords`, None without any.
  """

  def __init__(
    self,
    description: directory.Description,
    params: PyTree,
    buffers: PyTree,
    *,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
    config: config_lib.DecodeConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Ties the parts together; nothing compiles yet.

    Args:
      description: the model.
      params: its parameters.
      buffers: its buffers.
      tokenizer: ids to text; None prints ids.
      config: decoding settings.
      mesh: devices that share each batch, the parameters on all of them; None:
        wherever the parameters are.

    Raises:
      DecodeError: if the model has not the decoder a mode needs, or cannot
        take hotwords.
      hotwords.HotwordError: if the list of hotwords cannot be used.
    """
    self.config = config or config_lib.DecodeConfig()
    self.description = description
    self.tokenizer = tokenizer
    self.mesh = mesh
    if mesh is not None:
      # Decoding shares the batch only: every device has all parameters.
      everywhere = placement.replicated(mesh)
      params, buffers = jax.device_put((params, buffers), everywhere)
    self.params = params
    self.buffers = buffers
    self.model = u2.U2MoeModel(description.model, form=description.form)
    self.geometry = subsampling.geometry(description.model.encoder.subsampling)
    # Now, and not with the first batch.
    _require_decoders(self.config, description.model)
    self.hotwords = self._load_hotwords()

  def _load_hotwords(self) -> hotwords.HotwordGraph | None:
    config = self.config
    if not config.hotwords:
      return None
    if config.mode not in ('ctc_prefix_beam_search', 'attention_rescoring'):
      raise DecodeError(
        f'mode {config.mode} takes no hotwords; use ctc_prefix_beam_search or '
        'attention_rescoring'
      )
    if self.tokenizer is None:
      raise DecodeError(
        'hotwords need a token table, and this checkpoint has none'
      )
    return hotwords.load(
      config.hotwords,
      self.tokenizer,
      score=config.hotword_score,
      vocab_size=self.description.model.vocab_size,
    )

  @classmethod
  def from_checkpoint(
    cls,
    path: str | os.PathLike[str],
    *,
    config: config_lib.DecodeConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ) -> 'Recognizer':
    """Opens a model directory, a work directory or one of its steps.

    A model directory may be in the inference form.

    Raises:
      directory.CheckpointError: if there is no checkpoint there.
      DecodeError: if the model has not the decoder a mode needs.
    """
    found = directory.find(path, for_decoding=True)
    params, buffers = directory.restore(found)
    tokenizer = tokenizer_lib.load(found.tokens) if found.tokens else None
    return cls(
      found.description,
      params,
      buffers,
      tokenizer=tokenizer,
      config=config,
      mesh=mesh,
    )

  def with_config(self, config: config_lib.DecodeConfig) -> 'Recognizer':
    """The same model with other decoding settings."""
    # Cheap: the parameters are shared, and so are compiled programs, which hang
    # on the model and on shapes.
    return Recognizer(
      self.description,
      self.params,
      self.buffers,
      tokenizer=self.tokenizer,
      config=config,
      mesh=self.mesh,
    )

  def transcribe(
    self, sound: Audio, *, sample_rate: int | None = None
  ) -> transcript_lib.Transcript:
    """Transcribes one recording of any length.

    Args:
      sound: a file, or samples of shape (samples,) or (samples, channels).
      sample_rate: Hz; needed for samples, not for a file.

    Raises:
      audio.AudioError: if the sound cannot be used.
    """
    samples = self.load(sound, sample_rate=sample_rate)
    return self.transcribe_batch([samples])[0]

  def load(self, sound: Audio, *, sample_rate: int | None = None) -> np.ndarray:
    """Reads a file, or checks samples: mono float32 at the model's rate."""
    rate = self.description.features.sample_rate
    if not isinstance(sound, np.ndarray):
      return audio.load_audio(sound, sample_rate=rate)
    if sample_rate is None:
      raise audio.AudioError(
        'bad_rate', 'samples need their rate: transcribe(x, sample_rate=16000)'
      )
    return audio.as_mono(sound, sample_rate, sample_rate=rate)

  def transcribe_batch(
    self, waveforms: Sequence[np.ndarray]
  ) -> list[transcript_lib.Transcript]:
    """Transcribes waveforms (as `load` gives them), in their order.

    They are sorted by length and padded to few shapes; what one of them gets
    does not depend on the others. Long ones are decoded in `segments`.
    """
    # The parts of all recordings in one list, so that they fill batches
    # together.
    cuts = [self.segments(waveform) for waveform in waveforms]
    parts = [
      waveform[start:end]
      for waveform, cut in zip(waveforms, cuts, strict=True)
      for start, end in cut
    ]
    found = iter(self._transcribe([self.features(part) for part in parts]))
    return [self._join(cut, found) for cut in cuts]

  def _transcribe(
    self, features: Sequence[np.ndarray]
  ) -> list[transcript_lib.Transcript]:
    results: dict[int, transcript_lib.Transcript] = {}
    for batch in self.batches(features):
      results.update(zip(batch.indices, self.search(batch), strict=True))
    return [results[index] for index in range(len(features))]

  def _join(
    self,
    cut: Sequence[tuple[int, int]],
    found: Iterator[transcript_lib.Transcript],
  ) -> transcript_lib.Transcript:
    """Puts the parts of a recording together, with times of the whole."""
    if len(cut) == 1:
      return next(found)
    rate = self.description.features.sample_rate
    starts = [start / rate for start, _ in cut]
    # Sounds of neighbours overlap, see `segments`; their times do not.
    ends = [*starts[1:], cut[-1][1] / rate]
    return transcript_lib.join(
      [
        transcript_lib.Segment(
          start, end, transcript_lib.shift(next(found), start)
        )
        for start, end in zip(starts, ends, strict=True)
      ]
    )

  def segments(self, waveform: np.ndarray) -> list[tuple[int, int]]:
    """Where a recording is cut before it is decoded, in samples.

    One of up to `whole_seconds` is one segment. A longer one is heard in
    windows first, and cut where `endpoint.cut` says; so the cost of its pass
    grows with its length, not with the square.

    Returns:
      (start, end) of each segment. A segment reaches a little into the next,
      as far as its last encoder frame does.
    """
    features = self.description.features
    whole = len(waveform) <= self.config.whole_seconds * features.sample_rate
    num_frames = fbank.num_frames(len(waveform), features)
    if whole or not self.geometry.output_length(num_frames):
      return [(0, len(waveform))]
    blank, is_token = self._listen(waveform)
    cut = endpoint.cut(
      blank,
      is_token,
      self.config.endpoint,
      frame_seconds=self.frame_seconds,
    )
    found = [self.sound_of(start, end) for start, end in cut]
    # The samples behind the last whole frame belong to the last segment.
    return [*found[:-1], (found[-1][0], len(waveform))]

  def sound_of(self, start: int, end: int) -> tuple[int, int]:
    """Samples [start, end) that make encoder frames [start, end)."""
    features = self.description.features
    first = start * self.geometry.rate
    # Twice a window: feature frames under encoder frames, samples under those.
    last = first + self.geometry.window(end - start) - 1
    shift = features.shift_samples
    return first * shift, last * shift + features.window_samples

  def _listen(self, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blank probability of every encoder frame, and which say a token."""
    num_frames = fbank.num_frames(len(waveform), self.description.features)
    total = int(self.geometry.output_length(num_frames))
    edge = round(_EDGE_SECONDS / self.frame_seconds)
    core = round(_WINDOW_SECONDS / self.frame_seconds) - 2 * edge
    # Windows overlap by two edges; each gives the frames of its core.
    blank, is_token = np.ones(total, np.float32), np.zeros(total, bool)
    # In groups, or the features of hours would all be there at once.
    cores = list(range(0, total, core))
    for at in range(0, len(cores), _WINDOWS_AT_ONCE):
      group = cores[at : at + _WINDOWS_AT_ONCE]
      firsts = [max(first - edge, 0) for first in group]
      lasts = [min(first + core + edge, total) for first in group]
      sounds = [
        slice(*self.sound_of(first, last))
        for first, last in zip(firsts, lasts, strict=True)
      ]
      heard = self._silence([self.features(waveform[s]) for s in sounds])
      for index, (probability, spoken) in heard:
        kept = slice(group[index], min(group[index] + core, total))
        inside = slice(kept.start - firsts[index], kept.stop - firsts[index])
        blank[kept], is_token[kept] = probability[inside], spoken[inside]
    return blank, is_token

  def _silence(
    self, features: Sequence[np.ndarray]
  ) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Yields (index, what `programs.silence` says of its frames)."""
    blank_id = self.description.model.blank_id
    for batch in self.batches(features):
      found = programs.silence(self.encode(batch), blank_id=blank_id)
      blank, is_token = jax.device_get(found)
      for row, index in enumerate(batch.indices):
        yield index, (blank[row], is_token[row])

  def features(self, waveform: np.ndarray) -> np.ndarray:
    """Log-mel frames (T_in, F) of a waveform."""
    return fbank.fbank(waveform, self.description.features)

  def plan(self, seconds: Sequence[float]) -> Iterator[list[int]]:
    """Groups utterances as `batches` will, before their sound is loaded."""
    features = self.description.features
    rate = features.sample_rate
    lengths = [fbank.num_frames(round(s * rate), features) for s in seconds]
    for indices, _, _ in self._plan(lengths):
      yield indices

  def batches(
    self, features: Sequence[np.ndarray]
  ) -> Iterator[batching.PaddedBatch]:
    """Groups utterances into padded batches of few shapes, shortest first."""
    for indices, frames, rows in self._plan([len(each) for each in features]):
      bins = self.description.features.num_mel_bins
      rows_of = [features[i] for i in indices]
      yield batching.pad(indices, rows_of, frames, rows, bins)

  def _plan(
    self, lengths: Sequence[int]
  ) -> Iterator[tuple[list[int], int, int]]:
    frame_ms = self.description.features.frame_shift_ms
    return batching.plan(
      lengths,
      max_frames=int(self.config.batch_seconds * 1000 / frame_ms),
      smallest=self.geometry.window(1),
      parts=self._parts,
    )

  def search(
    self, batch: batching.PaddedBatch
  ) -> list[transcript_lib.Transcript]:
    """Searches one padded batch; one transcript per utterance of it."""
    found = self._search(self.encode(batch))
    return list(itertools.islice(found, len(batch.indices)))

  def encode(self, batch: batching.PaddedBatch) -> programs.Encoded:
    """Encodes one padded batch under the configured chunks."""
    config = self.config
    features, lengths = self._place(batch)
    return programs.encode(
      self.model,
      self.params,
      self.buffers,
      features,
      lengths,
      chunk_size=config.chunk_size,
      left_chunks=config.left_chunks,
      blank_penalty=config.blank_penalty,
    )

  @property
  def _parts(self) -> int:
    """Devices that share a batch."""
    if self.mesh is None:
      return 1
    return placement.batch_parts(self.mesh, rules.STANDARD)

  def _place(self, batch: batching.PaddedBatch) -> tuple[jax.Array, jax.Array]:
    """Brings features and lengths onto the devices."""
    if self.mesh is None:
      return jnp.asarray(batch.features), jnp.asarray(batch.lengths)
    sharding = placement.batch_sharding(self.mesh, rules.STANDARD)
    return (
      jax.device_put(batch.features, sharding),
      jax.device_put(batch.lengths, sharding),
    )

  def _search(
    self, encoded: programs.Encoded
  ) -> Iterator[transcript_lib.Transcript]:
    """Searches one encoded batch in the configured mode."""
    config = self.config
    if config.mode == 'attention_rescoring':
      found = self._search_ctc(encoded)
      yield from self.rescore(found, encoded.frames, encoded.mask)
    elif config.mode == 'attention':
      found = programs.search_attention(
        self.model,
        self.params,
        encoded,
        beam=config.beam,
        length_penalty=config.length_penalty,
        nbest=config.nbest,
      )
      yield from self.read(found)
    else:
      num_frames = np.asarray(encoded.mask).sum(axis=1)
      yield from self.read(self._search_ctc(encoded), num_frames=num_frames)

  def _search_ctc(self, encoded: programs.Encoded) -> hypotheses.Hypotheses:
    blank_id = self.description.model.blank_id
    if self.config.mode == 'ctc_greedy_search':
      return programs.search_greedy(encoded, blank_id=blank_id)
    return programs.search_prefixes(
      encoded,
      beam=self.config.beam,
      blank_id=blank_id,
      graph=self.hotwords,
    )

  def rescore(
    self,
    nbest: hypotheses.Hypotheses,
    frames: jax.Array,
    mask: jax.Array,
    *,
    rooms: Sequence[int] | None = None,
  ) -> Iterator[transcript_lib.Transcript]:
    """Re-ranks an n-best list by the attention decoders.

    Args:
      nbest: the list, with CTC scores (with hotwords: and their bonus, which
        `ctc_weight` weighs with them).
      frames: encoder frames (B, T, D).
      mask: real frames (B, T).
      rooms: as in `tree_rescoring.search_rescoring`, for callers that want one
        shape whatever comes: then the list is taken as long as it is.
    """
    if rooms is None:
      # There is room for a token per frame; most of it is empty.
      longest = int(np.max(np.asarray(nbest.lengths), initial=0))
      size = -(-max(longest, 1) // _TOKEN_STEP) * _TOKEN_STEP
      nbest = dataclasses.replace(
        nbest,
        tokens=_resize(nbest.tokens, size),
        times=_resize(nbest.times, size),
      )
    rescored = tree_rescoring.search_rescoring(
      self.model,
      self.params,
      nbest,
      frames,
      mask,
      ctc_weight=self.config.ctc_weight,
      reverse_weight=self.config.reverse_weight,
      rooms=rooms,
    )
    confidence = np.asarray(rescored.confidence)[:, 0]
    transcripts = self.read(
      rescored.hypotheses,
      num_frames=np.asarray(mask).sum(axis=1),
      token_confidence=np.asarray(rescored.token_confidence)[:, 0],
    )
    for transcript, value in zip(transcripts, confidence, strict=True):
      yield dataclasses.replace(transcript, confidence=float(value))

  def read(
    self,
    found: hypotheses.Hypotheses,
    *,
    num_frames: np.ndarray | None = None,
    token_confidence: np.ndarray | None = None,
  ) -> Iterator[transcript_lib.Transcript]:
    """Turns arrays into transcripts, one per utterance.

    Args:
      found: the n-best lists.
      num_frames: real encoder frames of each utterance, where the last word
        ends at the latest; None: with its last token.
      token_confidence: probability of each token of the first hypotheses.
    """
    # One transfer for all fields.
    found = jax.device_get(found)
    for row in range(found.lengths.shape[0]):
      transcript = self._read_row(found, row)
      times = found.times[row, 0, : len(transcript.tokens)]
      last = int(times.max(initial=-1)) + 1
      confidence = None
      if token_confidence is not None:
        confidence = token_confidence[row, : len(times)].tolist()
      yield dataclasses.replace(
        transcript,
        token_confidence=tuple(confidence or ()),
        words=self._words(
          transcript.tokens,
          times[times >= 0].tolist(),
          num_frames=last if num_frames is None else int(num_frames[row]),
          confidence=confidence,
        ),
      )

  @property
  def frame_seconds(self) -> float:
    """Seconds per encoder frame."""
    shift = self.description.features.frame_shift_ms / 1000
    return self.geometry.rate * shift

  def _words(
    self,
    tokens: Sequence[int],
    times: Sequence[int],
    *,
    num_frames: int,
    confidence: Sequence[float] | None,
  ) -> tuple[words_lib.TimedWord, ...]:
    """Words with their times, where there are any."""
    if len(times) < len(tokens):
      return ()
    spans = alignment.token_spans(
      times, num_frames=num_frames, frame_seconds=self.frame_seconds
    )
    words = words_lib.timed(
      tokens, spans, self.tokenizer, confidence=confidence
    )
    return tuple(words)

  def _read_row(
    self, found: hypotheses.Hypotheses, row: int
  ) -> transcript_lib.Transcript:
    alternatives = []
    for n in range(min(self.config.nbest, found.lengths.shape[1])):
      if n and not np.isfinite(found.scores[row, n]):
        break
      tokens = found.tokens[row, n, : found.lengths[row, n]].tolist()
      score = float(found.scores[row, n])
      alternatives.append(
        transcript_lib.Alternative(self.text(tokens), tuple(tokens), score)
      )
    # (Also if its score is -inf: a transcript always has a text.)
    best = alternatives[0]
    times = found.times[row, 0, : len(best.tokens)]
    seconds = self.frame_seconds
    return transcript_lib.Transcript(
      text=best.text,
      tokens=best.tokens,
      score=best.score,
      # A time is the last frame of a token's run, which ends one frame later.
      times=tuple(round(float(t + 1) * seconds, 3) for t in times if t >= 0),
      confidence=None,
      margin=float(found.margin[row]),
      nbest=tuple(alternatives),
    )

  def text(self, tokens: Sequence[int]) -> str:
    """Token ids as text, or as numbers where there is no token table."""
    if self.tokenizer is None:
      return ' '.join(map(str, tokens))
    return self.tokenizer.decode(tokens)


def _require_decoders(
  config: config_lib.DecodeConfig, model: config_lib.ModelConfig
) -> None:
  if config.mode.startswith('attention') and not model.decoder.num_blocks:
    raise DecodeError(
      f'mode {config.mode} needs an attention decoder, which this checkpoint '
      'has not; use ctc_greedy_search or ctc_prefix_beam_search'
    )
  if (
    config.mode == 'attention_rescoring'
    and config.reverse_weight > 0
    and not model.decoder.num_reverse_blocks
  ):
    raise DecodeError(
      f'reverse_weight={config.reverse_weight} needs a right-to-left decoder, '
      'which this checkpoint has not; use reverse_weight=0'
    )


def cautions(
  config: config_lib.DecodeConfig, model: config_lib.ModelConfig
) -> list[str]:
  """What the model can do, but was never trained for; one line each."""
  encoder, found = model.encoder, []
  # Training's limit is in feature frames, a chunk size in encoder frames.
  longest = masks.MAX_CHUNK_INPUT_FRAMES
  longest //= subsampling.geometry(encoder.subsampling).rate
  static = encoder.static_chunk_size
  if config.chunk_size > 0:
    if encoder.use_dynamic_chunk and config.chunk_size > longest:
      found.append(
        f'chunk_size={config.chunk_size}: this model was trained with chunks '
        f'of 1 to {longest} frames, and full context'
      )
    elif not encoder.use_dynamic_chunk and config.chunk_size != static:
      trained = f'chunks of {static} frames' if static > 0 else 'full context'
      found.append(
        f'chunk_size={config.chunk_size}: this model was trained with '
        f'{trained} only (encoder.use_dynamic_chunk=false)'
      )
    if config.left_chunks >= 0 and not encoder.use_dynamic_left_chunk:
      found.append(
        f'left_chunks={config.left_chunks}: this model was trained with all '
        'the left context (encoder.use_dynamic_left_chunk=false)'
      )
  elif not encoder.use_dynamic_chunk and static > 0:
    found.append(
      f'chunk_size=-1: this model was trained with chunks of {static} frames '
      'only'
    )
  return found


def _resize(array: jax.Array, size: int) -> jax.Array:
  """Cuts or pads (with -1) the last axis."""
  array = array[..., :size]
  missing = size - array.shape[-1]
  widths = [(0, 0)] * (array.ndim - 1) + [(0, missing)]
  return jnp.pad(array, widths, constant_values=-1)
