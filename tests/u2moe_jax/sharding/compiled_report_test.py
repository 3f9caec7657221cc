"""What a compiled program does, loops counted as often as they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.sharding import compiled_report

_P = jax.sharding.PartitionSpec


def _mesh():
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((4,), ('x',), auto, devices=jax.devices()[:4])


def _read(function, *arrays):
  return compiled_report.read(
    jax.jit(function).lower(*arrays).compile().as_text()
  )


def _scanned(length):
  weights = jnp.ones((length, 16, 16))

  def stack(x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]

  return stack, jnp.ones((8, 16))


@pytest.mark.parametrize('length', [3, 6])
def test_a_stack_counts_every_layer(length):
  cost = _read(*_scanned(length))
  assert cost.flops == length * 2 * 8 * 16 * 16
  assert cost.unknown_loops == 0


def test_loops_in_loops_multiply():
  stack, x = _scanned(3)
  twice = lambda x: jax.lax.fori_loop(0, 5, lambda _, c: stack(c), x)
  assert _read(twice, x).flops == 5 * 3 * 2 * 8 * 16 * 16


def test_a_loop_of_unknown_length_counts_once_and_is_told():
  def loop(x, n):
    return jax.lax.fori_loop(0, n, lambda _, c: jnp.tanh(c @ x), x)

  cost = _read(loop, jnp.ones((16, 16)), jnp.int32(3))
  assert cost.flops == 2 * 16**3
  assert cost.unknown_loops == 1


@pytest.mark.parametrize(
  ('kind', 'function', 'expected'),
  [
    ('all-reduce', lambda x: jax.lax.psum(x, 'x'), 2 * 6 * 4),
    (
      'all-gather',
      lambda x: jax.lax.all_gather(x, 'x', tiled=True),
      8 * 6 * 4,
    ),
    (
      'all-to-all',
      lambda x: jax.lax.all_to_all(x, 'x', 1, 0, tiled=True),
      2 * 8 * 4,
    ),
    (
      'collective-permute',
      lambda x: jax.lax.ppermute(x, 'x', [(0, 1), (1, 0)]),
      2 * 6 * 4,
    ),
  ],
)
@pytest.mark.parametrize('rounds', [1, 7])
def test_collectives_by_kind_with_bytes(kind, function, expected, rounds):
  width = 8 if kind == 'all-to-all' else 6
  keep = (
    (lambda y: y.reshape(2, -1)[:, :width])
    if kind != 'all-gather'
    else (lambda y: y[:2])
  )

  def body(x):
    step = lambda _, c: jnp.sin(keep(function(c)))
    return jax.lax.fori_loop(0, rounds, step, x)

  mapped = jax.shard_map(
    body, mesh=_mesh(), in_specs=_P('x'), out_specs=_P('x'), check_vma=False
  )
  found = _read(mapped, jnp.ones((8, width))).collectives
  assert set(found) == {kind}
  assert found[kind].count == rounds
  assert found[kind].bytes == rounds * expected


def test_products_are_those_of_one_device():
  mesh = _mesh()
  rows = jax.device_put(
    np.ones((8, 16), np.float32), jax.sharding.NamedSharding(mesh, _P('x'))
  )
  weight = jax.device_put(
    np.ones((16, 32), np.float32), jax.sharding.NamedSharding(mesh, _P())
  )
  assert _read(jnp.matmul, rows, weight).flops == 2 * 8 * 16 * 32 / 4


def test_asynchronous_forms_and_convolutions():
  text = """HloModule m

ENTRY %main (a: f32[2,6]) -> f32[8,6] {
  %a = f32[2,6]{1,0} parameter(0)
  %s = (f32[2,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%a), dimensions={0}
  %i = f32[1,9,9,2]{3,2,1,0} parameter(1)
  %k = f32[3,3,2,5]{3,2,1,0} parameter(2)
  %c = f32[1,7,7,5]{3,2,1,0} convolution(%i, %k), window={size=3x3}, dim_labels=b01f_01io->b01f
  ROOT %d = f32[8,6]{1,0} all-gather-done(%s)
}
"""
  cost = compiled_report.read(text)
  assert cost.collectives == {
    'all-gather': compiled_report.Traffic(1, 8 * 6 * 4)
  }
  assert cost.flops == 2 * 7 * 7 * 5 * 3 * 3 * 2


@pytest.mark.parametrize(
  ('groups', 'count'),
  [
    ('{{0},{1}}', 0),
    ('{{0,1}}', 1),
    ('{{0,2},{1,3}}', 1),
    ('[4,1]<=[4]', 0),
    ('[2,2]<=[2,2]T(1,0)', 1),
    ('{}', 1),
  ],
)
def test_who_talks_to_itself_sends_nothing(groups, count):
  text = f"""HloModule m

ENTRY %main (a: f32[2,6]) -> f32[2,6] {{
  %a = f32[2,6]{{1,0}} parameter(0)
  ROOT %r = f32[2,6]{{1,0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
  assert compiled_report.read(text).traffic.count == count


def test_other_text_is_refused():
  with pytest.raises(ValueError, match='ENTRY'):
    compiled_report.read('nothing of the kind')
