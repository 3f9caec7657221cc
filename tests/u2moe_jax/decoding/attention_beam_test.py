import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import attention_beam as reference
from u2moe_jax.decoding import attention_beam

BATCH, TOKENS, WIDTH, STEPS = 3, 5, 6, 6
SOS, EOS = 4, 2


class Decoder:
  """A recurrent decoder: what it says depends on all tokens so far."""

  def __init__(self, seed, batch=BATCH, vocabulary=TOKENS, end=0.0):
    random = np.random.default_rng(seed)
    self.start = random.normal(size=(batch, WIDTH)).astype(np.float32)
    self.embedding = random.normal(size=(vocabulary, WIDTH)).astype(np.float32)
    self.recurrent = random.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    self.output = random.normal(size=(WIDTH, vocabulary)).astype(np.float32) * 2
    self.bias = np.zeros((vocabulary,), np.float32)
    self.bias[EOS] = end

  def weights(self):
    return jax.tree.map(jnp.array, vars(self))

  def log_probs(self, tokens, *, row):
    """What follows `tokens` in one utterance; for the oracle."""
    state = self.start[row]
    for position, token in enumerate((SOS, *tokens)):
      state = np.tanh(
        state @ self.recurrent + self.embedding[token] + 0.1 * position
      )
    logits = state @ self.output + self.bias
    return (logits - np.log(np.exp(logits).sum())).astype(np.float64)


def _step(weights, tokens, position, cache):
  state = jnp.tanh(
    cache['state'] @ weights['recurrent']
    + weights['embedding'][tokens]
    + 0.1 * position
  )
  logits = state @ weights['output'] + weights['bias'][None]
  return jax.nn.log_softmax(logits), {'state': state}


@functools.partial(
  jax.jit, static_argnames=('beam', 'length_penalty', 'max_steps')
)
def _search(weights, max_lengths, *, beam, length_penalty=0.0, max_steps=STEPS):
  batch = weights['start'].shape[0]
  return attention_beam.attention_beam_search(
    functools.partial(_step, weights),
    {'state': jnp.repeat(weights['start'], beam, axis=0)},
    batch=batch,
    beam=beam,
    sos_id=SOS,
    eos_id=EOS,
    max_lengths=max_lengths,
    max_steps=max_steps,
    length_penalty=length_penalty,
  )


def _read(found, row):
  found = jax.tree.map(np.asarray, found)
  results = []
  for n, length in enumerate(found.lengths[row]):
    tokens = found.tokens[row, n]
    assert (tokens[length:] == -1).all()
    results.append((tokens[:length].tolist(), found.scores[row, n]))
  return [item for item in results if item[1] > -np.inf]


def _is_clear(expected):
  scores = np.array([score for _, score in expected])
  return (scores[:-1] - scores[1:]).min(initial=np.inf) > 1e-4


@pytest.mark.parametrize(('beam', 'penalty'), [(1, 0.0), (3, 0.0), (7, 0.6)])
@settings(max_examples=20, deadline=None)
@given(
  seed=st.integers(0, 2**31),
  end=st.sampled_from([-4.0, 0.0, 2.0]),
  lengths=st.lists(st.integers(0, STEPS), min_size=BATCH, max_size=BATCH),
)
def test_equals_the_oracle(beam, penalty, seed, end, lengths):
  decoder = Decoder(seed, end=end)
  found = _search(
    decoder.weights(), jnp.array(lengths), beam=beam, length_penalty=penalty
  )
  assert (found.times == -1).all()
  for row, length in enumerate(lengths):
    expected = reference.search(
      functools.partial(decoder.log_probs, row=row),
      beam=beam,
      eos_id=EOS,
      max_length=length,
      length_penalty=penalty,
    )
    expected = [item for item in expected if item[1] > -np.inf]
    if _is_clear(expected) and found.margin[row] > 1e-4:
      results = _read(found, row)
      assert [item[0] for item in results] == [item[0] for item in expected]
      np.testing.assert_allclose(
        [item[1] for item in results], [item[1] for item in expected], atol=1e-4
      )


def test_a_wide_beam_finds_the_best_of_all():
  beaten = 0
  for seed in range(4):
    decoder = Decoder(seed, batch=1, vocabulary=5)
    found = _search(decoder.weights(), jnp.array([4]), beam=125, max_steps=4)
    tokens, score = reference.exhaustive(
      functools.partial(decoder.log_probs, row=0),
      vocabulary=5,
      eos_id=EOS,
      max_length=4,
    )
    assert _read(found, 0)[0][0] == tokens
    np.testing.assert_allclose(found.scores[0, 0], score, atol=1e-4)
    narrow = _search(decoder.weights(), jnp.array([4]), beam=1, max_steps=4)
    beaten += narrow.scores[0, 0] < found.scores[0, 0] - 1e-3
  assert beaten > 0


def test_batch_mates_change_nothing():
  decoder = Decoder(5, end=-4.0)
  weights = decoder.weights()
  lengths = jnp.array([2, 6, 4])
  together = _search(weights, lengths, beam=3)
  for row in range(BATCH):
    alone = _search(
      weights | {'start': weights['start'][row : row + 1]},
      lengths[row : row + 1],
      beam=3,
    )
    for ours, theirs in zip(_read(alone, 0), _read(together, row), strict=True):
      assert ours[0] == theirs[0]
      np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
  # The reference stops with the batch: its form is the longest length for all.
  padded = _search(weights, jnp.full((BATCH,), 6), beam=3)
  assert (padded.lengths[0] > together.lengths[0]).all()


def test_more_steps_than_needed_change_nothing():
  weights, lengths = Decoder(6).weights(), jnp.array([2, 5, 4])
  tight = _search(weights, lengths, beam=3)
  loose = _search(weights, lengths, beam=3, max_steps=STEPS + 3)
  np.testing.assert_array_equal(tight.tokens, loose.tokens[:, :, :STEPS])
  np.testing.assert_array_equal(tight.scores, loose.scores)
  cut = _search(weights, lengths, beam=3, max_steps=1)
  assert cut.lengths.max() == 1


def test_a_cache_that_does_not_follow_its_hypothesis_is_noticed():
  weights, lengths = Decoder(7, end=-4.0).weights(), jnp.full((BATCH,), STEPS)
  found = _search(weights, lengths, beam=3)

  def mix_up(tokens, position, cache):
    log_probs, cache = _step(weights, tokens, position, cache)
    rows = cache['state'].reshape(BATCH, 3, WIDTH)
    return log_probs, {'state': jnp.roll(rows, 1, axis=1).reshape(-1, WIDTH)}

  mixed = attention_beam.attention_beam_search(
    mix_up,
    {'state': jnp.repeat(weights['start'], 3, axis=0)},
    batch=BATCH,
    beam=3,
    sos_id=SOS,
    eos_id=EOS,
    max_lengths=lengths,
    max_steps=STEPS,
  )
  assert (mixed.scores != found.scores).any(axis=1).all()


def test_an_empty_result_is_found_and_loses_under_a_penalty():
  weights = Decoder(8, end=6.0).weights()
  lengths = jnp.full((BATCH,), STEPS)
  free = _search(weights, lengths, beam=3)
  assert (free.lengths[:, 0] == 0).all()
  assert (free.scores[:, 0] < 0).all()
  penalised = _search(weights, lengths, beam=3, length_penalty=1.0)
  assert (penalised.lengths[:, 0] > 0).all()
  assert not jnp.isnan(penalised.scores).any()


def test_length_zero_gives_nothing():
  found = _search(Decoder(9).weights(), jnp.zeros((BATCH,), jnp.int32), beam=3)
  assert (found.lengths == 0).all()
  assert found.scores[:, 0].tolist() == [0.0] * BATCH
  assert (found.scores[:, 1:] == -jnp.inf).all()
