"""One model, any mesh: the same losses, gradients and parameters."""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.reference import any_mesh

ROOT = pathlib.Path(__file__).parents[3]
_SHAPES = [
  (8, 1, 1, 1),
  (1, 8, 1, 1),
  (1, 1, 8, 1),
  (1, 1, 1, 8),
  (2, 2, 2, 1),
  (1, 2, 2, 2),
  (2, 1, 4, 1),
]


@functools.cache
def _alone(kind):
  return any_mesh.run(kind, (1, 1, 1, 1))


def _name(shape):
  return 'x'.join(map(str, shape))


@pytest.mark.parametrize('shape', _SHAPES, ids=_name)
@pytest.mark.parametrize('kind', ['dense', 'moe'])
def test_a_mesh_computes_what_one_device_computes(kind, shape):
  found = any_mesh.run(kind, shape)
  assert not any_mesh.differences(found, _alone(kind))


def test_buffers_with_a_slot_for_every_token_drop_nothing():
  found = any_mesh.run('capacity', (2, 1, 4, 1))
  assert not any_mesh.differences(found, _alone('moe'))
  assert found.metrics['dropped'] == 0


def test_a_row_that_one_device_forgets_is_noticed():
  batch = any_mesh.batch()
  rows = batch.replace(weights=batch.weights * (np.arange(8) != 3))
  problems = any_mesh.differences(
    any_mesh.run('dense', (1, 1, 1, 1), rows=rows), _alone('dense')
  )
  kinds = {problem.split()[0] for problem in problems}
  assert {'losses', 'gradient', 'parameter'} <= kinds


def test_every_gradient_is_compared():
  gradients = _alone('moe').gradients
  assert set(gradients) == set(_alone('moe').parameters)
  moved = [path for path, g in gradients.items() if np.abs(g).max() > 1e-6]
  assert len(moved) > 0.9 * len(gradients)


def _by_path(state):
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _is_expert(path):
  return path.endswith(("'w_in']", "'b_in']", "'w_out']", "'b_out']"))


def test_a_device_holds_an_eighth_of_the_experts():
  state = any_mesh.machine_for('moe', (1, 1, 8, 1)).state()
  found = 0
  for path, leaf in _by_path(state).items():
    own = leaf.addressable_shards[0].data.nbytes
    assert own * (8 if _is_expert(path) else 1) == leaf.nbytes, path
    found += _is_expert(path)
  # 4 arrays of 3 layers; parameters, recorded gradients and two moments.
  assert found == 4 * 3 * 4


def test_the_program_expects_an_eighth_of_the_experts():
  split, whole = (
    any_mesh.machine_for('moe', shape).compiled.memory_analysis()
    for shape in ((1, 1, 8, 1), (8, 1, 1, 1))
  )
  state = any_mesh.machine_for('moe', (8, 1, 1, 1)).state()
  experts = sum(
    leaf.nbytes for path, leaf in _by_path(state).items() if _is_expert(path)
  )
  saved = whole.argument_size_in_bytes - split.argument_size_in_bytes
  assert saved == experts * 7 // 8


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def test_two_processes_compute_what_one_device_computes(tmp_path):
  out = tmp_path / 'trace.npz'
  address = f'127.0.0.1:{_free_port()}'
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  processes = [
    subprocess.Popen(
      [sys.executable, '-m', 'tests.reference.any_mesh']
      + [address, '2', str(index), '2', str(out)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    told = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  codes = [process.returncode for process in processes]
  assert codes == [0, 0], '\n\n'.join(text[-3000:] for text in told)
  assert not any_mesh.differences(any_mesh.load(str(out)), _alone('moe'))


def test_devices_are_simulated():
  assert jax.device_count() == 8
