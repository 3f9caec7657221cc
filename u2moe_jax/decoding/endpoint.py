"""Endpoint rules: where speech is cut into segments.

A frame is silent if CTC's blank has at least `blank_threshold`. A segment ends
at the first of

  1. silence after speech: something was recognised, and since then it has been
     silent for `silence_after_speech` seconds;
  2. long silence: silent for `long_silence` seconds, words or none;
  3. maximum length: no more fits into `max_seconds`.

The rules see numbers only. A stream asks them after every chunk; `cut` does
the same for a recording that is already there, and can look for a better place.
"""

import dataclasses
from typing import Literal

import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float

Reason = Literal['silence_after_speech', 'long_silence', 'max_seconds', 'end']

# Seconds to frames without the rounding of a division: 20 / 0.04 is 500.
_TOLERANCE = 1e-6
# Most silence that `cut` leaves to the segment behind.
_LEAD_SECONDS = 0.5


def max_frames(
  config: config_lib.EndpointConfig,
  *,
  frame_seconds: float,
  chunk_size: int = 1,
) -> int:
  """Frames of the longest segment: whole chunks, at least one."""
  frames = int(config.max_seconds / frame_seconds + _TOLERANCE)
  return max(frames // chunk_size, 1) * chunk_size


@dataclasses.dataclass
class Endpointer:
  """The rules over one segment.

  Attributes:
    config: the rules.
    frame_seconds: seconds per frame.
    frames: heard so far.
    silent: silent ones at their end.
  """

  config: config_lib.EndpointConfig
  frame_seconds: float
  frames: int = 0
  silent: int = 0

  def accept(
    self,
    blank: Float[np.ndarray, 'T'],
    *,
    has_words: bool,
    coming: int = 1,
  ) -> Reason | None:
    """Takes the next frames, and says which rule ends the segment, if any.

    Args:
      blank: probability of the blank at each of them.
      has_words: whether anything was recognised in the segment so far.
      coming: frames of the next step; the segment ends if they do not fit.
    """
    # Silence is counted across chunks: that at the end of the last one goes on
    # until something loud comes.
    loud = np.flatnonzero(np.asarray(blank) < self.config.blank_threshold)
    self.frames += len(blank)
    self.silent += len(blank)
    if len(loud):
      self.silent = len(blank) - 1 - int(loud[-1])
    config = self.config
    if has_words and self._lasts(config.silence_after_speech):
      return 'silence_after_speech'
    if self._lasts(config.long_silence):
      return 'long_silence'
    # A segment is whole chunks, so it ends before one that would not fit.
    limit = max_frames(config, frame_seconds=self.frame_seconds)
    return 'max_seconds' if self.frames + coming > limit else None

  def _lasts(self, seconds: float) -> bool:
    """Whether it has been silent that long; 0 seconds switch a rule off."""
    silent = self.silent * self.frame_seconds
    return 0 < seconds <= silent + _TOLERANCE


def cut(
  blank: Float[np.ndarray, 'T'],
  is_token: Bool[np.ndarray, 'T'],
  config: config_lib.EndpointConfig,
  *,
  frame_seconds: float,
) -> list[tuple[int, int]]:
  """Cuts a recording that is already there into segments.

  The same rules decide that a segment ends; but since what follows is known,
  it ends in the middle of the silence, at most half a second before its end,
  so that both sides keep some. One that is too long ends in the middle of the
  longest silence of its second half, or, without any, at the frame there that
  is most probably blank.

  Args:
    blank: probability of the blank at each frame.
    is_token: frames whose most probable token is not the blank.
    config: the rules.
    frame_seconds: seconds per frame.

  Returns:
    (start, end) of each segment in frames; together they are the recording.
  """
  segments, start = [], 0
  while start < len(blank):
    end = _first_end(blank, is_token, config, start, frame_seconds)
    segments.append((start, end))
    start = end
  return segments


def _first_end(
  blank: Float[np.ndarray, 'T'],
  is_token: Bool[np.ndarray, 'T'],
  config: config_lib.EndpointConfig,
  start: int,
  frame_seconds: float,
) -> int:
  rules = Endpointer(config, frame_seconds)
  has_words = False
  for at in range(start, len(blank)):
    has_words |= bool(is_token[at])
    # Frame by frame: a chunk would let a segment end only at its edges.
    reason = rules.accept(blank[at : at + 1], has_words=has_words)
    if reason == 'max_seconds' and at + 1 < len(blank):
      # So what is cut off is at least half as long as it may be.
      half = start + max(rules.frames // 2, 1)
      return _quiet_place(blank, config, half, at + 1)
    if reason in ('silence_after_speech', 'long_silence'):
      lead = min(rules.silent // 2, int(_LEAD_SECONDS / frame_seconds))
      # At least one frame, or `cut` would never come to the end.
      return max(at + 1 - lead, start + 1)
  return len(blank)


def _quiet_place(
  blank: Float[np.ndarray, 'T'],
  config: config_lib.EndpointConfig,
  first: int,
  last: int,
) -> int:
  """Where to cut between two frames: amid the longest silence, if any."""
  if last <= first:
    return first
  silent = blank[first:last] >= config.blank_threshold
  # Padded with a loud frame on both sides, so every run has a begin and an end.
  edges = np.flatnonzero(np.diff(np.pad(silent.astype(np.int8), 1)))
  runs = edges.reshape(-1, 2)  # [runs, (begin, end)]
  if not len(runs):
    return first + int(np.argmax(blank[first:last]))
  begin, end = runs[np.argmax(runs[:, 1] - runs[:, 0])]
  return first + (int(begin) + int(end)) // 2
