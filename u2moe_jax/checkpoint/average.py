"""Averages of parameters."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import PyTree


def average(trees: Iterable[PyTree]) -> PyTree:
  """Arithmetic mean of equal trees, one in memory at a time.

  Integer leaves (counters) are taken from the first tree, not averaged.

  Raises:
    ValueError: if there is no tree.
  """
  total, count = None, 0
  for tree in trees:
    count += 1
    total = tree if total is None else jax.tree.map(_add, total, tree)
  if total is None:
    raise ValueError('nothing to average')
  return jax.tree.map(lambda x: x / count if _is_float(x) else x, total)


def _is_float(x: Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def _add(a: Array, b: Array) -> Array:
  return a + b if _is_float(a) else a
