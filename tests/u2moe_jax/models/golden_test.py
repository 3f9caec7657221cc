"""Parity with the reference implementation on stored weights and arrays.

Set U2MOE_GOLDEN to the folder of the full golden set to run every case of
it as well (see tests/reference/golden.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from u2moe_jax import config as config_lib
from u2moe_jax.interop import wenet
from u2moe_jax.layers import subsampling
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import u2
from u2moe_jax.training import objective

_STORED = ['u2pp_dense_noncausal_bn', 'enc_conv2d6', 'enc_conv2d8']
_ONLY_FULL = [
  'full/u2pp_dense',
  'full/u2pp_moe',
  'full/u2pp_dense_noncausal_bn',
  'full/enc_abs_pos',
  'full/enc_no_pos',
  'full/enc_rope_pos',
]
_CASES = _STORED + (_ONLY_FULL if golden.FULL else [])
_ENCODER, _LOG_PROBS, _LOSS = 2e-5, 1e-4, 1e-3


class _Port:
  """A case with our model, parameters and buffers."""

  def __init__(self, name: str):
    load = golden.load_full if name.startswith('full/') else golden.load
    self.case = load(name.removeprefix('full/'))
    self.config = wenet.model_config(
      self.case.config,
      sos=self.case.sos,
      eos=self.case.eos,
      reference_quirks=True,
    )
    if not any(name.startswith('decoder') for name in self.case.weights):
      self.config = config_lib.replace(
        config_lib.replace(self.config, 'decoder.num_reverse_blocks', 0),
        'decoder.num_blocks',
        0,
      )
    self.model = u2.U2MoeModel(self.config)
    variables = wenet.model_variables(self.case.weights, self.config)
    self.params, self.buffers = jax.tree.map(jnp.asarray, variables)
    self.arrays = self.case.arrays
    self.encode = jax.jit(functools.partial(self._apply, 'encode'))
    self.encode_chunk = jax.jit(functools.partial(self._apply, 'encode_chunk'))

  def _apply(self, method, params, *arguments, **options):
    return self.model.apply(
      {'params': params}, *arguments, method=method, **options
    )

  def full(self, **chunk):
    chunk = {k: jnp.asarray(v) for k, v in chunk.items()}
    return self.encode(
      self.params,
      self.arrays['feats'],
      self.arrays['feats_lengths'],
      self.buffers,
      **{
        'chunk_size': jnp.asarray(-1),
        'left_chunks': jnp.asarray(-1),
        **chunk,
      },
    )

  def batch(self) -> objective.Batch:
    lengths = self.arrays['target_lengths']
    batch = objective.Batch(
      features=self.arrays['feats'],
      feature_lengths=self.arrays['feats_lengths'],
      labels=self.arrays['target'],
      label_lengths=lengths,
      weights=np.ones(len(lengths), np.float32),
    )
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def _port(name: str) -> _Port:
  return _Port(name)


_WHOLE = [name for name in _CASES if 'u2pp' in name]
_CAUSAL = [name for name in _CASES if 'noncausal' not in name]
_STREAMED = [name for name in _CAUSAL if 'rope' not in name]


@pytest.fixture
def port(request):
  return _port(request.param)


def _cases(names):
  return pytest.mark.parametrize('port', names, indirect=True)


def _assert_real_frames(port, actual, expected, tolerance):
  mask = port.arrays['encoder_mask'][:, 0]
  np.testing.assert_allclose(
    np.asarray(actual)[mask], expected[mask], atol=tolerance, rtol=0
  )


@_cases(_WHOLE)
def test_number_of_parameters(port):
  total, _ = u2.count_params(port.config)
  assert total == port.case.num_params


@_cases(_CASES)
def test_encoder_with_full_context(port):
  output = port.full()
  np.testing.assert_array_equal(output.mask, port.arrays['encoder_mask'][:, 0])
  expected = port.arrays['encoder_out_full']
  _assert_real_frames(port, output.frames, expected, _ENCODER)


def test_one_wrong_weight_is_noticed():
  """The tolerance is tight enough: 1e-2 on one weight fails."""
  port = _port('enc_conv2d6')
  kernel = port.params['encoder']['blocks']['convolution']['depthwise_kernel']
  params = jax.tree.map(lambda x: x, port.params)
  params['encoder']['blocks']['convolution']['depthwise_kernel'] = kernel.at[
    1, 2, 3
  ].add(1e-2)
  output = port.encode(
    params,
    port.arrays['feats'],
    port.arrays['feats_lengths'],
    port.buffers,
    chunk_size=jnp.asarray(-1),
    left_chunks=jnp.asarray(-1),
  )
  with pytest.raises(AssertionError):
    _assert_real_frames(
      port, output.frames, port.arrays['encoder_out_full'], _ENCODER
    )


@_cases(_CAUSAL)
@pytest.mark.parametrize('left', [-1, 2])
def test_encoder_with_chunk_masks(port, left):
  name = f'encoder_out_chunk4_left{left}'
  output = port.full(chunk_size=4, left_chunks=left)
  _assert_real_frames(port, output.frames, port.arrays[name], _ENCODER)


@_cases(_WHOLE)
def test_ctc_log_probs(port):
  frames = port.full().frames
  for penalty, suffix in ((0.0, ''), (2.0, '_blank_penalty2')):
    expected = port.arrays.get(f'ctc_logprobs_full{suffix}')
    if expected is None:
      continue
    actual = port._apply(
      'ctc_log_probs', port.params, frames, blank_penalty=penalty
    )
    _assert_real_frames(port, actual, expected, _LOG_PROBS)


@_cases(_STREAMED)
def test_streaming_path_and_caches(port):
  geometry = subsampling.geometry(port.config.encoder.subsampling)
  window, stride = geometry.window(4), 4 * geometry.rate
  names = [name for name in port.arrays if name.startswith('stream_chunk4')]
  for name in names:
    left, row = name.removeprefix('stream_chunk4_left').split('_utt')
    # A case may be stored with its second utterance only.
    row = min(int(row), len(port.arrays['feats']) - 1)
    length = int(port.arrays['feats_lengths'][row])
    frames = port.arrays['feats'][row, :length]
    total = geometry.output_length(length)
    capacity = 8 if left == '2' else 4 * -(-total // 4)
    cache = cache_lib.init_cache(
      port.config.encoder, batch=1, capacity=capacity
    )
    pieces = []
    for step, start in enumerate(range(0, total, 4)):
      piece = frames[step * stride : step * stride + window]
      piece = np.pad(piece, ((0, window - len(piece)), (0, 0)))
      count = min(4, total - start)
      output, cache = port.encode_chunk(
        port.params,
        piece[None],
        np.array([count], np.int32),
        port.buffers,
        cache,
      )
      pieces.append(output.frames[:, :count])
      if left == '2' and row == 0:
        _assert_cache(port, cache, step)
    actual = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(actual, port.arrays[name], atol=_ENCODER)


def _assert_cache(port, cache, step):
  expected = port.arrays.get(f'cache_left2_step{step}_att')
  if expected is None:
    return
  ours = np.concatenate([cache.key[:, 0], cache.value[:, 0]], axis=-1)
  ours = ours.transpose(0, 2, 1, 3)[:, :, -expected.shape[2] :]
  np.testing.assert_allclose(ours, expected, atol=_ENCODER)
  expected = port.arrays[f'cache_left2_step{step}_cnn']
  ours = np.asarray(cache.convolution).transpose(0, 1, 3, 2)
  np.testing.assert_allclose(ours, expected, atol=_ENCODER)


@functools.cache
def _objective_and_gradients(port):
  def loss(params, batch):
    result = objective.compute_objective(
      port.model, params, port.buffers, batch, config_lib.TrainConfig()
    )
    return result.loss, result

  run = jax.jit(jax.grad(loss, has_aux=True))
  gradients, result = run(port.params, port.batch())
  return result, gradients


@_cases(_WHOLE)
def test_decoders_and_losses(port):
  batch = port.batch()
  result, _ = _objective_and_gradients(port)
  forward, backward = objective.decoder_batches(batch, port.config)
  for scores, direction, name in (
    (result.outputs.forward, forward, 'dec_l2r_logprobs'),
    (result.outputs.backward, backward, 'dec_r2l_logprobs'),
  ):
    mask = np.asarray(direction.mask)
    actual = np.asarray(jax.nn.log_softmax(scores.logits))
    np.testing.assert_allclose(
      actual[mask], port.arrays[name][mask], atol=_LOG_PROBS, rtol=0
    )
  expected = port.case.results['loss']['full_context']
  actual = {k: m.total / m.count for k, m in result.metrics.items()}
  assert float(result.loss) == pytest.approx(expected['loss'], abs=_LOSS)
  for name in ('loss_ctc', 'loss_l2r', 'loss_r2l'):
    assert float(actual[name]) == pytest.approx(expected[name], abs=_LOSS)
  assert float(actual['accuracy']) == pytest.approx(expected['th_accuracy'])


@_cases(_WHOLE)
def test_gradient_norms(port):
  _, ours = _objective_and_gradients(port)
  # The names of the reference, mapped as the weights are: norms of a stacked
  # leaf add up over its blocks and experts.
  squares = {
    name: np.full_like(weight, norm**2 / weight.size)
    for name, weight in port.case.weights.items()
    if (norm := port.case.results['grad_norm'].get(name)) is not None
  }
  rest = {k: v for k, v in port.case.weights.items() if k not in squares}
  expected, _ = wenet.model_variables(squares | rest, port.config)
  total = port.case.results['grad_norm_total']

  def compare(path, gradient, squares):
    a, b = np.linalg.norm(gradient), np.sqrt(np.sum(squares))
    assert abs(a - b) <= 2e-4 * max(b, 1e-3 * total), (path, a, b)

  jax.tree_util.tree_map_with_path(compare, ours, expected)


def test_batch_norm_training_statistics():
  port = _port('u2pp_dense_noncausal_bn')

  @jax.jit
  def run(params):
    return objective.compute_objective(
      port.model,
      params,
      port.buffers,
      port.batch(),
      config_lib.TrainConfig(),
      dropout_key=jax.random.key(0),
    )

  result = run(port.params)
  updated = result.outputs.encoder.buffers['conv_norm']
  for name, ours in (('mean', 'mean'), ('var', 'variance')):
    expected = port.arrays[f'bn_after_{name}']
    np.testing.assert_allclose(updated[ours], expected, rtol=2e-5, atol=2e-5)
    before = port.buffers['conv_norm'][ours]
    assert np.abs(before - expected).max() > 1e-3
  expected = port.case.results['bn_train_mode']
  assert float(result.loss) == pytest.approx(expected['loss'], abs=_LOSS)
