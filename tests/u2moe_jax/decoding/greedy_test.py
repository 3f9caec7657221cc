import json
import pathlib

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import ctc as reference
from u2moe_jax.decoding import greedy

TESTDATA = pathlib.Path(__file__).parents[2] / 'testdata'

_search = jax.jit(greedy.ctc_greedy_search, static_argnames='blank_id')


def _log_probs(seed, shape=(3, 7, 4)):
  logits = np.random.default_rng(seed).normal(size=shape) * 2
  return jax.nn.log_softmax(jnp.array(logits, jnp.float32))


def _mask(lengths, size):
  return jnp.arange(size)[None] < jnp.array(lengths)[:, None]


@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**31),
  lengths=st.lists(st.integers(0, 7), min_size=3, max_size=3),
  blank_id=st.sampled_from([0, 3]),
)
def test_equals_grouping_the_best_tokens(seed, lengths, blank_id):
  log_probs = _log_probs(seed)
  found = _search(log_probs, _mask(lengths, 7), blank_id=blank_id)
  for row, length in enumerate(lengths):
    frames = np.asarray(log_probs[row, :length])
    path = frames.argmax(axis=-1) if length else []
    tokens, _, last = reference.collapse(path, blank_id=blank_id)
    size = len(tokens)
    assert found.lengths[row, 0] == size
    assert found.tokens[row, 0].tolist() == tokens + [-1] * (7 - size)
    assert found.times[row, 0].tolist() == last + [-1] * (7 - size)
    top = np.sort(frames, axis=-1)[:, ::-1]
    np.testing.assert_allclose(found.scores[row, 0], top[:, 0].sum(), atol=1e-5)
    margin = (top[:, 0] - top[:, 1]).min(initial=np.inf)
    np.testing.assert_allclose(found.margin[row], margin, atol=1e-6)


def test_what_is_masked_changes_nothing():
  log_probs = _log_probs(0)
  mask = _mask([5, 7, 0], 7)
  before = _search(log_probs, mask, blank_id=0)
  garbage = jnp.where(mask[..., None], log_probs, jnp.nan)
  after = _search(garbage, mask, blank_id=0)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  unmasked = _search(log_probs, _mask([7, 7, 7], 7), blank_id=0)
  assert (unmasked.scores[:, 0] != before.scores[:, 0]).tolist() == [
    True,
    False,
    True,
  ]


@pytest.mark.parametrize('kind', ['peaky', 'flat'])
def test_equals_the_reference(kind):
  arrays = np.load(TESTDATA / 'search_golden.npz')
  golden = json.loads((TESTDATA / 'search_golden.json').read_text())
  log_probs = jnp.array(arrays[f'logp_{kind}'])
  mask = _mask(arrays['lens'], log_probs.shape[1])
  found = _search(log_probs, mask, blank_id=0)
  for row, tokens in enumerate(golden[f'{kind}.greedy']):
    assert found.tokens[row, 0, : found.lengths[row, 0]].tolist() == tokens
