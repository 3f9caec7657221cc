"""The arithmetic of subsampling, and that the layer obeys it."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from u2moe_jax.layers import subsampling

_KINDS = ['conv2d', 'conv2d6', 'conv2d8']


@pytest.mark.parametrize('kind', _KINDS)
def test_lengths_of_the_reference(kind):
  arrays, results = golden.units()
  geometry = subsampling.geometry(kind)
  # -1 marks what is too short for the reference; it is 0 here.
  expected = arrays[f'{kind}_conv_len_for_T1..120_minus1_is_error']
  lengths = np.arange(1, 121)
  ours = geometry.output_length(lengths)
  np.testing.assert_array_equal(ours, np.maximum(expected, 0))
  assert [geometry.output_length(int(n)) for n in lengths] == ours.tolist()
  assert geometry.rate == results[kind]['subsampling_rate']
  assert geometry.right_context == results[kind]['right_context']


@pytest.mark.parametrize('kind', _KINDS)
def test_a_window_gives_exactly_its_frames(kind):
  geometry = subsampling.geometry(kind)
  assert geometry.output_length(0) == 0
  for count in range(1, 9):
    window = geometry.window(count)
    assert geometry.output_length(window) == count
    assert geometry.output_length(window - 1) == count - 1


@pytest.mark.parametrize('kind', _KINDS)
@pytest.mark.parametrize('channels', [0, 3])
def test_the_layer_has_the_geometry_of_its_kind(kind, channels):
  geometry = subsampling.geometry(kind)
  layer = subsampling.ConvSubsampling(kind, 4, channels)
  features = jnp.zeros((2, geometry.window(3), 16))
  variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), features))
  kernel = nn.meta.unbox(variables)['params']['kernel_1']
  assert kernel.shape[2:] == 2 * (channels or 4,)
  for extra in range(geometry.rate + 1):
    longer = jnp.zeros((2, geometry.window(3) + extra, 16))
    shape = jax.eval_shape(layer.apply, variables, longer).shape
    assert shape == (2, geometry.output_length(longer.shape[1]), 4)


def test_an_output_frame_sees_its_window_and_no_more():
  geometry = subsampling.geometry('conv2d')
  layer = subsampling.ConvSubsampling('conv2d', 4)
  rng = np.random.default_rng(0)
  features = jnp.asarray(rng.normal(size=(1, 31, 12)), jnp.float32)
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
    jax.eval_shape(lambda: layer.init(jax.random.key(0), features)),
  )
  gradient = jax.grad(lambda x: layer.apply(variables, x)[0, 2].sum())(features)
  seen = np.flatnonzero(np.abs(gradient).sum(axis=(0, 2)))
  start = 2 * geometry.rate
  assert seen[0] >= start
  assert seen[-1] <= start + geometry.right_context
  assert len(seen) >= geometry.right_context - 1
