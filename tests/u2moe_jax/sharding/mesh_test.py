"""Meshes: the free axis, and what does not fit."""

import math

import jax
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.sharding import axes
from u2moe_jax.sharding import mesh


def _sizes(**sizes):
  return config_lib.MeshConfig(**sizes)


@pytest.mark.parametrize(
  ('asked', 'expected'),
  [
    ({}, (8, 1, 1, 1)),
    ({'expert': 4}, (2, 1, 4, 1)),
    ({'data': 1, 'fsdp': -1, 'tensor': 2}, (1, 4, 1, 2)),
    ({'data': 2, 'fsdp': 2, 'expert': 2}, (2, 2, 2, 1)),
    ({'fsdp': 8, 'data': -1}, (1, 8, 1, 1)),
  ],
)
def test_the_free_axis_takes_what_is_left(asked, expected):
  resolved = mesh.resolve(_sizes(**asked), 8)
  assert tuple(vars(resolved).values()) == expected
  made = mesh.make_mesh(_sizes(**asked))
  assert tuple(made.shape[name] for name in axes.MESH_AXES) == expected
  assert made.devices.size == math.prod(expected) == 8


@pytest.mark.parametrize(
  'asked', [{'expert': 3}, {'data': 4}, {'data': 16}, {'data': 3, 'fsdp': -1}]
)
def test_what_does_not_fit_is_refused_with_what_would(asked):
  with pytest.raises(mesh.MeshError) as error:
    mesh.resolve(_sizes(**asked), 8)
  message = str(error.value)
  assert _sizes(**asked).to_text() in message
  assert '8 device' in message
  assert '8x1x1x1' in message


def test_some_devices():
  made = mesh.make_mesh(_sizes(expert=2), jax.devices()[:2])
  assert made.devices.size == 2
