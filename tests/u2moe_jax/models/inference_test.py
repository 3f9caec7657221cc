"""The inference form gives what the form that trains gives."""

import functools
import weakref

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import tiny
from u2moe_jax.checkpoint import contents
from u2moe_jax.layers import subsampling
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import inference
from u2moe_jax.models import stack
from u2moe_jax.models import u2

_LENGTHS = (47, 31)
_CHUNK, _LEFT = 3, 1
# Few, since each is compiled in both forms: all experts and both decoders; and
# the other kinds of everything, blocks unlike each other.
_CONFIGS = {
  'moe': {'experts': tiny.moe(num_experts=3)},
  'batch_norm': {
    'experts': tiny.moe(where='1,ffn'),
    'decoders': 0,
    'conv_norm': 'batch_norm',
    'position': 'rope_pos',
  },
}
# Not compiled: parameters only.
_MORE_CONFIGS = {
  'every_other': {
    'experts': tiny.moe(where='every:2.final'),
    'num_blocks': 4,
    'decoders': 0,
  },
  'rms_norm': {'conv_norm': 'rms_norm', 'decoders': 0},
}


def _variables(config):
  """Random parameters and buffers, no statistic at its initial value."""
  _, params, buffers = tiny.init(config)
  if 'conv_norm' in buffers:
    rng = np.random.default_rng(3)
    shape = buffers['conv_norm']['mean'].shape
    buffers['conv_norm'] = {
      'mean': jnp.asarray(rng.normal(size=shape), jnp.float32),
      'variance': jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32),
    }
  return params, buffers


class _Pair:
  """A model in both forms: module, parameters, buffers."""

  def __init__(self, options):
    self.config = tiny.model_config(**options)
    self.training = u2.U2MoeModel(self.config), *_variables(self.config)
    self.inference = self.converted('float32')

  def converted(self, weights):
    config = inference.model_config(self.config, weights)
    return inference.model(config), *inference.convert_variables(
      self.config, *self.training[1:], weights=weights
    )


@functools.cache
def _pair(name):
  return _Pair((_CONFIGS | _MORE_CONFIGS)[name])


def _features(frames):
  rng = np.random.default_rng(1)
  shape = (len(_LENGTHS), frames, tiny.BINS)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, buffers, chunk_size, left_chunks):
  """Frames, CTC log-probabilities, router statistics, decoder logits."""
  rng = np.random.default_rng(2)
  tokens = jnp.asarray(rng.integers(0, tiny.VOCAB, (2 * len(_LENGTHS), 5)))
  inputs = u2.DecoderInputs(tokens=tokens, mask=jnp.ones_like(tokens, bool))
  outputs = model.apply(
    {'params': params},
    _features(max(_LENGTHS)),
    jnp.array(_LENGTHS),
    buffers,
    inputs,
    inputs,
    chunk_size=chunk_size,
    left_chunks=left_chunks,
  )
  return {
    'frames': outputs.encoder.frames,
    'log_probs': outputs.ctc_log_probs,
    'moe': outputs.encoder.moe,
    'decoders': (outputs.forward, outputs.backward),
  }


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(model, params, buffers, features, num_valid, cache):
  output, cache = model.apply(
    {'params': params},
    features,
    num_valid,
    buffers,
    cache,
    method='encode_chunk',
  )
  return output.frames, cache


def _assert_close(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    found,
    expected,
  )


@pytest.mark.parametrize('name', _CONFIGS)
def test_whole_utterances_are_the_same(name):
  pair = _pair(name)
  full = _run(*pair.training, -1, -1)
  _assert_close(_run(*pair.inference, -1, -1), full)
  chunked = _run(*pair.training, _CHUNK, _LEFT)
  _assert_close(_run(*pair.inference, _CHUNK, _LEFT), chunked)
  # Were they alike, the comparison would show little.
  assert np.abs(full['frames'] - chunked['frames']).max() > 1e-2
  decoders = full['decoders']
  if pair.config.decoder.num_blocks:
    assert np.abs(decoders[0].logits - decoders[1].logits).max() > 1e-2


@pytest.mark.parametrize('name', _CONFIGS)
def test_streams_are_the_masked_pass(name):
  """Chunk by chunk in one form is all at once in the other."""
  pair = _pair(name)
  geometry = subsampling.geometry(pair.config.encoder.subsampling)
  cache = cache_lib.init_cache(
    pair.config.encoder, batch=len(_LENGTHS), capacity=_LEFT * _CHUNK
  )
  features = _features(max(_LENGTHS))
  expected = _run(*pair.training, _CHUNK, _LEFT)['frames']
  for first in range(0, 9, _CHUNK):
    start = first * geometry.rate
    piece = features[:, start : start + geometry.window(_CHUNK)]
    valid = geometry.output_length(jnp.array(_LENGTHS)) - first
    valid = jnp.clip(valid, 0, _CHUNK)
    found, cache = _run_chunk(*pair.inference, piece, valid, cache)
    for row, count in enumerate(valid.tolist()):
      _assert_close(found[row, :count], expected[row, first : first + count])


def test_what_is_folded_and_fused_matters():
  """With no bias from the batch norm, or keys for queries, it is another."""
  model, params, buffers = _pair('batch_norm').inference
  expected = _run(*_pair('batch_norm').training, -1, -1)['log_probs']
  changes = {
    'encoder/blocks_1/convolution/depthwise_bias': lambda x: x * 0,
    'encoder/blocks_0/attention/query_key_value/kernel': lambda x: x[:, ::-1],
  }
  for path, change in changes.items():
    flat = traverse_util.flatten_dict(params, sep='/')
    wrong = inference.nest({**flat, path: change(flat[path])}.items())
    found = _run(model, wrong, buffers, -1, -1)['log_probs']
    assert np.abs(found - expected).max() > 1e-3


@pytest.mark.parametrize('name', [*_CONFIGS, *_MORE_CONFIGS])
def test_parameters_are_those_the_modules_ask_for(name):
  pair = _pair(name)
  model, params, buffers = pair.inference
  asked = jax.eval_shape(
    lambda key: u2.init_params(model, key), jax.random.key(0)
  )
  assert contents.shapes(params) == contents.shapes(nn.meta.unbox(asked))
  assert list(buffers) == ['cmvn']


@pytest.mark.parametrize('name', ['moe', 'every_other'])
def test_each_block_gets_its_own(name):
  """Block i has what entry i of the stack has."""
  _, trained, _ = _pair(name).training
  _, params, _ = _pair(name).inference
  blocks = stack.unstack(trained['encoder']['blocks'])
  for i, block in enumerate(blocks):
    ours = params['encoder'][f'blocks_{i}']
    _assert_close(ours['norm_output'], block['norm_output'])
    found = ours['attention']['query_key_value']['kernel'][:, 2]
    _assert_close(found, block['attention']['value']['kernel'])
    experts = block['ffn_final'].get('w_in')
    if getattr(experts, 'ndim', 0) == 3:
      _assert_close(ours['ffn_final']['expert_2']['w_in'].T, experts[2])
    else:
      _assert_close(ours['ffn_final'], block['ffn_final'])
  scales = [params['encoder'][f'blocks_{i}']['norm_output'] for i in (0, 1)]
  assert np.abs(scales[0]['scale'] - scales[1]['scale']).max() > 1e-3


def test_arrays_are_converted_one_by_one():
  """Of what was read, little is kept; else there would be two models."""
  pair = _pair('batch_norm')
  _, params, buffers = pair.training
  flat = traverse_util.flatten_dict(
    {'params': params, 'buffers': buffers}, sep='/'
  )
  read = []

  def reader(path):
    array = np.array(flat[path])
    read.append(weakref.ref(array))
    return array

  kept = [
    sum(ref() is not None for ref in read)
    for _ in inference.convert(pair.config, reader)
  ]
  assert len(read) > 30
  assert max(kept) <= 6  # a kernel and the four arrays of a batch norm


@pytest.mark.parametrize('weights', ['bfloat16', 'int8'])
def test_narrow_weights_are_close_and_small(weights):
  pair = _pair('moe')
  expected = _run(*pair.training, -1, -1)['log_probs']
  model, params, buffers = pair.converted(weights)
  found = _run(model, params, buffers, -1, -1)['log_probs']
  assert 1e-4 < np.abs(found - expected).max() < 0.2
  block = params['encoder']['blocks_0']
  assert block['ffn_final']['expert_0']['w_in'].dtype == weights
  assert block['attention']['query_key_value']['kernel'].dtype == weights
  # What decides between near ties stays as it is.
  assert block['ffn_final']['router']['kernel'].dtype == 'float32'
