"""Training checkpoints: round trip, retention, another mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.sharding import mesh as mesh_lib


def _tree(value, sharding=None):
  tree = {
    'params': {'w': value + jnp.arange(16.0).reshape(8, 2)},
    'buffers': {'mean': value * jnp.ones((3,))},
    'opt_state': {'count': jnp.asarray(int(value)), 'mu': jnp.ones((8, 2))},
  }
  return tree if sharding is None else jax.device_put(tree, sharding)


def _save(store, step, tree=None, **options):
  store.save(
    step,
    **(tree or _tree(float(step))),
    progress={'step': step, 'batch': step},
    **options,
  )


def _restore(store, step, target):
  abstract = store_lib.as_abstract(target)
  return store.restore(step, **abstract)


def _assert_equal(restored, tree):
  jax.tree.map(
    np.testing.assert_array_equal,
    {name: getattr(restored, name) for name in tree},
    tree,
  )


def test_round_trip(tmp_path):
  store = store_lib.Store(tmp_path)
  assert store.latest_step() is None
  _save(store, 3)
  store.close()
  again = store_lib.Store(tmp_path, read_only=True)
  assert again.latest_step() == 3
  restored = _restore(again, 3, _tree(0.0))
  _assert_equal(restored, _tree(3.0))
  assert restored.progress == {'step': 3, 'batch': 3}
  target = store_lib.as_abstract(
    {k: v for k, v in _tree(0.0).items() if k != 'opt_state'}
  )
  alone = again.restore_params(3, target)
  _assert_equal(restored, {**alone, 'opt_state': restored.opt_state})
  again.close()


def test_the_best_and_the_newest_are_kept(tmp_path):
  store = store_lib.Store(tmp_path, keep_last=2, keep_best=2)
  wers = {1: 30.0, 2: 10.0, 3: 40.0, 4: 20.0, 5: 50.0, 6: None}
  for step, wer in wers.items():
    _save(store, step, wer=wer)
  store.wait()
  assert store.best_steps(10) == [2, 4, 5, 6]
  assert store.best_steps(2) == [2, 4]
  assert store.latest_step() == 6
  store.close()
  kept = {int(p.name) for p in (tmp_path / 'checkpoints').iterdir()}
  assert kept == {2, 4, 5, 6}
  again = store_lib.Store(tmp_path, read_only=True)
  assert again.best_steps(2) == [2, 4]
  again.close()


def test_without_a_dev_set_the_newest_come_first(tmp_path):
  store = store_lib.Store(tmp_path, keep_last=3, keep_best=2)
  for step in (1, 2, 3, 4):
    _save(store, step)
  store.wait()
  assert store.best_steps(2) == [4, 3]
  assert store.best_steps(9) == [4, 3, 2]
  store.close()


@pytest.mark.parametrize(
  ('before', 'after'), [((8, 1), (2, 4)), ((1, 4), (8, 1)), ((2, 4), (1, 1))]
)
def test_saved_on_one_mesh_restored_on_another(tmp_path, before, after):
  def sharding(shape):
    devices = jax.devices()[: shape[0] * shape[1]]
    sizes = config_lib.MeshConfig(data=shape[0], fsdp=shape[1])
    mesh = mesh_lib.make_mesh(sizes, devices)
    split = jax.sharding.PartitionSpec('fsdp')
    whole = jax.sharding.PartitionSpec()

    def place(leaf):
      spec = split if leaf.ndim == 2 else whole
      return jax.sharding.NamedSharding(mesh, spec)

    return jax.tree.map(place, _tree(0.0))

  store = store_lib.Store(tmp_path)
  _save(store, 7, jax.device_put(_tree(7.0), sharding(before)))
  store.wait()
  target = jax.device_put(_tree(0.0), sharding(after))
  restored = _restore(store, 7, target)
  store.close()
  _assert_equal(restored, _tree(7.0))
  weight = restored.params['w']
  assert weight.sharding == target['params']['w'].sharding
  assert weight.addressable_shards[0].data.shape == (8 // after[1], 2)


def test_some_steps_are_kept_for_good(tmp_path):
  store = store_lib.Store(tmp_path, keep_last=1, keep_best=1, keep_every=4)
  for step in range(1, 11):
    _save(store, step, wer=float(step))
  store.close()
  kept = {int(p.name) for p in (tmp_path / 'checkpoints').iterdir()}
  assert kept == {1, 4, 8, 10}


def test_a_wer_can_be_added_later(tmp_path):
  store = store_lib.Store(tmp_path, keep_last=1, keep_best=1)
  _save(store, 1, wer=20.0)
  _save(store, 2)
  assert store.wer(2) is None
  assert store.best_steps(1) == [1]
  store.set_wer(2, 10.0)
  assert store.wer(2) == 10.0
  assert store.best_steps(1) == [2]
  _save(store, 3, wer=30.0)
  store.close()
  again = store_lib.Store(tmp_path, read_only=True)
  assert {step: again.wer(step) for step in (2, 3)} == {2: 10.0, 3: 30.0}
  assert again.best_steps(9) == [2, 3]  # 1 was not the best any more
  again.close()


def test_another_model_is_told_by_its_shapes(tmp_path):
  store = store_lib.Store(tmp_path)
  _save(store, 1)
  store.wait()
  other = _tree(0.0)
  other['params'] = {'w': jnp.zeros((8, 3)), 'v': jnp.zeros(1)}
  with pytest.raises(contents.MisfitError) as error:
    store.restore_newest(**store_lib.as_abstract(other))
  message = str(error.value)
  assert (
    'params/w is (8, 2) in the checkpoint and (8, 3) in the model' in message
  )
  assert 'params/v is missing in the checkpoint' in message
  assert (tmp_path / 'checkpoints' / '1').is_dir()
  store.close()


# That an older step replaces a damaged one: tests/experiments/killed_run_test.
def test_without_a_readable_step_nothing_is_moved(tmp_path):
  store = store_lib.Store(tmp_path)
  target = store_lib.as_abstract(_tree(0.0))
  assert store.restore_newest(**target) is None
  _save(store, 1)
  _save(store, 2)
  store.wait()
  for step in (1, 2):
    (tmp_path / 'checkpoints' / str(step) / 'params' / '_METADATA').write_text(
      '{'
    )
  with pytest.raises(contents.CheckpointError, match=r'none of .*\[1, 2\] can'):
    store.restore_newest(**target)
  store.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoints']


def test_a_save_that_fails_names_what_is_left(tmp_path, monkeypatch):
  store = store_lib.Store(tmp_path)
  _save(store, 1)
  store.wait()

  def fail(*_, **__):
    raise ValueError("layers above: [os_error_code='28']\nmore")

  monkeypatch.setattr(store._manager, 'save', fail)
  with pytest.raises(OSError, match=r'No space left.*newest there is step 1'):
    _save(store, 2)
  store.close()
