"""Captions keep every word and their limits; files are as their formats say."""

import itertools

import hypothesis
from hypothesis import strategies as st
import pytest

from u2moe_jax.text import captions
from u2moe_jax.text import words

_WORDS = st.lists(
  st.tuples(
    st.sampled_from(['A', 'BANANA', '你', 'DD']),
    st.floats(0, 2),
    st.floats(0.01, 1),
  ),
  max_size=20,
)


def _timed(items):
  """(text, pause in front, duration) to words."""
  now, found = 0.0, []
  for text, pause, duration in items:
    found.append(words.TimedWord(text, now + pause, now + pause + duration))
    now = found[-1].end
  return found


@hypothesis.settings(deadline=None)
@hypothesis.given(_WORDS)
def test_every_word_is_shown_once_within_the_limits(items):
  spoken = _timed(items)
  shown = captions.captions(
    spoken, max_characters=12, max_seconds=3.0, pause=0.8
  )
  assert words.split(words.join(c.text for c in shown)) == [
    w.text for w in spoken
  ]
  for caption in shown:
    count = len(words.split(caption.text))
    assert count == 1 or len(caption.text) <= 12
    assert count == 1 or caption.end - caption.start <= 3.0
  for before, after in itertools.pairwise(shown):
    assert before.end <= after.start


@pytest.mark.parametrize(('pause', 'count'), [(0.7, 1), (0.9, 2)])
def test_a_pause_ends_a_caption(pause, count):
  spoken = _timed([('A', 0.0, 0.5), ('B', pause, 0.5)])
  assert len(captions.captions(spoken)) == count


def test_srt():
  shown = [
    captions.Caption(0.0, 1.25, 'ONE'),
    captions.Caption(3599.9996, 3661.5, 'TWO'),
  ]
  assert captions.srt(shown) == (
    '1\n00:00:00,000 --> 00:00:01,250\nONE\n\n'
    '2\n01:00:00,000 --> 01:01:01,500\nTWO\n'
  )
  assert captions.srt([]) == ''


def test_vtt_escapes_what_would_be_markup():
  shown = [captions.Caption(0.5, 1.0, 'A < B & C --> D')]
  assert captions.vtt(shown) == (
    'WEBVTT\n\n00:00:00.500 --> 00:00:01.000\nA &lt; B &amp; C --&gt; D\n'
  )


def test_ctm():
  spoken = [
    words.TimedWord('ONE', 0.5, 0.75, 0.9),
    words.TimedWord('TWO', 0.75, 1.0),
  ]
  assert list(captions.ctm('key', spoken)) == [
    'key 1 0.500 0.250 ONE 0.900',
    'key 1 0.750 0.250 TWO',
  ]
