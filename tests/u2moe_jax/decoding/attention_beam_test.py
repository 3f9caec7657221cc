import dataclasses
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


def _step(weights, inputs, cache):
  """Goes on from the state of each hypothesis' ancestor."""
  before = inputs.ancestry[:, :, inputs.position - 1]  # of little use at 0
  states = cache[:, jnp.maximum(inputs.position - 1, 0)]  # [B, N, W]
  states = jnp.take_along_axis(states, before[..., None], axis=1)
  first = weights['start'][:, None]  # [B, 1, W]
  states = jnp.where(inputs.position == 0, first, states)
  states = jnp.tanh(
    states @ weights['recurrent']
    + weights['embedding'][inputs.tokens]
    + 0.1 * inputs.position
  )
  logits = states @ weights['output'] + weights['bias'][None, None]
  return attention_beam.StepOutputs(
    log_probs=jax.nn.log_softmax(logits),
    cache=cache.at[:, inputs.position].set(states),
    margin=jnp.full(inputs.tokens.shape, jnp.inf),
  )


def _grow(cache, room):
  return jnp.pad(cache, ((0, 0), (0, room - cache.shape[1]), (0, 0), (0, 0)))


@functools.partial(jax.jit, static_argnames=('beam', 'max_steps', 'nbest'))
def _search(weights, max_lengths, **options):
  return _run(functools.partial(_step, weights), max_lengths, **options)


def _run(
  step, max_lengths, *, beam, length_penalty=0.0, max_steps=STEPS, nbest=None
):
  batch = len(max_lengths)
  return attention_beam.attention_beam_search(
    step,
    _grow,
    jnp.zeros((batch, 0, beam, WIDTH)),
    batch=batch,
    beam=beam,
    sos_id=SOS,
    eos_id=EOS,
    max_lengths=max_lengths,
    max_steps=max_steps,
    length_penalty=length_penalty,
    nbest=nbest,
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


@pytest.mark.parametrize('nbest', [1, 2])
def test_stopping_early_changes_nothing_that_is_wanted(nbest):
  stopped = 0
  for seed in range(6):
    weights = Decoder(seed, end=1.0).weights()
    lengths = jnp.array([STEPS, 3, STEPS])
    whole = _search(weights, lengths, beam=4)
    early = _search(weights, lengths, beam=4, nbest=nbest)
    for row in range(BATCH):
      assert _read(early, row)[:nbest] == _read(whole, row)[:nbest]
    stopped += (early.scores[:, nbest:] != whole.scores[:, nbest:]).any()
    # With a penalty a longer one may still win: nothing may stop early.
    penalised = [
      _search(weights, lengths, beam=4, length_penalty=0.5, nbest=n)
      for n in (nbest, None)
    ]
    jax.tree.map(np.testing.assert_array_equal, *penalised)
  assert stopped > 0


def test_more_steps_than_needed_change_nothing():
  weights, lengths = Decoder(6).weights(), jnp.array([2, 5, 4])
  tight = _search(weights, lengths, beam=3)
  loose = _search(weights, lengths, beam=3, max_steps=STEPS + 3)
  np.testing.assert_array_equal(tight.tokens, loose.tokens[:, :, :STEPS])
  np.testing.assert_array_equal(tight.scores, loose.scores)
  cut = _search(weights, lengths, beam=3, max_steps=1)
  assert cut.lengths.max() == 1


@pytest.mark.parametrize('rooms', [[2, 4, STEPS], [1, STEPS]])
def test_room_that_grows_changes_nothing(rooms, monkeypatch):
  weights, lengths = Decoder(10, end=-4.0).weights(), jnp.array([2, 6, 4])
  at_once = _search(weights, lengths, beam=3)
  monkeypatch.setattr(attention_beam, '_rooms', lambda _: rooms)
  step = functools.partial(_step, weights)
  jax.tree.map(
    np.testing.assert_array_equal, at_once, _run(step, lengths, beam=3)
  )
  # Room that does not reach to the end cuts the texts.
  monkeypatch.setattr(attention_beam, '_rooms', lambda _: rooms[:1])
  assert _run(step, lengths, beam=3).lengths.max() == rooms[0]


@pytest.mark.parametrize(
  ('steps', 'rooms'),
  [(0, []), (1, [1]), (64, [64]), (65, [17, 65]), (1500, [24, 94, 375, 1500])],
)
def test_rooms_end_at_the_limit(steps, rooms):
  assert attention_beam._rooms(steps) == rooms


def test_an_ancestry_that_does_not_follow_its_hypothesis_is_noticed():
  weights, lengths = Decoder(7, end=-4.0).weights(), jnp.full((BATCH,), STEPS)
  found = _search(weights, lengths, beam=3)

  def mix_up(inputs, cache):
    wrong = jnp.roll(inputs.ancestry, 1, axis=1)
    return _step(weights, dataclasses.replace(inputs, ancestry=wrong), cache)

  mixed = _run(mix_up, lengths, beam=3)
  assert (mixed.scores != found.scores).any(axis=1).all()


def test_the_margin_counts_gaps_inside_the_decoder_while_they_matter():
  weights, lengths = Decoder(12, end=-4.0).weights(), jnp.array([2, 6, 4])
  plain = _search(weights, lengths, beam=3)

  def with_gap(inputs, cache, at):
    said = _step(weights, inputs, cache)
    gap = jnp.where(inputs.position == at, 1e-6, jnp.inf)
    return dataclasses.replace(
      said, margin=jnp.full(said.margin.shape, 1.0) * gap
    )

  early, late = (
    _run(functools.partial(with_gap, at=at), lengths, beam=3).margin
    for at in (0, 4)
  )
  np.testing.assert_allclose(early, 1e-6)
  # Only the second utterance is still running then.
  np.testing.assert_allclose(late, plain.margin.at[1].set(1e-6))


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
