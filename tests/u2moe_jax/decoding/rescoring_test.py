import json
import pathlib

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import rescoring as reference
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import rescoring

TESTDATA = pathlib.Path(__file__).parents[2] / 'testdata'
NBEST, SIZE, TOKENS, EOS = 4, 3, 6, 5

_rescore = jax.jit(
  rescoring.attention_rescoring,
  static_argnames=('eos_id', 'ctc_weight', 'reverse_weight'),
)


def _nbest(lists, scores):
  """Hypotheses from token lists, whose times are 10, 11, ..."""
  size = max(SIZE, *(len(tokens) for row in lists for tokens in row))
  pad = lambda items: [*items, *[-1] * (size - len(items))]
  times = [[pad(range(10, 10 + len(t))) for t in row] for row in lists]
  return hypotheses.Hypotheses(
    tokens=jnp.array([[pad(tokens) for tokens in row] for row in lists]),
    lengths=jnp.array([[len(tokens) for tokens in row] for row in lists]),
    scores=jnp.array(scores, jnp.float32),
    times=jnp.array(times),
    margin=jnp.full((len(lists),), jnp.inf),
  )


def _random_case(seed):
  random = np.random.default_rng(seed)
  lists = [
    [random.integers(0, TOKENS, size=random.integers(0, SIZE + 1)).tolist()
     for _ in range(NBEST)]
    for _ in range(2)
  ]  # fmt: skip
  scores = -np.sort(random.random((2, NBEST)) * 5, axis=1)
  shape = (2, 2, NBEST, SIZE + 1, TOKENS)
  logits = jnp.array(random.normal(size=shape), jnp.float32)
  l2r, r2l = jax.nn.log_softmax(logits)
  return lists, scores, l2r, r2l


@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 2**31),
  weights=st.sampled_from([(0.0, 0.0), (0.5, 0.3), (0.3, 1.0)]),
)
def test_equals_the_oracle(seed, weights):
  lists, scores, l2r, r2l = _random_case(seed)
  ctc_weight, reverse_weight = weights
  found = _rescore(
    _nbest(lists, scores), l2r, r2l, eos_id=EOS, ctc_weight=ctc_weight,
    reverse_weight=reverse_weight,
  )  # fmt: skip
  for row in range(2):
    expected = reference.rescore(
      lists[row], scores[row], np.asarray(l2r[row]), np.asarray(r2l[row]),
      eos_id=EOS, ctc_weight=ctc_weight, reverse_weight=reverse_weight,
    )  # fmt: skip
    totals = np.array([item['score'] for item in expected])
    if (totals[:-1] - totals[1:]).min() < 1e-4:
      continue
    np.testing.assert_allclose(found.hypotheses.scores[row], totals, atol=1e-4)
    np.testing.assert_allclose(
      found.margin[row], totals[0] - totals[1], atol=1e-4
    )
    for n, item in enumerate(expected):
      size = len(item['tokens'])
      tokens = found.hypotheses.tokens[row, n]
      assert found.hypotheses.lengths[row, n] == size
      assert tokens.tolist() == item['tokens'] + [-1] * (SIZE - size)
      for name in ('confidence', 'l2r', 'ctc'):
        np.testing.assert_allclose(
          getattr(found, name)[row, n], item[name], atol=1e-4
        )
      np.testing.assert_allclose(
        found.r2l[row, n], item['r2l'] if reverse_weight else 0.0, atol=1e-4
      )
      padded = [*item['token_confidence'], *[0.0] * (SIZE - size)]
      np.testing.assert_allclose(
        found.token_confidence[row, n], padded, atol=1e-5
      )


def test_reading_the_reverse_decoder_forwards_is_noticed():
  lists, scores, l2r, r2l = _random_case(1)
  run = lambda backward: _rescore(
    _nbest(lists, scores), l2r, backward, eos_id=EOS, ctc_weight=0.5,
    reverse_weight=0.5,
  )  # fmt: skip
  straight, turned = run(r2l), run(r2l[:, :, ::-1])
  assert (jnp.abs(straight.r2l - turned.r2l) > 1e-3).any()


def test_token_scores_are_enough():
  lists, scores, l2r, r2l = _random_case(2)
  nbest = _nbest(lists, scores)
  parts = []
  for log_probs, reverse in ((l2r, False), (r2l, True)):
    _, targets = rescoring.decoder_inputs(
      nbest.tokens, nbest.lengths, sos_id=0, eos_id=EOS, reverse=reverse
    )
    parts.append(rescoring.token_scores(log_probs, targets))
  weights = {'ctc_weight': 0.3, 'reverse_weight': 0.5}
  lean = rescoring.combine(nbest, *parts, **weights)
  full = rescoring.attention_rescoring(nbest, l2r, r2l, eos_id=EOS, **weights)
  jax.tree.map(np.testing.assert_array_equal, lean, full)


def test_decoder_inputs_turn_each_hypothesis_by_itself():
  nbest = _nbest([[[1, 2, 3], [4], []]], [[0.0, -1.0, -2.0]])
  inputs, targets = rescoring.decoder_inputs(
    nbest.tokens, nbest.lengths, sos_id=8, eos_id=9, reverse=True
  )
  assert inputs.tolist() == [[[8, 3, 2, 1], [8, 4, 9, 9], [8, 9, 9, 9]]]
  assert targets.tolist() == [[[3, 2, 1, 9], [4, 9, -1, -1], [9, -1, -1, -1]]]


def test_padding_changes_nothing():
  lists, scores, l2r, r2l = _random_case(3)
  nbest = _nbest(lists, scores)
  _, targets = rescoring.decoder_inputs(
    nbest.tokens, nbest.lengths, sos_id=0, eos_id=EOS
  )
  run = lambda forward, backward: _rescore(
    nbest, forward, backward, eos_id=EOS, ctc_weight=0.5, reverse_weight=0.5
  )
  beyond = (targets < 0)[..., None]
  padded = run(jnp.where(beyond, jnp.nan, l2r), jnp.where(beyond, jnp.nan, r2l))
  jax.tree.map(np.testing.assert_array_equal, run(l2r, r2l), padded)
  within = run(jnp.where(beyond, l2r, l2r - 1), r2l)
  assert (within.l2r < run(l2r, r2l).l2r.min(axis=1, keepdims=True)).any()


def test_without_weight_the_reverse_decoder_is_not_asked():
  lists, scores, l2r, r2l = _random_case(4)
  nbest = _nbest(lists, scores)
  weights = {'eos_id': EOS, 'ctc_weight': 0.5}
  without = _rescore(nbest, l2r, None, reverse_weight=0.0, **weights)
  ignored = _rescore(nbest, l2r, r2l, reverse_weight=0.0, **weights)
  jax.tree.map(np.testing.assert_array_equal, without, ignored)
  with pytest.raises(ValueError, match='right-to-left'):
    _rescore(nbest, l2r, None, reverse_weight=0.3, **weights)


def test_the_first_of_equals_wins_and_empty_slots_stay_last():
  lists = [[[1], [2], [3], []]] * 2
  scores = [[-1.0, -1.0, -1.0, -np.inf], [0.0, -np.inf, -np.inf, -np.inf]]
  zeros = jnp.zeros((2, NBEST, SIZE + 1, TOKENS))
  found = _rescore(
    _nbest(lists, scores), zeros, None, eos_id=EOS, ctc_weight=0.0,
    reverse_weight=0.0,
  )  # fmt: skip
  assert found.hypotheses.tokens[0, :, 0].tolist() == [1, 2, 3, -1]
  assert found.hypotheses.scores[1].tolist() == [0.0] + [-np.inf] * 3
  assert found.margin.tolist() == [0.0, np.inf]


@pytest.mark.parametrize('weights', ['0.5,0.3', '0.3,0.5', '0.0,0.0'])
def test_equals_the_reference(weights):
  golden = json.loads((TESTDATA / 'search_golden.json').read_text())
  cases = golden['rescoring']
  lists = [case['nbest'] for case in cases]
  nbest = _nbest(lists, [case['ctc'] for case in cases])
  # The reference reports sums; here they stand on the end of the sequence.
  shape = (*nbest.tokens.shape[:2], nbest.tokens.shape[2] + 1)
  on_end = lambda name: (
    jnp.zeros(shape).at[:, :, -1].set(jnp.array([case[name] for case in cases]))
  )
  ctc_weight, reverse_weight = (float(part) for part in weights.split(','))
  found = rescoring.combine(
    nbest, on_end('l2r'), on_end('r2l'), ctc_weight=ctc_weight,
    reverse_weight=reverse_weight,
  )  # fmt: skip
  for row, case in enumerate(cases):
    best = case['best'][weights]
    size = len(best['tokens'])
    assert found.hypotheses.tokens[row, 0, :size].tolist() == best['tokens']
    np.testing.assert_allclose(
      found.hypotheses.scores[row, 0], best['score'], atol=1e-3
    )
    np.testing.assert_allclose(
      found.confidence[row, 0], best['confidence'], atol=1e-5
    )
