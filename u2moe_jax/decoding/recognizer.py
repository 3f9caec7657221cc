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
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import programs
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import fbank
from u2moe_jax.layers import subsampling
from u2moe_jax.models import u2
from u2moe_jax.text import tokenizer as tokenizer_lib

Audio = str | os.PathLike[str] | np.ndarray

# Padded lengths grow by this factor: few shapes compile, little is padded.
_SHORTEST_FRAMES = 100
_LENGTH_GROWTH = 1.4
_TOKEN_STEP = 16
_MAX_ROWS = 64


class DecodeError(ValueError):
  """A request the model cannot serve; says what to change."""


@dataclasses.dataclass(frozen=True)
class Alternative:
  """One entry of an n-best list."""

  text: str
  tokens: tuple[int, ...]
  score: float


@dataclasses.dataclass(frozen=True)
class Transcript:
  """What was heard.

  Attributes:
    text: the words; token ids where the checkpoint has no token table.
    tokens: token ids.
    score: log score of the search (its meaning depends on the mode).
    times: seconds at which each token ends; empty in `attention` mode, which
      knows none.
    confidence: probability per token, geometric mean; rescoring only.
    margin: smallest gap any decision hung on, of routers and search; near 0
      another machine may decide otherwise.
    nbest: the alternatives, best first.
  """

  text: str
  tokens: tuple[int, ...]
  score: float
  times: tuple[float, ...]
  confidence: float | None
  margin: float
  nbest: tuple[Alternative, ...]


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
  """Utterances padded to one shape; rows behind them are empty.

  Attributes:
    indices: positions of the utterances in the caller's list.
    features: (rows, padded frames, F).
    lengths: real frames of each row.
  """

  indices: tuple[int, ...]
  features: np.ndarray
  lengths: np.ndarray


class Recognizer:
  """A recogniser for whole utterances, batched and jitted.

  Attributes:
    config: decoding settings.
    description: the model.
    tokenizer: token table, None if the checkpoint has none.
  """

  def __init__(
    self,
    description: directory.Description,
    params: PyTree,
    buffers: PyTree,
    *,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
    config: config_lib.DecodeConfig | None = None,
  ):
    """Ties the parts together; nothing compiles yet.

    Args:
      description: the model.
      params: its parameters.
      buffers: its buffers.
      tokenizer: ids to text; None prints ids.
      config: decoding settings.

    Raises:
      DecodeError: if the model has not the decoder a mode needs.
    """
    self.config = config or config_lib.DecodeConfig()
    self.description = description
    self.tokenizer = tokenizer
    self.params = params
    self.buffers = buffers
    self.model = u2.U2MoeModel(description.model)
    self.geometry = subsampling.geometry(description.model.encoder.subsampling)
    _require_decoders(self.config, description.model)

  @classmethod
  def from_checkpoint(
    cls,
    path: str | os.PathLike[str],
    *,
    config: config_lib.DecodeConfig | None = None,
  ) -> 'Recognizer':
    """Opens a model directory, a work directory or one of its steps.

    Raises:
      directory.CheckpointError: if there is no checkpoint there.
      DecodeError: if the model has not the decoder a mode needs.
    """
    found = directory.find(path)
    params, buffers = directory.restore(found)
    tokenizer = tokenizer_lib.load(found.tokens) if found.tokens else None
    return cls(
      found.description, params, buffers, tokenizer=tokenizer, config=config
    )

  def with_config(self, config: config_lib.DecodeConfig) -> 'Recognizer':
    """The same model with other decoding settings."""
    return Recognizer(
      self.description,
      self.params,
      self.buffers,
      tokenizer=self.tokenizer,
      config=config,
    )

  def transcribe(
    self, sound: Audio, *, sample_rate: int | None = None
  ) -> Transcript:
    """Transcribes one utterance.

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
  ) -> list[Transcript]:
    """Transcribes waveforms (as `load` gives them), in their order.

    They are sorted by length and padded to few shapes; what one of them gets
    does not depend on the others.
    """
    features = [self.features(waveform) for waveform in waveforms]
    results: list[Transcript | None] = [None] * len(features)
    for batch in self.batches(features):
      for index, transcript in zip(
        batch.indices, self.search(batch), strict=True
      ):
        results[index] = transcript
    return [transcript for transcript in results if transcript is not None]

  def features(self, waveform: np.ndarray) -> np.ndarray:
    """Log-mel frames (T_in, F) of a waveform."""
    return fbank.fbank(waveform, self.description.features)

  def batches(self, features: Sequence[np.ndarray]) -> Iterator[PaddedBatch]:
    """Groups utterances into padded batches of few shapes, shortest first."""
    frame_ms = self.description.features.frame_shift_ms
    for indices, frames, rows in _plan(
      [len(each) for each in features],
      max_frames=int(self.config.batch_seconds * 1000 / frame_ms),
      smallest=self.geometry.window(1),
    ):
      bins = self.description.features.num_mel_bins
      yield _pad(indices, [features[i] for i in indices], frames, rows, bins)

  def search(self, batch: PaddedBatch) -> list[Transcript]:
    """Searches one padded batch; one transcript per utterance of it."""
    found = self._search(batch.features, batch.lengths)
    return list(itertools.islice(found, len(batch.indices)))

  def _search(
    self, features: np.ndarray, lengths: np.ndarray
  ) -> Iterator[Transcript]:
    """Searches one padded batch in the configured mode."""
    config = self.config
    encoded = programs.encode(
      self.model,
      self.params,
      self.buffers,
      jnp.asarray(features),
      jnp.asarray(lengths),
      chunk_size=config.chunk_size,
      left_chunks=config.left_chunks,
      blank_penalty=config.blank_penalty,
    )
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
      )
      yield from self.read(found)
    else:
      yield from self.read(self._search_ctc(encoded))

  def _search_ctc(self, encoded: programs.Encoded) -> hypotheses.Hypotheses:
    blank_id = self.description.model.blank_id
    if self.config.mode == 'ctc_greedy_search':
      return programs.search_greedy(encoded, blank_id=blank_id)
    return programs.search_prefixes(
      encoded, beam=self.config.beam, blank_id=blank_id
    )

  def rescore(
    self, nbest: hypotheses.Hypotheses, frames: jax.Array, mask: jax.Array
  ) -> Iterator[Transcript]:
    """Re-ranks an n-best list by the attention decoders.

    Args:
      nbest: the list, with CTC scores.
      frames: encoder frames (B, T, D).
      mask: real frames (B, T).
    """
    # The decoders' cost goes with the padded length: cut to the longest
    # hypothesis, in steps so that few shapes compile.
    longest = int(np.max(np.asarray(nbest.lengths), initial=0))
    size = -(-max(longest, 1) // _TOKEN_STEP) * _TOKEN_STEP
    nbest = dataclasses.replace(
      nbest,
      tokens=_resize(nbest.tokens, size),
      times=_resize(nbest.times, size),
    )
    rescored = programs.search_rescoring(
      self.model,
      self.params,
      nbest,
      frames,
      mask,
      ctc_weight=self.config.ctc_weight,
      reverse_weight=self.config.reverse_weight,
    )
    confidence = np.asarray(rescored.confidence)[:, 0]
    for transcript, value in zip(self.read(rescored.hypotheses), confidence):
      yield dataclasses.replace(transcript, confidence=float(value))

  def read(self, found: hypotheses.Hypotheses) -> Iterator[Transcript]:
    """Turns arrays into transcripts, one per utterance."""
    found = jax.device_get(found)
    for row in range(found.lengths.shape[0]):
      yield self._read_row(found, row)

  def _read_row(self, found: hypotheses.Hypotheses, row: int) -> Transcript:
    alternatives = []
    for n in range(min(self.config.nbest, found.lengths.shape[1])):
      if n and not np.isfinite(found.scores[row, n]):
        break
      tokens = found.tokens[row, n, : found.lengths[row, n]].tolist()
      score = float(found.scores[row, n])
      alternatives.append(Alternative(self.text(tokens), tuple(tokens), score))
    best = alternatives[0]
    times = found.times[row, 0, : len(best.tokens)]
    features = self.description.features
    seconds = self.geometry.rate * features.frame_shift_ms / 1000
    return Transcript(
      text=best.text,
      tokens=best.tokens,
      score=best.score,
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


def _plan(
  lengths: Sequence[int], *, max_frames: int, smallest: int
) -> Iterator[tuple[list[int], int, int]]:
  """Groups utterances into batches of few shapes, shortest first.

  Yields:
    (indices, padded frames, padded rows).
  """
  padded = [_padded_frames(max(length, smallest)) for length in lengths]
  order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
  start = 0
  while start < len(order):
    frames = padded[order[start]]
    rows = max(1, min(_MAX_ROWS, max_frames // frames))
    indices = [i for i in order[start : start + rows] if padded[i] == frames]
    # A lone utterance keeps a shape of its own, so transcribe() is not
    # charged for empty rows.
    yield indices, frames, 1 if len(order) == 1 else rows
    start += len(indices)


def _padded_frames(length: int) -> int:
  frames = _SHORTEST_FRAMES
  while frames < length:
    frames = int(frames * _LENGTH_GROWTH)
  return frames


def _pad(indices, features, padded_frames, rows, num_bins) -> PaddedBatch:
  batch = np.zeros((rows, padded_frames, num_bins), np.float32)
  lengths = np.zeros((rows,), np.int32)
  for row, frames in enumerate(features):
    batch[row, : len(frames)] = frames
    lengths[row] = len(frames)
  return PaddedBatch(tuple(indices), batch, lengths)


def _resize(array: jax.Array, size: int) -> jax.Array:
  """Cuts or pads (with -1) the last axis."""
  array = array[..., :size]
  missing = size - array.shape[-1]
  widths = [(0, 0)] * (array.ndim - 1) + [(0, missing)]
  return jnp.pad(array, widths, constant_values=-1)
