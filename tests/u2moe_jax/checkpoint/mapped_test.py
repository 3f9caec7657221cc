"""Arrays that are mapped: what went in comes out, and nothing is copied."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import mapped


def _arrays():
  rng = np.random.default_rng(0)
  return {
    'a/odd': rng.normal(size=(3, 5)).astype(np.float32),
    'a/number': np.float32(7).reshape(()),
    'b/none': np.zeros((0, 4), np.float32),
    'b/turned': rng.normal(size=(4, 6)).astype(np.float32).T,
    'b/narrow': rng.normal(size=33).astype(jnp.dtype('bfloat16')),
    'c': rng.integers(-127, 128, (8, 8)).astype(np.int8),
  }


@pytest.fixture
def folder(tmp_path):
  mapped.write(tmp_path / 'x', _arrays().items())
  return tmp_path / 'x'


def test_round_trip(folder):
  found = mapped.read(folder)
  assert list(found) == list(_arrays())
  for path, expected in _arrays().items():
    assert found[path].dtype == expected.dtype
    assert found[path].shape == expected.shape
    np.testing.assert_array_equal(found[path], expected)


def test_jax_takes_them_as_they_lie(folder):
  view = mapped.read(folder)['a/odd']
  assert view.ctypes.data % mapped.ALIGNMENT == 0
  placed = jax.device_put(view, jax.devices()[0])
  assert placed.unsafe_buffer_pointer() == view.ctypes.data
  # One that begins elsewhere is copied.
  view = view.reshape(-1)[1:]
  placed = jax.device_put(view, jax.devices()[0])
  assert placed.unsafe_buffer_pointer() != view.ctypes.data


def test_they_cannot_be_written_to(folder):
  with pytest.raises(ValueError, match='read-only'):
    mapped.read(folder)['c'][0] = 1


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('arrays.bin', 'short', 'has 5 bytes and should have'),
    ('arrays.bin', None, 'No such file'),
    ('arrays.json', None, 'No such file'),
    ('arrays.json', '{', 'no index'),
    ('arrays.json', '{"a": 3}', 'no index'),
    ('arrays.json', '{}', 'names no arrays'),
    (
      'arrays.json',
      json.dumps({'a': {'dtype': 'f33', 'shape': [1], 'offset': 0}}),
      'no index',
    ),
  ],
)
def test_damage_is_named(folder, name, text, message):
  (folder / name).unlink()
  if text is not None:
    (folder / name).write_text(text)
  with pytest.raises(contents.CheckpointError, match=message) as caught:
    mapped.read(folder)
  assert name in str(caught.value)
