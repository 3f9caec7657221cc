"""Multiply-adds are those of the formulas, and of chosen experts only."""

import dataclasses

import pytest

from experiments.benchmarks import harness
from experiments.benchmarks import operations
from u2moe_jax import config as config_lib
from u2moe_jax.layers import subsampling

_INPUTS = 103


def _config(**moe):
  config = harness.experiment('tiny').model
  none = config_lib.MoeConfig(**moe)
  return dataclasses.replace(
    config,
    encoder=dataclasses.replace(config.encoder, moe=none),
    decoder=dataclasses.replace(config.decoder, moe=none),
  )


def test_encoder_is_the_sum_of_its_products():
  config = _config()
  width, hidden = config.encoder.model_dim, config.encoder.ffn_dim
  frames = operations.num_frames(config, _INPUTS)
  bins = [9, 4]  # behind each of two 3 x 3 convolutions of stride 2
  heights = [(_INPUTS - 1) // 2, frames]
  convolutions = heights[0] * bins[0] * 9 * width
  convolutions += heights[1] * bins[1] * 9 * width**2
  each = bins[1] * width * width + width * config.vocab_size
  block = 2 * 2 * width * hidden  # two feed-forward layers
  block += 4 * width**2 + 2 * frames * width  # attention
  block += 3 * width**2  # pointwise, twice the width and back
  position = frames * width  # scores of key positions
  each += config.encoder.num_blocks * block
  expected = 2 * (convolutions + frames * each)
  found = operations.encode(config, batch=1, num_inputs=_INPUTS)
  # Some small products (positions, the depthwise kernel) are left out above.
  assert found == pytest.approx(expected, rel=0.15)
  assert found > expected - position
  twice = operations.encode(config, batch=2, num_inputs=_INPUTS)
  assert twice == pytest.approx(2 * found, rel=0.02)


def test_chunks_are_the_utterance_and_their_left_context():
  config = _config()
  size, rounds = 4, 6

  def chunks(left_chunks):
    return rounds * operations.chunk(
      config, batch=2, chunk_size=size, left_chunks=left_chunks
    )

  geometry = subsampling.geometry(config.encoder.subsampling)
  num_inputs = geometry.window(size * rounds)
  whole = operations.encode(config, batch=2, num_inputs=num_inputs)
  # Windows overlap, and attention sees `left_chunks` of them.
  assert 0.8 * whole < chunks(rounds - 1) < 1.5 * whole
  # For each frame of left context: scores, values, positions and their scores.
  width, blocks = config.encoder.model_dim, config.encoder.num_blocks
  more = chunks(2) - chunks(1)
  one = 2 * 2 * 2 * rounds * size * size * width * blocks
  assert 2 * one <= more <= 4 * one


def test_experts_beyond_the_first_are_added():
  dense = operations.encode(_config(), batch=1, num_inputs=_INPUTS)
  one, two = (
    operations.encode(
      _config(num_experts=4, top_k=k), batch=1, num_inputs=_INPUTS
    )
    for k in (1, 2)
  )
  config = _config()
  width, hidden = config.encoder.model_dim, config.encoder.ffn_dim
  frames = operations.num_frames(config, _INPUTS)
  layers = 2 * config.encoder.num_blocks
  assert one - dense == 2 * frames * layers * width * 4  # routers
  assert two - one == 2 * frames * layers * 2 * width * hidden
  # How many there are to choose from costs next to nothing.
  more = _config(num_experts=8, top_k=2)
  many = operations.encode(more, batch=1, num_inputs=_INPUTS)
  assert many - two == one - dense


def test_a_step_is_three_passes_and_the_decoders():
  config = _config(num_experts=4, top_k=2)
  sizes = {'batch': 2, 'num_inputs': _INPUTS}
  whole = operations.train(config, **sizes, labels=5)
  encoder = 3 * operations.encode(config, **sizes)
  assert whole > 1.05 * encoder
  assert operations.train(config, **sizes, labels=11) > whole


def test_a_share_of_the_peak(monkeypatch):
  monkeypatch.setitem(operations._PEAK_SIZE, 'cpu', 64)
  peak = operations.peak('float32')
  operations.peak.cache_clear()  # it was that of a small product
  monkeypatch.setattr(operations, 'peak', lambda _: peak)
  found = operations.record(peak / 4, 0.5, dtype='float32')
  # There are eight devices where tests run.
  assert found['mfu'] == pytest.approx(0.5 / 8, abs=1e-3)
  assert found['gflop'] == pytest.approx(peak / 4e9, rel=1e-2)
