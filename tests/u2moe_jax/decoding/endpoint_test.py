"""Endpoint rules: what ends a segment, and where a recording is cut."""

import itertools

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.decoding import endpoint

FRAME = 0.04
RULES = config_lib.EndpointConfig(
  silence_after_speech=0.4, long_silence=0.8, max_seconds=2.0
)


def _first(pattern, *, words, config=RULES, chunk=1):
  """The reason that ends `pattern` (s: silent, x: not) and after how much."""
  rules = endpoint.Endpointer(config, FRAME)
  for start in range(0, len(pattern), chunk):
    piece = pattern[start : start + chunk]
    blank = np.array([0.9 if c == 's' else 0.1 for c in piece])
    reason = rules.accept(blank, has_words=words, coming=chunk)
    if reason is not None:
      return reason, start + len(piece)
  return None


@pytest.mark.parametrize(
  ('pattern', 'words', 'expected'),
  [
    ('x' * 5 + 's' * 9, True, None),
    ('x' * 5 + 's' * 10, True, ('silence_after_speech', 15)),
    ('x' * 5 + 's' * 10, False, None),
    ('s' * 19, False, None),
    ('s' * 20, False, ('long_silence', 20)),
    ('s' * 9 + 'x' + 's' * 9, True, None),  # a token begins it anew
    ('x' * 49, True, None),
    ('x' * 60, True, ('max_seconds', 50)),
    ('x' * 60, False, ('max_seconds', 50)),
  ],
)
def test_rules(pattern, words, expected):
  assert _first(pattern, words=words) == expected


def test_chunks_are_asked_at_their_ends_and_never_too_long():
  pattern = 'x' * 5 + 's' * 11
  assert _first(pattern, words=True, chunk=4) == ('silence_after_speech', 16)
  # 48 of 50 frames: another chunk of 4 would not fit.
  assert _first('x' * 60, words=True, chunk=4) == ('max_seconds', 48)
  assert endpoint.max_frames(RULES, frame_seconds=FRAME, chunk_size=4) == 48
  assert endpoint.max_frames(RULES, frame_seconds=FRAME, chunk_size=64) == 64
  default = config_lib.EndpointConfig()
  assert endpoint.max_frames(default, frame_seconds=FRAME) == 500


def test_rules_can_be_switched_off():
  never = config_lib.EndpointConfig(
    silence_after_speech=0, long_silence=0, max_seconds=100.0
  )
  assert _first('x' + 's' * 2000, words=True, config=never) is None
  loud = config_lib.EndpointConfig(blank_threshold=0.95, max_seconds=100.0)
  assert _first('x' + 's' * 2000, words=True, config=loud) is None


@pytest.mark.parametrize(
  'changes',
  [
    {'silence_after_speech': -1.0},
    {'long_silence': float('nan')},
    {'max_seconds': 0.0},
    {'max_seconds': float('inf')},
    {'blank_threshold': 0.0},
    {'blank_threshold': 1.5},
  ],
)
def test_rules_out_of_range_are_named(changes):
  (key,) = changes
  with pytest.raises(config_lib.ConfigError, match=rf'decode\.endpoint\.{key}'):
    config_lib.EndpointConfig(**changes)


def _cut(blank, config=RULES):
  return endpoint.cut(blank, blank < 0.5, config, frame_seconds=FRAME)


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.lists(st.tuples(st.floats(0, 1), st.integers(1, 30)), max_size=30)
)
def test_segments_are_the_recording_and_none_is_too_long(runs):
  blank = np.concatenate([np.full(n, p) for p, n in runs] or [np.zeros(0)])
  segments = _cut(blank)
  edges = [0, *(end for _, end in segments)]
  assert segments == list(itertools.pairwise(edges))
  assert edges[-1] == len(blank)
  assert all(0 < end - start <= 50 for start, end in segments)


def test_a_recording_is_cut_amid_the_silence():
  speech, silence = np.full(20, 0.1), np.full(12, 0.9)
  blank = np.concatenate([speech, silence, speech, silence, speech])
  # At 10 silent frames, of which the following segment gets the half.
  assert _cut(blank) == [(0, 25), (25, 57), (57, 84)]
  # Long silence leaves half a second, and is not cut into crumbs.
  quiet = np.concatenate([np.full(120, 0.9), speech])
  rules = config_lib.EndpointConfig(long_silence=2.0, max_seconds=10.0)
  assert _cut(quiet, rules) == [(0, 38), (38, 76), (76, 140)]


def test_what_is_too_long_is_cut_where_it_is_most_quiet():
  blank = np.full(80, 0.1)
  blank[10:16] = 0.9  # in the first half: too early
  blank[40:44] = 0.85
  blank[47] = 0.95  # shorter
  assert _cut(blank)[0] == (0, 42)
  blank[40:48] = 0.1
  blank[33] = 0.3  # no silence: the most probable blank
  assert _cut(blank)[0] == (0, 33)
