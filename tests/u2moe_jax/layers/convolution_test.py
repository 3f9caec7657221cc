"""The convolution module: causality, caches, padding, batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.layers import convolution

_WIDTH, _KERNEL = 6, 5
_RNG = np.random.default_rng(0)
_X = jnp.asarray(_RNG.normal(size=(2, 9, _WIDTH)), jnp.float32)
_ALL = jnp.ones((2, 9), bool)
_SHORT = jnp.arange(9)[None] < jnp.array([9, 6])[:, None]


def _running():
  return convolution.RunningStats(
    mean=jnp.zeros(_WIDTH), variance=jnp.ones(_WIDTH)
  )


def _module(**options):
  module = convolution.ConvolutionModule(_KERNEL, **options)
  arguments = {}
  if options.get('norm') == 'batch_norm':
    arguments['running'] = _running()
  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), _X, _ALL, **arguments)
  )
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes
  )
  return module, variables, arguments


def _reach(**options):
  """Which inputs of row 0 the output frame 4 depends on."""
  module, variables, arguments = _module(**options)

  def frame(x):
    output, _, _ = module.apply(variables, x, _ALL, **arguments)
    return jnp.sum(output[0, 4] ** 3)

  gradient = np.asarray(jax.grad(frame)(_X))
  assert not gradient[1].any()
  return np.flatnonzero(np.abs(gradient[0]).sum(axis=-1)).tolist()


@pytest.mark.parametrize('norm', ['layer_norm', 'rms_norm', 'batch_norm'])
def test_a_causal_frame_sees_its_kernel_to_the_left(norm):
  assert _reach(norm=norm) == [0, 1, 2, 3, 4]


def test_a_non_causal_frame_sees_both_sides():
  assert _reach(causal=False) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize('split', [1, 3, 7])
def test_two_pieces_with_history_are_the_whole(split):
  module, variables, _ = _module()
  whole, inputs, _ = module.apply(variables, _X, _ALL)
  assert inputs.shape == (2, 9 + _KERNEL - 1, _WIDTH)
  first, inputs, _ = module.apply(variables, _X[:, :split], _ALL[:, :split])
  history = inputs[:, -(_KERNEL - 1) :]
  second, _, _ = module.apply(
    variables, _X[:, split:], _ALL[:, split:], history=history
  )
  joined = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(joined, whole, atol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_padding_is_zero_and_has_no_part(causal):
  module, variables, _ = _module(causal=causal)
  output, _, _ = module.apply(variables, _X, _SHORT)
  wild, _, _ = module.apply(
    variables, jnp.where(_SHORT[..., None], _X, 50.0), _SHORT
  )
  alone, _, _ = module.apply(variables, _X[1:, :6], _ALL[1:, :6])
  np.testing.assert_array_equal(output, wild)
  np.testing.assert_allclose(output[1:, :6], alone, atol=1e-5)
  assert not np.asarray(output[1, 6:]).any()


def test_the_leak_of_the_reference_is_an_option():
  module, variables, _ = _module(causal=False, padding_leak=True)
  output, _, _ = module.apply(variables, _X, _SHORT)
  alone, _, _ = module.apply(variables, _X[1:, :6], _ALL[1:, :6])
  np.testing.assert_allclose(output[1:, :4], alone[:, :4], atol=1e-5)
  assert np.abs(output[1:, 4:6] - alone[:, 4:]).max() > 1e-2


def test_batch_norm_counts_real_frames_only():
  module, variables, arguments = _module(norm='batch_norm')
  rngs = {'dropout': jax.random.key(0)}

  def updated(x, mask, module=module):
    _, _, running = module.apply(variables, x, mask, rngs=rngs, **arguments)
    return np.concatenate([running.mean, running.variance])

  wild = jnp.where(_SHORT[..., None], _X, 50.0)
  padded = jnp.concatenate([wild, wild[:, :4]], axis=1)
  longer = jnp.pad(_SHORT, ((0, 0), (0, 4)))
  np.testing.assert_allclose(
    updated(padded, longer), updated(_X, _SHORT), rtol=1e-5, atol=1e-6
  )
  counting = module.clone(batch_norm_padding=True)
  with_padding = updated(_X, _SHORT, counting)
  assert np.abs(with_padding - updated(_X, _SHORT)).max() > 1e-3
  np.testing.assert_allclose(
    updated(_X, _ALL, counting), updated(_X, _ALL), rtol=1e-5
  )


def test_a_batch_without_frames_moves_no_statistics():
  module, variables, arguments = _module(norm='batch_norm')
  rngs = {'dropout': jax.random.key(0)}
  empty = jnp.zeros_like(_ALL)
  _, _, kept = module.apply(variables, _X, empty, rngs=rngs, **arguments)
  jax.tree.map(np.testing.assert_array_equal, kept, _running())
  _, _, moved = module.apply(variables, _X, _SHORT, rngs=rngs, **arguments)
  assert np.abs(moved.mean - _running().mean).max() > 1e-3


def test_batch_norm_uses_running_statistics_at_evaluation():
  module, variables, arguments = _module(norm='batch_norm')
  output, _, running = module.apply(variables, _X, _ALL, **arguments)
  jax.tree.map(np.testing.assert_array_equal, running, _running())
  alone, _, _ = module.apply(variables, _X[:1], _ALL[:1], **arguments)
  np.testing.assert_allclose(output[:1], alone, atol=1e-5)
  with pytest.raises(ValueError, match='running statistics'):
    module.apply(variables, _X, _ALL)


def test_rms_norm_scales_by_one_plus_its_parameter():
  """As the reference, which trains the offset and not the scale."""
  module, variables, _ = _module(norm='rms_norm')
  params = variables['params']

  def inner(offset):
    """What enters the last map, for an identity there."""
    changed = dict(params) | {
      'norm_offset': jnp.asarray(offset, jnp.float32),
      'pointwise_out': {'kernel': jnp.eye(_WIDTH), 'bias': jnp.zeros(_WIDTH)},
    }
    relu = module.clone(activation='relu')
    return np.asarray(relu.apply({'params': changed}, _X, _ALL)[0])

  plain = inner(np.zeros(_WIDTH))
  both_signs = plain - inner(np.full(_WIDTH, -2.0))  # relu(x) - relu(-x)
  np.testing.assert_allclose((both_signs**2).mean(axis=-1), 1, rtol=1e-3)
  offset = np.linspace(-0.5, 1, _WIDTH)
  np.testing.assert_allclose(inner(offset), plain * (1 + offset), rtol=1e-5)
  assert np.abs(inner(offset) - plain * offset).max() > 0.1
