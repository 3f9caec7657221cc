"""Stacks L blocks under `nn.scan`, parameters stacked in front.

Blocks differ in which of their feed-forward layers have experts. Where all are
alike, each parameter is one array of L. Where the difference repeats with a
period p (`every:2`: p = 2; where nothing repeats: p = L), the scan is over
L / p groups of p blocks, and block i is entry i // p of the arrays under
`block_{i % p}`.

The inference form has no such stack: each block is a module of its own, so
that nothing is sliced out of an array before it is multiplied.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import PyTree
from u2moe_jax.sharding import axes

# For each block its feed-forward layers with experts.
Kinds = tuple[tuple[str, ...], ...]


def period(kinds: Kinds) -> int:
  """The smallest divisor p of L such that block i is as block i % p."""
  count = len(kinds)
  return next(
    p
    for p in range(1, count + 1)
    if count % p == 0 and kinds == kinds[:p] * (count // p)
  )


def place(kinds: Kinds, block: int) -> tuple[str, int]:
  """Where a block lies: the subtree (empty: none), and the entry in it."""
  size = period(kinds)
  return (f'block_{block % size}' if size > 1 else ''), block // size


def unstack(stacked: PyTree) -> list[PyTree]:
  """The parameters of a stack, block by block."""
  # Entry after entry, and in each of them the groups: block i is entry i // p
  # of group i % p.
  groups = [stacked]
  if 'block_0' in stacked:
    groups = [stacked[f'block_{j}'] for j in range(len(stacked))]
  return [
    jax.tree.map(lambda leaf, i=i: leaf[i], group)
    for i in range(len(jax.tree.leaves(groups[0])[0]))
    for group in groups
  ]


def build(
  block: type[nn.Module],
  config: config_lib.EncoderConfig | config_lib.DecoderConfig,
  kinds: Kinds,
  *,
  unrolled: bool = False,
  **fields: Any,
) -> nn.Module | list[nn.Module]:
  """Makes L blocks `(x, state, context) -> (x, output)` one module.

  Args:
    block: the block class, whose fields are a config, a kind and `fields`;
      `output` is a struct with a field `moe`, a dict by layer.
    config: of the blocks; says whether to scan (False unrolls the loop, the
      parameter tree is the same) and what to recompute in the backward pass.
    kinds: what each block is.
    unrolled: a module for each block, with parameters of its own.
    **fields: the others.

  Returns:
    What `run` takes: one module, or one for each block.
  """
  if unrolled:
    return [block(config, kind, **fields) for kind in kinds]
  if config.remat:
    # A scan already keeps XLA from undoing the recomputation. Of dots only
    # those with parameters are kept: those with a batch, as in attention, are
    # large and cheap.
    keep_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    block = nn.remat(
      block,
      prevent_cse=not config.scan_blocks,
      policy=keep_dots if config.remat_policy == 'dots' else None,
    )
  size = period(kinds)
  length = len(kinds) // size
  # Each block has parameters and dropout masks of its own, and its entry of the
  # state; the context is the same for all. The axis of the blocks gets a name,
  # for the rules that shard it.
  scanned = nn.scan(
    block if size == 1 else _Group,
    variable_axes={'params': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=(0, nn.broadcast),
    out_axes=0,
    length=length,
    # A loop that is written out, so that parameters stay stacked all the same.
    unroll=1 if config.scan_blocks else length,
    metadata_params={nn.PARTITION_NAME: axes.LAYERS},
  )
  if size == 1:
    return scanned(config, kinds[0], **fields)
  make = functools.partial(block, config, **fields)
  return scanned(make, kinds[:size])


def run(
  blocks: nn.Module | list[nn.Module],
  kinds: Kinds,
  x: Array,
  state: PyTree,
  context: PyTree,
) -> tuple[Array, Any]:
  """Runs a stack.

  Args:
    blocks: what `build` returned, bound.
    kinds: as there.
    x: input of the first block.
    state: inputs of the blocks, stacked over L.
    context: what all of them share.

  Returns:
    The last block's result, and `output` stacked over L; its `moe` over the
    blocks that have such a layer.
  """
  if not isinstance(blocks, nn.Module):
    return _run_each(blocks, x, state, context)
  size = period(kinds)
  if size == 1:
    return blocks(x, state, context)
  # The state from [L, ...] to [L / p, p, ...], outputs from there to [L, ...].
  grouped = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), state)
  x, output = blocks(x, grouped, context)
  return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), output)


class _Group(nn.Module):
  """Unlike blocks in a row.

  Attributes:
    make: from a kind and a name to a block.
    kinds: of the blocks.
  """

  make: functools.partial
  kinds: Kinds

  @nn.compact
  def __call__(
    self, x: Array, state: PyTree, context: PyTree
  ) -> tuple[Array, Any]:
    blocks = (
      self.make(kind, name=f'block_{i}') for i, kind in enumerate(self.kinds)
    )
    return _run_each(blocks, x, state, context)


def _run_each(
  blocks: Iterable[Any], x: Array, state: PyTree, context: PyTree
) -> tuple[Array, Any]:
  """Runs modules in a row, as `run` does."""
  outputs = []
  for i, block in enumerate(blocks):
    own = jax.tree.map(lambda a, i=i: a[i], state)
    x, output = block(x, own, context)
    outputs.append(output)
  return x, _together(outputs)


def _together(outputs: Sequence[Any]) -> Any:
  """Stacks what blocks return, who have not all the same layers."""
  # A dict as a set that keeps its order, that of the pass.
  names = dict.fromkeys(name for output in outputs for name in output.moe)
  moe = {
    name: _stack([o.moe[name] for o in outputs if name in o.moe])
    for name in names
  }
  rest = _stack([dataclasses.replace(output, moe={}) for output in outputs])
  return dataclasses.replace(rest, moe=moe)


def _stack(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
