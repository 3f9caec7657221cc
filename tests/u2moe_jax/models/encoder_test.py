"""Streaming is the masked pass; padding and batch mates change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import tiny
from u2moe_jax.layers import subsampling
from u2moe_jax.models import cache as cache_lib

_CHUNK = 3
_CONFIGS = {
  'dense': {},
  'moe': {'experts': tiny.moe()},
  'conv2d8_moe': {'experts': tiny.moe(), 'subsampling': 'conv2d8'},
  'rope': {'position': 'rope_pos'},
}


class _Encoder:
  """A tiny encoder, compiled once per shape."""

  def __init__(self, **options):
    self.config = tiny.model_config(decoders=0, **options)
    self.model, self.params, self.buffers = tiny.init(self.config)
    self.geometry = subsampling.geometry(self.config.encoder.subsampling)
    self.full = jax.jit(self._full)
    self.chunk = jax.jit(self._chunk)

  def _full(self, features, lengths, chunk_size, left_chunks):
    return self.model.apply(
      {'params': self.params},
      features,
      lengths,
      self.buffers,
      chunk_size=chunk_size,
      left_chunks=left_chunks,
      method='encode',
    )

  def _chunk(self, features, num_valid, cache):
    return self.model.apply(
      {'params': self.params},
      features,
      num_valid,
      self.buffers,
      cache,
      method='encode_chunk',
    )

  def masked(self, features, lengths, chunk_size=-1, left_chunks=-1):
    return self.full(
      features, lengths, jnp.asarray(chunk_size), jnp.asarray(left_chunks)
    )

  def stream(self, features, lengths, *, capacity):
    """All chunks of several streams; shorter ones end earlier."""
    total = np.array(self.geometry.output_length(np.asarray(lengths)))
    cache = cache_lib.init_cache(
      self.config.encoder, batch=len(total), capacity=capacity
    )
    window = self.geometry.window(_CHUNK)
    pieces, caches = [], []
    for start in range(0, int(max(total)), _CHUNK):
      at = start * self.geometry.rate
      piece = features[:, at : at + window]
      lack = window - piece.shape[1]
      piece = np.pad(piece, ((0, 0), (0, lack), (0, 0)))
      num_valid = np.clip(total - start, 0, _CHUNK).astype(np.int32)
      output, cache = self.chunk(piece, num_valid, cache)
      pieces.append(np.asarray(output.frames))
      caches.append(cache)
    return np.concatenate(pieces, axis=1), caches


@functools.cache
def _encoder(name):
  return _Encoder(**_CONFIGS[name])


@pytest.fixture(params=_CONFIGS)
def encoder(request):
  return _encoder(request.param)


_BATCH = tiny.batch((79, 61, 40), (1, 1, 1))


def _assert_real(output, actual, expected, rows=slice(None)):
  mask = np.asarray(output.mask)[rows]
  np.testing.assert_allclose(
    np.asarray(actual)[rows][:, : mask.shape[1]][mask],
    np.asarray(expected)[rows][:, : mask.shape[1]][mask],
    atol=2e-5,
  )


@pytest.mark.parametrize('left', [-1, 1])
def test_streaming_is_the_masked_pass(encoder, left):
  output = encoder.masked(_BATCH.features, _BATCH.feature_lengths, _CHUNK, left)
  capacity = _CHUNK * left if left >= 0 else 21
  frames, _ = encoder.stream(
    _BATCH.features, _BATCH.feature_lengths, capacity=capacity
  )
  _assert_real(output, frames, output.frames)


def test_streaming_with_no_left_context():
  encoder = _encoder('moe')
  output = encoder.masked(_BATCH.features, _BATCH.feature_lengths, _CHUNK, 0)
  frames, _ = encoder.stream(
    _BATCH.features, _BATCH.feature_lengths, capacity=0
  )
  _assert_real(output, frames, output.frames)


def test_streaming_with_other_left_context_differs():
  encoder = _encoder('dense')
  output = encoder.masked(_BATCH.features, _BATCH.feature_lengths, _CHUNK, -1)
  frames, _ = encoder.stream(
    _BATCH.features, _BATCH.feature_lengths, capacity=_CHUNK
  )
  with pytest.raises(AssertionError):
    _assert_real(output, frames, output.frames)


def test_a_stream_in_a_batch_is_the_stream_alone():
  encoder = _encoder('moe')
  together, _ = encoder.stream(
    _BATCH.features, _BATCH.feature_lengths, capacity=_CHUNK
  )
  for row in range(3):
    length = _BATCH.feature_lengths[row : row + 1]
    features = _BATCH.features[row : row + 1, : length[0]]
    alone, _ = encoder.stream(features, length, capacity=_CHUNK)
    count = int(encoder.geometry.output_length(length)[0])
    np.testing.assert_allclose(
      alone[0, :count], together[row, :count], atol=2e-5
    )


def test_a_stream_that_hears_nothing_keeps_its_cache():
  encoder = _encoder('moe')
  _, caches = encoder.stream(
    _BATCH.features, _BATCH.feature_lengths, capacity=_CHUNK
  )
  before, after = caches[-2], caches[-1]
  ended = 2  # the shortest utterance; the longest is still running
  for name in ('key', 'value', 'convolution'):
    old, new = getattr(before, name), getattr(after, name)
    np.testing.assert_array_equal(old[:, ended], new[:, ended])
    assert np.abs(old[:, 0] - new[:, 0]).max() > 1e-3
  assert after.offset[ended] == before.offset[ended]
  np.testing.assert_array_equal(
    after.offset, encoder.geometry.output_length(_BATCH.feature_lengths)
  )


def test_a_grown_cache_continues_the_stream():
  encoder = _encoder('dense')
  small = cache_lib.init_cache(encoder.config.encoder, batch=1, capacity=3)
  window = encoder.geometry.window(_CHUNK)
  stride = _CHUNK * encoder.geometry.rate
  valid = np.array([_CHUNK], np.int32)
  first, second = (
    _BATCH.features[:1, i * stride : i * stride + window] for i in (0, 1)
  )
  _, small = encoder.chunk(first, valid, small)
  large = cache_lib.grow(small, 21)
  a, _ = encoder.chunk(second, valid, small)
  b, _ = encoder.chunk(second, valid, large)
  assert large.capacity == 21
  np.testing.assert_allclose(a.frames, b.frames, atol=1e-6)


def test_a_non_causal_model_refuses_to_stream():
  encoder = _Encoder(causal_conv=False, conv_kernel=3)
  cache = cache_lib.init_cache(encoder.config.encoder, batch=1, capacity=0)
  with pytest.raises(ValueError, match='causal_conv'):
    encoder.chunk(
      np.zeros((1, encoder.geometry.window(1), tiny.BINS), np.float32),
      np.ones((1,), np.int32),
      cache,
    )


def test_padding_and_batch_mates_change_nothing():
  encoder = _encoder('moe')
  output = encoder.masked(_BATCH.features, _BATCH.feature_lengths)
  rng = np.random.default_rng(1)
  lengths = np.array([79, 95, 40, 0], np.int32)  # a longer mate, an empty row
  features = rng.normal(size=(4, 95, tiny.BINS)).astype(np.float32)
  for row in (0, 2):
    features[row, : lengths[row]] = _BATCH.features[row, : lengths[row]]
  other = encoder.masked(features, lengths)
  for row in (0, 2):
    _assert_real(output, other.frames, output.frames, slice(row, row + 1))


def test_expert_statistics_ignore_padding():
  encoder = _encoder('moe')
  lengths = np.array([79, 0, 0], np.int32)
  noise = np.random.default_rng(1).normal(size=_BATCH.features.shape)
  noise[0] = _BATCH.features[0]
  a = encoder.masked(_BATCH.features, lengths)
  b = encoder.masked(noise.astype(np.float32), lengths)
  for name in ('macaron', 'final'):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5),
      a.moe[name].summary,
      b.moe[name].summary,
    )
    np.testing.assert_allclose(
      jnp.sum(a.moe[name].summary.load, axis=-1), 1.0, atol=1e-5
    )
    assert not np.asarray(b.moe[name].expert_weight)[:, 1:].any()
    assert (np.asarray(b.moe[name].expert_index)[:, 1:] == 4).all()


def test_a_short_utterance_is_an_empty_row():
  encoder = _encoder('dense')
  output = encoder.masked(_BATCH.features, np.array([79, 7, 6], np.int32))
  assert np.asarray(output.mask).sum(axis=1).tolist() == [19, 1, 0]
  assert np.isfinite(output.frames).all()


def test_a_frame_sees_its_chunk_and_not_beyond():
  """By gradient: output frame 3 (chunk 1 of size 3) sees frames 0..5."""
  encoder = _encoder('moe')
  features = jnp.asarray(_BATCH.features[:1])

  @jax.jit
  def gradient(features, chunk_size):
    def at(features):
      output = encoder._full(
        features, jnp.array([79]), chunk_size, jnp.asarray(-1)
      )
      # Not the plain sum, which the last norm makes constant.
      return jnp.sum(output.frames[0, 3] ** 3)

    return jnp.abs(jax.grad(at)(features)).sum(axis=(0, 2))

  reach = encoder.geometry.window(6)
  seen = np.asarray(gradient(features, jnp.asarray(3)))
  assert not seen[reach:].any()
  assert seen[:reach].all()
  assert np.asarray(gradient(features, jnp.asarray(-1)))[reach:].any()
