"""Streams in one batch: each gets what it would get alone, and nothing grows."""

import jax
import numpy as np
import pytest

from experiments.wiring import timing
from tests.reference import tiny_recognizer
from u2moe_jax import config as config_lib
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import sessions
from u2moe_jax.frontend import audio

RATE = tiny_recognizer.RATE
# Four chunks of 0.16 s; the tiny model is never silent.
RULES = config_lib.EndpointConfig(max_seconds=0.7)


@pytest.fixture(scope='module')
def recognizer():
  return tiny_recognizer.make(
    tiny_recognizer.model_config(),
    chunk_size=4,
    left_chunks=2,
    reverse_weight=0.0,  # a decoder less to compile
    endpoint=RULES,
  )


@pytest.fixture(scope='module')
def searcher(recognizer):
  return tiny_recognizer.changed(recognizer, mode='ctc_prefix_beam_search')


def _alone(recognizer, sound, **options):
  pool = sessions.Sessions(recognizer, slots=1, **options)
  stream = pool.open()
  part = stream.accept(sound)
  return [*part.segments, *stream.finish()]


def _assert_same(found, expected):
  assert len(found) == len(expected)
  for ours, theirs in zip(found, expected, strict=True):
    assert (ours.start, ours.end) == (theirs.start, theirs.end)
    assert ours.reason == theirs.reason
    assert ours.transcript.text == theirs.transcript.text
    assert ours.transcript.times == theirs.transcript.times
    np.testing.assert_allclose(
      ours.transcript.score, theirs.transcript.score, atol=1e-4
    )


SOUNDS = tiny_recognizer.sounds([1.13, 0.5, 0.9, 1.4, 0.7])
# Round in which each joins, and samples it is fed a round: some nothing.
JOINS = (0, 0, 3, 4, 7)
PIECES = (1600, 800, 3000, 5000, 1999)


def _together(recognizer, *, endpoints, forget=False):
  """Five streams through three slots."""
  pool = sessions.Sessions(recognizer, slots=3, endpoints=endpoints)
  found = {number: [] for number in range(len(SOUNDS))}
  waiting, running = list(found), {}
  for turn in range(100):
    for number in list(waiting):
      if JOINS[number] <= turn and len(running) < 3:
        running[number] = (
          pool.open(),
          iter(
            np.split(
              SOUNDS[number], range(0, len(SOUNDS[number]), PIECES[number])
            )
          ),
        )  # the first piece is empty
        waiting.remove(number)
        if forget:
          pool._fresh[:] = False
    for stream, pieces in running.values():
      piece = next(pieces, None)
      stream.close() if piece is None else stream.feed(piece)
    while pool.step():
      pass
    for number, (stream, _) in list(running.items()):
      found[number] += stream.read().segments
      if stream.closed:
        found[number] += running.pop(number)[0].finish()
  assert not waiting
  assert not running
  return found


@pytest.mark.parametrize('endpoints', [False, True])
def test_each_gets_what_it_would_get_alone(searcher, endpoints):
  found = _together(searcher, endpoints=endpoints)
  for number, segments in found.items():
    alone = _alone(searcher, SOUNDS[number], endpoints=endpoints)
    _assert_same(segments, alone)
  assert (len(found[0]) > 1) == endpoints
  assert len({s[0].transcript.text for s in found.values()}) > 2


def test_a_slot_that_is_not_cleared_is_noticed(searcher):
  found = _together(searcher, endpoints=True, forget=True)
  alone = _alone(searcher, SOUNDS[4])
  with pytest.raises(AssertionError):
    _assert_same(found[4], alone)


def test_bad_sound_of_one_leaves_the_others_alone(searcher):
  pool = sessions.Sessions(searcher, slots=3)
  good, bad, silent = pool.open(), pool.open(), pool.open()
  with pytest.raises(recognizer_lib.DecodeError, match='all 3 slots'):
    pool.open()
  segments = {good: [], bad: []}
  for pieces in zip(np.array_split(SOUNDS[0], 6), np.array_split(SOUNDS[3], 6)):
    for stream, piece in zip((good, bad), pieces, strict=True):
      stream.feed(piece)
    for worse in (np.full(1600, np.nan), np.full((2, 2, 2), 0.5)):
      with pytest.raises(audio.AudioError):
        bad.feed(worse.astype(np.float32))
    silent.feed(np.zeros(0, np.float32))
    while pool.step():
      pass
    for stream in segments:
      segments[stream] += stream.read().segments
  for stream in segments:
    segments[stream] += stream.finish()
  _assert_same(segments[good], _alone(searcher, SOUNDS[0]))
  # It goes on as if the bad samples had not come.
  _assert_same(segments[bad], _alone(searcher, SOUNDS[3]))
  assert silent.finish() == ()


def test_one_that_leaves_without_a_result_makes_room(searcher):
  pool = sessions.Sessions(searcher, slots=1)
  first = pool.open()
  first.feed(SOUNDS[3])
  pool.step()
  first.leave()
  second = pool.open()
  part = second.accept(SOUNDS[1])
  _assert_same([*part.segments, *second.finish()], _alone(searcher, SOUNDS[1]))
  first.leave()  # twice is no error


def test_nothing_compiles_after_warming_up(recognizer, searcher, monkeypatch):
  monkeypatch.setattr(sessions, '_NODE_ROOMS', (16,))
  pool = sessions.Sessions(recognizer, slots=2)
  timing.num_compilations()
  pool.warm_up()
  before = timing.num_compilations()
  for number in (0, 3):
    first, second = pool.open(), pool.open()
    for piece in np.array_split(SOUNDS[number], 5):
      first.accept(piece)
      second.accept(piece[:100])
    assert first.finish()
    second.finish()
  assert timing.num_compilations() == before
  # Another number of rows is another program: the count can fail.
  _alone(tiny_recognizer.changed(searcher, beam=3), SOUNDS[1])
  assert timing.num_compilations() > before


def test_a_cache_of_everything_doubles_and_says_so(searcher, monkeypatch):
  monkeypatch.setattr(sessions, '_FIRST_ROOM', 4)
  said = []
  monkeypatch.setattr(
    sessions.logging, 'warning', lambda text, *args: said.append(text % args)
  )
  model = tiny_recognizer.changed(searcher, left_chunks=-1)
  pool = sessions.Sessions(model, slots=2)
  pool.warm_up()
  before = timing.num_compilations()
  stream = pool.open()
  part = stream.accept(SOUNDS[3])
  found = [*part.segments, *stream.finish()]
  # 4, 8 and 16 frames.
  assert timing.num_compilations() - before == len(said) == 2
  assert all('compiles' in line for line in said)
  other = pool.open()
  other.accept(SOUNDS[3])
  other.finish()
  assert len(said) == 2
  monkeypatch.setattr(sessions, '_FIRST_ROOM', 256)
  _assert_same(found, _alone(model, SOUNDS[3]))


def test_hours_do_not_grow_and_say_what_their_segments_say(recognizer):
  sound = np.tile(SOUNDS[0], 9)
  pool = sessions.Sessions(recognizer, slots=1)
  stream = pool.open()
  found, sizes = [], set()
  for piece in np.array_split(sound, 60):
    found += stream.accept(piece).segments
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(pool._state))
    sizes.add(held)
    assert len(stream._pending) < pool._window
    assert not stream._segments
  found += stream.finish()
  assert len(sizes) == 1
  assert len(found) == 16  # 9 x 1.13 s in segments of at most 0.64 s
  assert found[0].start == 0.0
  assert found[-1].end == len(sound) / RATE
  assert len({each.transcript.text for each in found}) > 3
  frame = recognizer.frame_seconds
  for segment, following in zip(found, [*found[1:], None]):
    first = round(segment.start / frame)
    if following is None:
      begin, end = recognizer.sound_of(first, first + 1)[0], len(sound)
    else:
      assert segment.end == following.start
      last = round(following.start / frame)
      begin, end = recognizer.sound_of(first, last)
    alone = recognizer.transcribe(sound[begin:end], sample_rate=RATE)
    assert segment.transcript.text == alone.text
    np.testing.assert_allclose(
      np.array(segment.transcript.times) - segment.start,
      alone.times,
      atol=1e-3,
    )
    np.testing.assert_allclose(segment.transcript.score, alone.score, atol=1e-4)


def test_silence_ends_segments_where_the_rules_say(searcher):
  """All is silent to a threshold that every frame passes."""
  rules = config_lib.EndpointConfig(
    silence_after_speech=0.3, blank_threshold=1e-30
  )
  model = tiny_recognizer.changed(searcher, endpoint=rules)
  found = _alone(model, SOUNDS[3])
  assert [each.reason for each in found[:-1]] == (
    ['silence_after_speech'] * (len(found) - 1)
  )
  np.testing.assert_allclose(
    [each.end - each.start for each in found[:-1]], 0.32, atol=1e-6
  )
  assert len(found) >= 4
  whole = _alone(model, SOUNDS[3], endpoints=False)
  assert [each.reason for each in whole] == ['end']


def test_requests_that_cannot_be_served_say_why(searcher):
  error = recognizer_lib.DecodeError
  with pytest.raises(error, match='slots=0'):
    sessions.Sessions(searcher, slots=0)
  pool = sessions.Sessions(searcher, slots=1)
  stream = pool.open()
  with pytest.raises(error, match='before the streams join'):
    pool.warm_up()
  with pytest.raises(error, match='16000 Hz, not 8000'):
    stream.feed(SOUNDS[0], sample_rate=8000)
  stream.close()
  with pytest.raises(error, match='after finish'):
    stream.feed(SOUNDS[0])
  assert stream.finish() == ()
  with pytest.raises(error, match='finish\\(\\) twice'):
    stream.finish()
