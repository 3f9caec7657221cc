"""Programs are compiled ahead, are those that run, and fit or say so."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.training import errors
from u2moe_jax.training import flops
from u2moe_jax.training import memory
from u2moe_jax.training import objective
from u2moe_jax.training import programs as programs_lib

_SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])
_SHAPES = [
  programs_lib.Shape(frames=8, tokens=2, rows=4),
  programs_lib.Shape(frames=30, tokens=3, rows=2),
  programs_lib.Shape(frames=16, tokens=2, rows=2),
]


class _Counted:
  """A function of a weight and a batch that counts how often it is traced."""

  def __init__(self):
    self.traces = 0
    weight = jax.ShapeDtypeStruct((3, 5), jnp.float32, sharding=_SHARDING)
    self.programs = programs_lib.Programs(
      jax.jit(self._function),
      (weight,),
      name='train',
      num_bins=3,
      sharding=_SHARDING,
    )

  def _function(self, weight, batch):
    self.traces += 1
    return jnp.sum(batch.features @ weight) + jnp.sum(batch.weights)

  def compile_all(self, **options):
    planned = [(self.programs, shape) for shape in _SHAPES]
    return list(programs_lib.compile_all(planned, **options))


def _batch(shape):
  return objective.Batch(
    features=jnp.ones((shape.rows, shape.frames, 3)),
    feature_lengths=jnp.ones(shape.rows, jnp.int32),
    labels=jnp.ones((shape.rows, shape.tokens), jnp.int32),
    label_lengths=jnp.ones(shape.rows, jnp.int32),
    weights=jnp.ones(shape.rows),
  )


@pytest.mark.parametrize('num_threads', [1, 3])
def test_each_shape_is_compiled_once_and_called(num_threads, monkeypatch):
  warnings = []
  monkeypatch.setattr(
    programs_lib.logging,
    'warning',
    lambda text, *parts: warnings.append(text % parts),
  )
  counted = _Counted()
  compiled = counted.compile_all(num_threads=num_threads)
  assert {each.shape for each in compiled} == set(_SHAPES)
  assert counted.traces == 3
  weight = jnp.ones((3, 5))
  for shape in _SHAPES:
    result = counted.programs(weight, _batch(shape))
    assert float(result) == shape.rows * (shape.frames * 15 + 1)
  assert counted.traces == 3
  assert not warnings
  other = dataclasses.replace(_SHAPES[0], rows=3)
  counted.programs(weight, _batch(other))
  counted.programs(weight, _batch(other))
  assert counted.traces == 4  # late, but only once
  assert any('8 x 2 x 3 was not planned' in text for text in warnings)


def test_it_is_the_compiled_program_that_runs():
  counted = _Counted()
  counted.compile_all()
  program = counted.programs.program(_SHAPES[0])
  marked = dataclasses.replace(program, call=lambda *_: 'this one')
  counted.programs.add(marked)
  batch = counted.programs.empty_batch(_SHAPES[0])
  assert counted.programs(jnp.ones((3, 5)), batch) == 'this one'
  assert not np.asarray(batch.weights).any()


def test_the_largest_comes_first_and_its_failure_ends_it():
  counted = _Counted()
  planned = [(counted.programs, shape) for shape in _SHAPES]
  compiling = programs_lib.compile_all(planned)
  first = next(compiling)
  assert first.shape == _SHAPES[1]
  compiling.close()
  assert first.num_flops == 2 * 30 * 2 * 3 * 5
  assert first.memory_bytes > 30 * 2 * 3 * 4


def test_what_does_not_fit_is_told_with_what_to_lower():
  program = programs_lib.Program('train', _SHAPES[1], None, 1.0, 3 << 30, 1.0)
  memory.require_fit(program, 3 << 30)
  memory.require_fit(program, None)
  unknown = dataclasses.replace(program, memory_bytes=None)
  memory.require_fit(unknown, 1)
  with pytest.raises(errors.OutOfMemoryError) as error:
    memory.require_fit(program, (3 << 30) - 1)
  for part in ('30 frames x 3 tokens x 2', '3.0 GiB', 'data.batch_frames'):
    assert part in str(error.value)
  exhausted = RuntimeError('RESOURCE_EXHAUSTED: Out of memory while\nmore')
  explained = memory.explain(exhausted, 'train', _SHAPES[1])
  assert isinstance(explained, errors.OutOfMemoryError)
  assert 'profile_buckets' in str(explained)
  other = RuntimeError('INTERNAL: something else')
  assert memory.explain(other, 'train', _SHAPES[1]) is other


def test_the_limit_is_that_of_the_device(monkeypatch):
  assert memory.limit() > 1 << 28
  device = types.SimpleNamespace(
    platform='gpu', memory_stats=lambda: {'bytes_limit': 77}
  )
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert memory.limit() == 77
  device.memory_stats = lambda: None
  assert memory.limit() is None


def _count(function, *shapes):
  arrays = [jnp.zeros(shape) for shape in shapes]
  return flops.count(jax.jit(function).trace(*arrays).jaxpr)


def test_operations_in_closed_form():
  assert _count(lambda a, b: a @ b, (4, 3), (3, 5)) == 2 * 4 * 3 * 5
  batched = _count(
    lambda a, b: jnp.einsum('BTD,BSD->BTS', a, b), (2, 4, 3), (2, 6, 3)
  )
  assert batched == 2 * 2 * 4 * 6 * 3
  # A kernel of 3 x 3 over 2 channels makes each of 7 x 7 x 5 outputs.
  convolved = _count(
    lambda x, k: jax.lax.conv_general_dilated(
      x, k, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    ),
    (1, 9, 9, 2),
    (3, 3, 2, 5),
  )
  assert convolved == 2 * 7 * 7 * 5 * 3 * 3 * 2

  def stack(x, w):
    return jax.lax.scan(
      lambda c, _: (jax.checkpoint(jnp.dot)(c, w), None), x, None, 7
    )[0]

  once = 2 * 4 * 3 * 3
  assert _count(stack, (4, 3), (3, 3)) == 7 * once
  # Backward: the recomputed product is not needed, two others are.
  loss = jax.grad(lambda x, w: jnp.sum(stack(x, w)), argnums=(0, 1))
  assert _count(loss, (4, 3), (3, 3)) == 7 * 3 * once
  branches = _count(
    lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x),
    (4, 3),
    (3, 3),
  )
  assert branches == once


def test_peaks_are_found_by_kind():
  assert flops.peak('NVIDIA H200') == flops.peak('NVIDIA H100 80GB HBM3')
  assert flops.peak('NVIDIA H100 PCIe') < flops.peak('NVIDIA H100 80GB HBM3')
  assert flops.peak('TPU v5 lite') < flops.peak('TPU v5')
  assert flops.peak('TPU v5p') == flops.peak('TPU v5')
  assert flops.peak('NVIDIA L4') is not None
  for other in ('cpu', 'NVIDIA L40', 'NVIDIA T400'):
    assert flops.peak(other) is None, other
