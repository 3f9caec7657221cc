import json
import pathlib

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import ctc as paths
from tests.reference import prefix_beam as reference
from u2moe_jax.decoding import greedy
from u2moe_jax.decoding import prefix_beam

TESTDATA = pathlib.Path(__file__).parents[2] / 'testdata'
FRAMES, TOKENS = 8, 5

_search = jax.jit(
  prefix_beam.ctc_prefix_beam_search,
  static_argnames=('beam', 'blank_id', 'max_tokens', 'alignment'),
)
_advance = jax.jit(prefix_beam.advance, static_argnames='blank_id')


def _log_probs(seed, *, scale=1.5, shape=(3, FRAMES, TOKENS)):
  """Random posteriors; half of the frames repeat the one before, nearly."""
  random = np.random.default_rng(seed)
  logits = random.normal(size=shape) * scale
  repeats = random.random(shape[:2]) < 0.5
  for time in range(1, shape[1]):
    again = repeats[:, time, None]
    logits[:, time] = np.where(again, logits[:, time - 1], logits[:, time])
  logits += random.normal(size=shape) * 0.1
  return jax.nn.log_softmax(jnp.array(logits, jnp.float32))


def _mask(lengths, size=FRAMES):
  return jnp.arange(size)[None] < jnp.array(lengths)[:, None]


def _read(found, row):
  """One row as [(tokens, score, times)], checking the padding."""
  found = jax.tree.map(np.asarray, found)
  results = []
  for n, length in enumerate(found.lengths[row]):
    if found.scores[row, n] == -np.inf:
      assert length == 0
    assert (found.tokens[row, n, length:] == -1).all()
    assert (found.times[row, n, length:] == -1).all()
    if found.scores[row, n] > -np.inf:
      results.append((
        found.tokens[row, n, :length].tolist(),
        found.scores[row, n],
        found.times[row, n, :length].tolist(),
      ))  # fmt: skip
  return results


def _assert_equal(found, expected, atol=1e-4):
  assert [item[0] for item in found] == [item[0] for item in expected]
  assert [item[2] for item in found] == [item[2] for item in expected]
  np.testing.assert_allclose(
    [item[1] for item in found], [item[1] for item in expected], atol=atol
  )


def _is_clear(expected, margin):
  """Whether rounding cannot change the result."""
  scores = np.array([item[1] for item in expected])
  return min(margin, (scores[:-1] - scores[1:]).min(initial=np.inf)) > 1e-4


@pytest.mark.parametrize('beam', [1, 3, 8])  # 8 is more than there are tokens
@settings(max_examples=20, deadline=None)
@given(
  seed=st.integers(0, 2**31),
  scale=st.sampled_from([0.3, 1.5, 4.0]),
  lengths=st.lists(st.integers(0, FRAMES), min_size=3, max_size=3),
  alignment=st.sampled_from(['reference', 'best']),
)
def test_equals_the_oracle(beam, seed, scale, lengths, alignment):
  log_probs = _log_probs(seed, scale=scale)
  found = _search(
    log_probs, _mask(lengths), beam=beam, blank_id=0, alignment=alignment
  )
  for row, length in enumerate(lengths):
    expected, margin = reference.search(
      log_probs[row, :length], beam=beam, blank_id=0, alignment=alignment
    )
    if _is_clear(expected, margin):
      _assert_equal(_read(found, row), expected)
      np.testing.assert_allclose(found.margin[row], margin, atol=1e-4)


def test_the_oracle_notices_a_search_that_does_not_merge():
  differ = 0
  for seed in range(5):
    log_probs = _log_probs(seed)
    found = _search(log_probs, _mask([FRAMES] * 3), beam=3, blank_id=0)
    for row in range(3):
      broken, _ = reference.search(
        log_probs[row], beam=3, blank_id=0, merge=False
      )
      best = _read(found, row)[0]
      differ += abs(best[1] - broken[0][1]) > 1e-3 or best[0] != broken[0][0]
  assert differ > 10


def test_the_two_alignments_differ_somewhere():
  times = [
    _search(
      _log_probs(seed, scale=0.3), _mask([FRAMES] * 3), beam=8, blank_id=0,
      alignment=alignment,
    ).times.tolist()
    for alignment in ('reference', 'best')
    for seed in range(5)
  ]  # fmt: skip
  assert times[:5] != times[5:]


def _tiny(seed=0):
  return _log_probs(seed, shape=(2, 4, 3))


def test_scores_and_times_equal_brute_force():
  # 31 prefixes of 2 tokens fit into 4 frames; 25 of them have an alignment.
  log_probs = _tiny()
  found = _search(
    log_probs, _mask([4, 3], 4), beam=32, blank_id=1, alignment='best'
  )
  for row, length in enumerate([4, 3]):
    exact = np.asarray(log_probs[row, :length], np.float64)
    every = paths.prefixes(exact, blank_id=1)
    expected = [(list(k), score, t) for k, (score, t) in every.items()]
    expected.sort(key=lambda item: -item[1])
    _assert_equal(_read(found, row), expected, atol=1e-5)
    np.testing.assert_allclose(np.exp(found.scores[row]).sum(), 1.0, atol=1e-5)
    assert found.margin[row] < jnp.inf  # of the first two; none was dropped


def test_brute_force_notices_a_search_that_forgets_its_parents(monkeypatch):
  monkeypatch.setattr(
    prefix_beam, '_parents', lambda beams: jnp.full_like(beams.last, -1)
  )
  broken = prefix_beam.ctc_prefix_beam_search(
    _tiny(), _mask([4, 4], 4), beam=8, blank_id=1
  )
  tokens = [tuple(item[0]) for item in _read(broken, 0)]
  assert len(set(tokens)) < len(tokens)  # one prefix, several beams


@pytest.mark.parametrize('kind', ['peaky', 'flat'])
@pytest.mark.parametrize('beam', [1, 3, 10])
def test_equals_the_reference(kind, beam):
  arrays = np.load(TESTDATA / 'search_golden.npz')
  golden = json.loads((TESTDATA / 'search_golden.json').read_text())
  log_probs = jnp.array(arrays[f'logp_{kind}'])
  mask = _mask(arrays['lens'], log_probs.shape[1])
  found = _search(log_probs, mask, beam=beam, blank_id=0, alignment='reference')
  for row, case in enumerate(golden[f'{kind}.beam{beam}']):
    expected = list(
      zip(case['nbest'], case['nbest_scores'], case['nbest_times'], strict=True)
    )
    _assert_equal(_read(found, row), expected, atol=1e-3)


def test_beam_1_equals_greedy_on_peaky_posteriors():
  mask = _mask([FRAMES, 5, 0])
  peaky = _log_probs(1, scale=60.0)
  found = _search(peaky, mask, beam=1, blank_id=0)
  best_path = greedy.ctc_greedy_search(peaky, mask, blank_id=0)
  np.testing.assert_array_equal(found.tokens, best_path.tokens)
  np.testing.assert_array_equal(found.times, best_path.times)
  np.testing.assert_allclose(found.scores, best_path.scores, atol=1e-4)
  flat = _log_probs(1, scale=0.3)
  found = _search(flat, mask, beam=8, blank_id=0)
  best_path = greedy.ctc_greedy_search(flat, mask, blank_id=0)
  assert (found.tokens[:, 0] != best_path.tokens[:, 0]).any()


def test_padding_changes_nothing():
  log_probs = _log_probs(2)
  lengths = [FRAMES - 1, 4, 1]
  before = _search(log_probs, _mask(lengths), beam=3, blank_id=0)
  garbage = jnp.where(_mask(lengths)[..., None], log_probs, jnp.nan)
  after = _search(garbage, _mask(lengths), beam=3, blank_id=0)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  one_more = _search(
    log_probs, _mask([n + 1 for n in lengths]), beam=3, blank_id=0
  )
  assert (jnp.abs(one_more.scores - before.scores)[:, 0] > 1e-3).all()


def test_batch_mates_change_nothing():
  log_probs, mask = _log_probs(3), _mask([FRAMES, 6, 3])
  together = _search(log_probs, mask, beam=3, blank_id=0)
  order = jnp.array([2, 0, 1])
  turned = _search(log_probs[order], mask[order], beam=3, blank_id=0)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[order], b), together, turned
  )
  alone = _search(log_probs[:1], mask[:1], beam=3, blank_id=0)
  _assert_equal(_read(alone, 0), _read(together, 0), atol=1e-5)


def _start():
  return prefix_beam.init_state(3, beam=3, max_tokens=FRAMES)


def test_chunks_equal_the_whole():
  log_probs, mask = _log_probs(4), _mask([FRAMES, 5, 0])
  whole = _advance(_start(), log_probs, mask, blank_id=0)
  chunked = _start()
  for at in range(0, FRAMES, 2):
    chunk = slice(at, at + 2)
    chunked = _advance(chunked, log_probs[:, chunk], mask[:, chunk], blank_id=0)
  found = prefix_beam.finish(chunked)
  jax.tree.map(np.testing.assert_array_equal, prefix_beam.finish(whole), found)
  restarted = _advance(
    _advance(_start(), log_probs[:, :2], mask[:, :2], blank_id=0),
    log_probs[:, 4:6],
    mask[:, 4:6],
    blank_id=0,
  )
  assert (prefix_beam.finish(restarted).scores != found.scores)[:2, 0].all()


def test_steps_equal_the_whole_and_gaps_are_skipped():
  log_probs = _log_probs(5)
  valid = jnp.array([1, 0, 1, 1, 0, 1, 1, 1], bool)
  mask = jnp.stack([valid, ~valid, jnp.zeros_like(valid)])
  stepper = jax.jit(prefix_beam.step, static_argnames='blank_id')
  state = _start()
  for time in range(FRAMES):
    state = stepper(state, log_probs[:, time], mask[:, time], blank_id=0)
  found = prefix_beam.finish(state)
  whole = prefix_beam.finish(_advance(_start(), log_probs, mask, blank_id=0))
  jax.tree.map(np.testing.assert_array_equal, whole, found)
  packed, _ = reference.search(
    np.asarray(log_probs)[0, np.asarray(valid)], beam=3, blank_id=0
  )
  _assert_equal(_read(found, 0), packed)
  assert _read(found, 2) == [([], 0.0, [])]


def test_the_state_does_not_grow():
  shapes = jax.eval_shape(_start)
  after = jax.eval_shape(
    lambda state, *frames: prefix_beam.advance(state, *frames, blank_id=0),
    shapes,
    jax.ShapeDtypeStruct((3, 100, TOKENS), jnp.float32),
    jax.ShapeDtypeStruct((3, 100), bool),
  )
  assert after == shapes


def test_no_frames_leave_the_state_alone():
  empty = prefix_beam.advance(
    _start(), jnp.zeros((3, 0, TOKENS)), jnp.zeros((3, 0), bool), blank_id=0
  )
  jax.tree.map(np.testing.assert_array_equal, _start(), empty)
  assert _read(prefix_beam.finish(empty), 1) == [([], 0.0, [])]


def test_max_tokens_limits_the_length_and_nothing_else():
  log_probs, mask = _log_probs(6), _mask([FRAMES, 5, 2])
  free = _search(log_probs, mask, beam=3, blank_id=0)
  longest = int(free.lengths.max())
  limited = _search(log_probs, mask, beam=3, blank_id=0, max_tokens=2)
  assert longest > 2
  assert limited.tokens.shape == (3, 3, 2)
  assert limited.lengths.max() == 2
  _assert_equal(_read(limited, 2), _read(free, 2), atol=0)


def test_impossible_tokens_are_never_found():
  log_probs = _log_probs(7).at[:, :, 2].set(-jnp.inf)
  found = _search(log_probs, _mask([FRAMES] * 3), beam=8, blank_id=0)
  assert not jnp.isnan(found.scores).any()
  assert (found.tokens != 2).all()
  expected, _ = reference.search(log_probs[0], beam=8, blank_id=0)
  _assert_equal(_read(found, 0), expected)
  nothing = _search(
    jnp.full_like(log_probs, -jnp.inf), _mask([FRAMES] * 3), beam=3, blank_id=0
  )
  assert (nothing.scores == -jnp.inf).all()
  assert (nothing.lengths == 0).all()


def test_long_utterances_keep_their_digits():
  # 3,000 frames; a plain float32 sum is off by 3e-3 here.
  log_probs = _log_probs(8, scale=1.0, shape=(1, 3000, 1000))
  found = prefix_beam.finish(
    _advance(
      prefix_beam.init_state(1, beam=1, max_tokens=3000),
      log_probs,
      jnp.ones((1, 3000), bool),
      blank_id=0,
    )
  )
  expected, _ = reference.search(log_probs[0], beam=1, blank_id=0)
  assert abs(expected[0][1]) > 1e4
  np.testing.assert_allclose(found.scores[0, 0], expected[0][1], atol=1e-3)


@pytest.mark.parametrize('frames', [6, 75])  # as one, and cut for all cores
def test_top_tokens_of_a_large_vocabulary_are_the_same(frames):
  assert (2 * frames >= 16 * prefix_beam._CPU_PART_ROWS) == (frames > 6)
  values = np.random.default_rng(0).normal(size=(2, frames, 1003))
  values = jnp.array(values, jnp.float32)
  values = values.at[0, 0].set(jnp.round(values[0, 0] * 4))  # many ties
  values = values.at[0, 1].set(0.0)
  for count in (1, 10):
    expected = lax.top_k(values, count)
    found = prefix_beam._top_tokens(values, count)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1][0, 1:], expected[1][0, 1:])
    np.testing.assert_array_equal(found[1][1], expected[1][1])
    picked = jnp.take_along_axis(values, found[1], axis=-1)
    np.testing.assert_array_equal(picked, expected[0])


def test_hashes_tell_prefixes_apart():
  seeds = jnp.array([[0x243F6A88, 0x85A308D3]], jnp.uint32)
  tokens = jnp.arange(60)
  hashes = seeds
  for _ in range(3):  # 216,000 prefixes of three tokens
    grown = jnp.repeat(hashes, 60, axis=0)
    hashes = prefix_beam._extend_hash(grown, jnp.tile(tokens, len(hashes)))
  lanes = np.asarray(hashes).astype(np.uint64)
  assert len(np.unique(lanes[:, 0] << np.uint64(32) | lanes[:, 1])) == 60**3
  for lane in range(2):  # a random function of 32 bits has 5.4 pairs here
    assert 60**3 - len(np.unique(lanes[:, lane])) < 25
