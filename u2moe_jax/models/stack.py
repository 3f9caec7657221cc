"""Stacks L equal blocks under `nn.scan`, parameters stacked in front."""

from flax import linen as nn

from u2moe_jax.sharding import axes


def scanned(block: type[nn.Module], *, length: int, scan: bool, remat: bool):
  """Lifts a block `(x, state, context) -> (x, output)` to L of them.

  Args:
    block: the block class; `state` and `output` are stacked over L, `context`
      is shared.
    length: L.
    scan: compile one block and loop; False unrolls the loop. The parameter
      tree is the same, stacked, either way.
    remat: recompute activations in the backward pass.

  Returns:
    The lifted class, to be built with the block's own fields.
  """
  if remat:
    # A scan already keeps XLA from undoing the recomputation.
    block = nn.remat(block, prevent_cse=not scan)
  return nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=(0, nn.broadcast),
    out_axes=0,
    length=length,
    unroll=1 if scan else length,
    metadata_params={nn.PARTITION_NAME: axes.LAYERS},
  )
