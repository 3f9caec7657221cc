"""From logical names to shardings of states and batches."""

import math
from typing import Any

from flax import linen as nn
import jax

from u2moe_jax.array_types import PyTree
from u2moe_jax.sharding import axes
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import rules as rules_lib


def shardings(
  boxed: PyTree, mesh: jax.sharding.Mesh, rules: rules_lib.Rules
) -> PyTree:
  """Shardings of a tree whose leaves carry logical names.

  Args:
    boxed: what `jax.eval_shape(init)` returns, boxes still on.
    mesh: the device mesh.
    rules: logical to mesh axes.

  Returns:
    A tree of `NamedSharding` shaped like the unboxed tree.

  Raises:
    mesh_lib.MeshError: if a mesh axis does not divide a dimension; names it.
  """
  specs = nn.get_partition_spec(boxed)
  result = nn.logical_to_mesh_sharding(specs, mesh, rules)
  shapes = nn.meta.unbox(boxed)
  jax.tree_util.tree_map_with_path(_require_divisible, shapes, result)
  return result


def _require_divisible(path: Any, leaf: Any, sharding: Any) -> None:
  sizes = dict(sharding.mesh.shape)
  for dimension, names in zip(leaf.shape, sharding.spec, strict=False):
    names = (names,) if isinstance(names, str) else (names or ())
    parts = math.prod(sizes[name] for name in names)
    if dimension % parts:
      raise mesh_lib.MeshError(
        f'mesh axis {"*".join(names)}={parts} does not divide dimension '
        f'{dimension} of parameter {jax.tree_util.keystr(path)} '
        f'{tuple(leaf.shape)}; choose another mesh shape'
      )


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The same on every device."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def batch_sharding(
  mesh: jax.sharding.Mesh, rules: rules_lib.Rules
) -> jax.sharding.NamedSharding:
  """The first axis over whatever the table gives the batch."""
  spec = jax.sharding.PartitionSpec(dict(rules)[axes.BATCH])
  return jax.sharding.NamedSharding(mesh, spec)


def batch_parts(mesh: jax.sharding.Mesh, rules: rules_lib.Rules) -> int:
  """Into how many parts the batch axis is split; it must divide B."""
  names = dict(rules)[axes.BATCH] or ()
  names = (names,) if isinstance(names, str) else names
  return math.prod(mesh.shape[name] for name in names)


def shard_batch(batch: PyTree, sharding: jax.sharding.NamedSharding) -> PyTree:
  """Places a host batch; each process gives its part of the first axis."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
