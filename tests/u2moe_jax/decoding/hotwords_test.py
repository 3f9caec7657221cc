import json
import pathlib

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import hotwords as reference
from tests.reference import prefix_beam as reference_search
from u2moe_jax.decoding import hotwords
from u2moe_jax.decoding import prefix_beam
from u2moe_jax.text import tokenizer as tokenizer_lib

TESTDATA = pathlib.Path(__file__).parents[2] / 'testdata'
TOKENS, FRAMES, BEAM = 5, 8, 3

_search = jax.jit(
  prefix_beam.ctc_prefix_beam_search,
  static_argnames=('beam', 'blank_id', 'finalize'),
)
_advance = jax.jit(prefix_beam.advance, static_argnames='blank_id')
_extend = jax.jit(hotwords.extend)


def _graph(phrases, **options):
  listed = [hotwords.Phrase(tokens, score) for tokens, score in phrases.items()]
  return hotwords.build(listed, vocab_size=TOKENS, **options)


def _walk(graph, tokens):
  """(bonus with loans, loan) after each token."""
  state = hotwords.HotwordState(
    node=jnp.zeros((1,), jnp.int32), bonus=jnp.zeros((1,))
  )
  steps = []
  for token in tokens:
    state = _extend(graph, state, graph.columns[jnp.array([token])])
    state = jax.tree.map(lambda field: field[:, 0], state)
    loan = hotwords.on_loan(graph, state)
    steps.append((float(state.bonus[0]), float(loan[0])))
  return steps


_PHRASES = st.dictionaries(
  st.lists(st.integers(1, TOKENS - 1), min_size=1, max_size=4).map(tuple),
  st.sampled_from([0.5, 1.0, 3.0]),
  min_size=1,
  max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(
  phrases=_PHRASES,
  tokens=st.lists(st.integers(1, TOKENS - 1), min_size=1, max_size=10),
)
def test_the_automaton_equals_comparing_strings(phrases, tokens):
  graph = _graph(phrases)
  for end, (total, loan) in enumerate(_walk(graph, tokens), start=1):
    earned, borrowed = reference.bonus(tokens[:end], phrases)
    assert loan == pytest.approx(borrowed)
    assert total == pytest.approx(earned + borrowed)


def test_a_nested_phrase_counts_but_for_the_reference():
  phrases = {(1, 2, 3): 1.0, (1, 2): 1.0}
  ours = _walk(_graph(phrases), (1, 2))
  theirs = _walk(_graph(phrases, nested_phrases=False), (1, 2))
  assert ours[-1] == (4.0, 2.0)
  assert theirs[-1] == (2.0, 2.0)


def _log_probs(seed, scale=1.0):
  logits = np.random.default_rng(seed).normal(size=(2, FRAMES, TOKENS))
  return jax.nn.log_softmax(jnp.array(scale * logits, jnp.float32))


def _mask(lengths):
  return jnp.arange(FRAMES)[None] < jnp.array(lengths)[:, None]


def _expected(log_probs, phrases):
  """The oracle's list in the intended form, and how clear it is."""
  bonus = lambda prefix: sum(reference.bonus(prefix, phrases))
  found, margin = reference_search.search(
    log_probs, beam=BEAM, blank_id=0, alignment='best', bonus=bonus
  )
  orders = np.array([score + bonus(tokens) for tokens, score, _ in found])
  final = [
    (tokens, score + reference.bonus(tokens, phrases)[0], times)
    for tokens, score, times in found
  ]
  ranked = sorted(final, key=lambda item: -item[1])
  gaps = np.diff([item[1] for item in ranked])
  return ranked, min(
    np.abs(np.diff(orders)).min(initial=np.inf),
    np.abs(gaps).min(initial=np.inf),
    margin,
  )


@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**31),
  scale=st.sampled_from([0.3, 1.5]),
  phrases=_PHRASES,
  lengths=st.tuples(st.integers(0, FRAMES), st.just(FRAMES)),
)
def test_the_search_equals_the_oracle(seed, scale, phrases, lengths):
  log_probs = _log_probs(seed, scale)
  found = jax.tree.map(
    np.asarray,
    _search(
      log_probs, _mask(lengths), beam=BEAM, blank_id=0, graph=_graph(phrases)
    ),
  )
  for row, length in enumerate(lengths):
    expected, clear = _expected(log_probs[row, :length], phrases)
    if clear < 1e-4:
      continue
    for n, (tokens, score, times) in enumerate(expected):
      size = found.lengths[row, n]
      assert found.tokens[row, n, :size].tolist() == tokens
      assert found.times[row, n, :size].tolist() == times
      assert found.scores[row, n] == pytest.approx(score, abs=1e-4)


def test_the_oracle_notices_a_search_without_the_bonus():
  phrases, differ = {(1, 2): 3.0, (3, 3): 3.0}, 0
  for seed in range(6):
    log_probs = _log_probs(seed)
    found = _search(log_probs, _mask([FRAMES] * 2), beam=BEAM, blank_id=0)
    for row in range(2):
      expected, _ = _expected(log_probs[row], phrases)
      size = int(found.lengths[row, 0])
      differ += found.tokens[row, 0, :size].tolist() != expected[0][0]
  assert differ > 4


def test_no_hotword_in_sight_changes_nothing():
  log_probs, mask = _log_probs(1), _mask([FRAMES, 5])
  plain = _search(log_probs, mask, beam=BEAM, blank_id=4)
  # Its first token is the blank, so nothing ever begins it.
  graph = _graph({(4, 4): 2.0})
  with_graph = _search(log_probs, mask, beam=BEAM, blank_id=4, graph=graph)
  np.testing.assert_array_equal(plain.tokens, with_graph.tokens)
  np.testing.assert_array_equal(plain.times, with_graph.times)
  np.testing.assert_allclose(plain.scores, with_graph.scores, atol=1e-5)


def test_chunks_equal_the_whole():
  graph = _graph({(1, 2): 2.0, (2, 3, 1): 1.0})
  log_probs, mask = _log_probs(2), _mask([FRAMES, 5])
  whole = _search(log_probs, mask, beam=BEAM, blank_id=0, graph=graph)
  state = prefix_beam.init_state(
    2, beam=BEAM, max_tokens=FRAMES, with_hotwords=True
  )
  for at in range(0, FRAMES, 2):
    chunk = slice(at, at + 2)
    state = _advance(
      state, log_probs[:, chunk], mask[:, chunk], blank_id=0, graph=graph
    )
  found = prefix_beam.finish(state, graph=graph)
  np.testing.assert_array_equal(whole.tokens, found.tokens)
  np.testing.assert_allclose(whole.scores, found.scores, atol=1e-5)
  with pytest.raises(ValueError, match='needs them at every step'):
    prefix_beam.advance(state, log_probs, mask, blank_id=0)


def test_another_list_compiles_nothing():
  log_probs, mask, traces = _log_probs(3), _mask([FRAMES] * 2), []

  @jax.jit
  def search(graph):
    traces.append(1)
    return prefix_beam.ctc_prefix_beam_search(
      log_probs, mask, beam=BEAM, blank_id=0, graph=graph
    )

  first = search(_graph({(1, 2): 2.0}))
  second = search(_graph({(3,): 9.0, (4, 1, 2): 1.0, (2, 2): 3.0}))
  assert len(traces) == 1
  assert (first.tokens[:, 0] != second.tokens[:, 0]).any()


@pytest.mark.parametrize('kind', ['peaky', 'flat'])
def test_equals_the_reference_in_both_forms(kind):
  arrays = np.load(TESTDATA / 'search_golden.npz')
  golden = json.loads((TESTDATA / 'search_context_golden.json').read_text())
  phrases = [
    hotwords.Phrase(tuple(tokens), golden['context_score'])
    for tokens in golden['context_phrases']
  ]
  graph = hotwords.build(phrases, vocab_size=40, nested_phrases=False)
  log_probs = jnp.array(arrays[f'logp_{kind}'])
  mask = jnp.arange(60)[None] < jnp.array(arrays['lens'])[:, None]
  for finalize in ('replace', 'add'):
    found = jax.tree.map(
      np.asarray,
      _search(
        log_probs, mask, beam=3, blank_id=0, graph=graph, finalize=finalize
      ),
    )
    for row, case in enumerate(golden[f'{kind}.beam3.context']):
      bonus = (
        np.array(case['nbest_context_bonus_before_finalize'])
        if finalize == 'add'
        else 0.0
      )
      scores = (
        np.array(case['nbest_ctc_only_scores'])
        + bonus
        + np.array(case['nbest_finalize_score'])
      )
      order = range(len(scores))
      if finalize == 'add':
        order = np.argsort(-scores, kind='stable')
      for n, place in enumerate(order):
        size = found.lengths[row, n]
        assert found.tokens[row, n, :size].tolist() == case['nbest'][place]
      np.testing.assert_allclose(
        found.scores[row], scores[list(order)], atol=1e-3
      )


def _tokenizer():
  return tokenizer_lib.build_char_tokenizer(['abc de'])


def _load(tmp_path, text):
  path = tmp_path / 'words.txt'
  path.write_text(text, encoding='utf-8')
  tokenizer = _tokenizer()
  return hotwords.load(
    path, tokenizer, score=2.0, vocab_size=tokenizer.vocab_size
  )


def test_a_file_gives_phrases_and_their_scores(tmp_path):
  graph = _load(tmp_path, 'ab\n\nc d\t5\n')
  ids = _tokenizer().encode
  assert _walk(graph, ids('ab'))[-1] == (8.0, 4.0)  # earned and on loan
  assert _walk(graph, ids('c d'))[-1] == (30.0, 15.0)
  assert _walk(graph, ids('a'))[-1] == (2.0, 2.0)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('ab\nxay\n', "words.txt, line 2: 'xay' has characters .* x y"),
    ('ab\tmuch\n', "line 1: score 'much' must be a positive number"),
    ('ab\t-1\n', "line 1: score '-1' must be a positive number"),
    ('\n', 'no phrase in it'),
    ('\t3\n', "line 1: '' cannot be written"),
  ],
)
def test_bad_lists_are_refused(tmp_path, text, message):
  with pytest.raises(hotwords.HotwordError, match=message):
    _load(tmp_path, text)


def test_a_missing_file_and_a_strange_token_are_refused(tmp_path):
  with pytest.raises(hotwords.HotwordError, match='cannot be read'):
    hotwords.load(tmp_path / 'none', _tokenizer(), score=1.0, vocab_size=9)
  with pytest.raises(hotwords.HotwordError, match='ids below 5'):
    _graph({(7,): 1.0})
