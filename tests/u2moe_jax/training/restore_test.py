"""A training state goes on on any mesh."""

import jax
import numpy as np
import pytest

from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import state as state_lib

_MODEL = config_lib.replace(
  tiny.model_config(tiny.moe(), decoders=0), 'vocab_size', 12
)
_OPTIMIZER = optimizer_lib.make_optimizer(
  config_lib.OptimizerConfig(ema_decay=0.9), num_steps=10
)


def _target(shape):
  sizes = dict(zip(('data', 'fsdp', 'expert', 'tensor'), shape, strict=True))
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = mesh_lib.make_mesh(config_lib.MeshConfig(**sizes), devices)
  return state_lib.abstract_state_on(
    mesh, u2.U2MoeModel(_MODEL), _OPTIMIZER, u2.init_buffers(_MODEL)
  )


def _random(target):
  rng = np.random.default_rng(0)

  def draw(leaf):
    values = rng.normal(size=leaf.shape) * 100
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

  return jax.tree.map(draw, target)


def _parts(state):
  """Into how many parts an expert kernel and its moment are split."""
  kernel = state.params['encoder']['blocks']['ffn_final']['w_in']
  (moments,) = optimizer_lib.swap_average(state.params, state.opt_state)[:1]
  average = moments['encoder']['blocks']['ffn_final']['w_in']
  return [
    tuple(np.array(leaf.shape) // leaf.addressable_shards[0].data.shape)
    for leaf in (kernel, average)
  ]


@pytest.mark.parametrize(
  ('shapes', 'splits'),
  [
    # Axes of the kernel: blocks, experts, width, hidden.
    (
      [(2, 2, 2, 1), (1, 4, 2, 1), (1, 1, 1, 1)],
      [(1, 2, 2, 1), (1, 2, 4, 1), (1, 1, 1, 1)],
    ),
    ([(1, 1, 1, 1), (2, 1, 2, 2)], [(1, 1, 1, 1), (1, 2, 1, 2)]),
  ],
)
def test_a_state_is_saved_and_restored_from_mesh_to_mesh(
  tmp_path, shapes, splits
):
  state = _random(_target(shapes[0]))
  expected = jax.device_get(state)
  assert _parts(state) == [splits[0]] * 2
  for number, (shape, split) in enumerate(
    zip(shapes[1:], splits[1:], strict=True)
  ):
    store = store_lib.Store(tmp_path / str(number))
    store.save(
      1,
      params=state.params,
      buffers=state.buffers,
      opt_state=state.opt_state,
      progress={'step': 1},
    )
    store.wait()
    target = _target(shape)
    restored = store.restore_newest(
      params=target.params, buffers=target.buffers, opt_state=target.opt_state
    )
    store.close()
    state = state.replace(
      params=restored.params,
      buffers=restored.buffers,
      opt_state=restored.opt_state,
    )
    assert _parts(state) == [split] * 2
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(state))
    jax.tree.map(
      lambda a, b: np.testing.assert_equal(a.sharding, b.sharding),
      state.params,
      target.params,
    )
