"""From logical names to shardings of states and batches."""

from collections.abc import Mapping
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
  problem = misfit(boxed, dict(mesh.shape), rules)
  if problem is not None:
    raise mesh_lib.MeshError(f'{problem}; choose another mesh shape')
  specs = nn.get_partition_spec(boxed)
  return nn.logical_to_mesh_sharding(specs, mesh, rules)


def misfit(
  boxed: PyTree, sizes: Mapping[str, int], rules: rules_lib.Rules
) -> str | None:
  """Says which dimension an axis does not divide; None if all are divided.

  Args:
    boxed: as in `shardings`.
    sizes: of the axes of the mesh.
    rules: logical to mesh axes.
  """
  specs = nn.get_partition_spec(boxed)
  found = jax.tree_util.tree_map_with_path(
    lambda path, leaf, spec: _misfit(path, leaf.shape, spec, sizes, rules),
    nn.meta.unbox(boxed),
    specs,
  )
  # None is no leaf of a tree, so what is left are the misfits.
  return next(iter(jax.tree.leaves(found)), None)


def _misfit(
  path: Any,
  shape: tuple[int, ...],
  spec: jax.sharding.PartitionSpec,
  sizes: Mapping[str, int],
  rules: rules_lib.Rules,
) -> str | None:
  # A spec may be shorter than the shape; the axes it leaves out are not split.
  for dimension, logical in zip(shape, spec, strict=False):
    if logical is None:
      continue
    names = rules_lib.mesh_axes(rules, logical)
    parts = math.prod(sizes[name] for name in names)
    if dimension % parts:
      return (
        f'mesh axis {"*".join(names)}={parts} does not divide the {dimension} '
        f'of axis {logical!r} of parameter {jax.tree_util.keystr(path)} '
        f'{tuple(shape)}'
      )
  return None


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The same on every device."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def batch_sharding(
  mesh: jax.sharding.Mesh, rules: rules_lib.Rules
) -> jax.sharding.NamedSharding:
  """The first axis over whatever the table gives the batch."""
  # One entry serves fields of any rank: later axes are not split.
  spec = jax.sharding.PartitionSpec(dict(rules)[axes.BATCH])
  return jax.sharding.NamedSharding(mesh, spec)


def batch_parts(mesh: jax.sharding.Mesh, rules: rules_lib.Rules) -> int:
  """Into how many parts the batch axis is split; it must divide B."""
  names = rules_lib.mesh_axes(rules, axes.BATCH)
  return math.prod(mesh.shape[name] for name in names)


def shard_batch(batch: PyTree, sharding: jax.sharding.NamedSharding) -> PyTree:
  """Places a host batch; each process gives its part of the first axis.

  Raises:
    mesh_lib.MeshError: if the mesh does not divide the batch.
  """
  names = sharding.spec[0] or ()
  names = (names,) if isinstance(names, str) else names
  parts = math.prod(sharding.mesh.shape[name] for name in names)
  # One field is enough: all of them have B rows.
  for leaf in jax.tree.leaves(batch)[:1]:
    rows = leaf.shape[0] * jax.process_count()
    if rows % parts:
      raise mesh_lib.MeshError(
        f'mesh axis {"*".join(names)}={parts} does not divide a batch of '
        f'{rows} utterances'
      )
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
